"""A tiny trained Gemma 4 that ships with the package; `train.py` here made it."""

from pathlib import Path


def path() -> Path:
    """Folder of the shipped checkpoint, fit for `Gemma4ForCausalLM.from_pretrained`."""
    return Path(__file__).parent
