"""The older name of `gemma4.checkpoint`."""

from .checkpoint import load_pretrained, resolve, save_pretrained

__all__ = ["load_pretrained", "resolve", "save_pretrained"]
