"""Gemma 4 text models on `gemma4_kernels`: configs, model, checkpoints, generation.

Names are imported when they are asked for: torch takes seconds, and the command line answers
`--help` without it.
"""

TYPE_CHECKING = False  # typing's, whose import would take longer than all else here
if TYPE_CHECKING:
    from .cache import Cache
    from .config import Gemma4TextConfig
    from .generate import GenerationConfig
    from .model import Gemma4ForCausalLM, Gemma4TextModel
    from .outputs import CausalLMOutput, GenerateOutput, ModelOutput
    from .tokenizer import Gemma4Tokenizer, TextStreamer

__all__ = [
    "Cache",
    "CausalLMOutput",
    "Gemma4ForCausalLM",
    "Gemma4TextConfig",
    "Gemma4TextModel",
    "Gemma4Tokenizer",
    "GenerateOutput",
    "GenerationConfig",
    "ModelOutput",
    "TextStreamer",
]

_MODULES = {
    "Cache": "cache",
    "CausalLMOutput": "outputs",
    "Gemma4ForCausalLM": "model",
    "Gemma4TextConfig": "config",
    "Gemma4TextModel": "model",
    "Gemma4Tokenizer": "tokenizer",
    "GenerateOutput": "outputs",
    "GenerationConfig": "generate",
    "ModelOutput": "outputs",
    "TextStreamer": "tokenizer",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _MODULES:
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _MODULES.values():
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
