"""Gemma 4 text models on `gemma4_kernels`: configs, model, checkpoints, generation."""

from .cache import Cache
from .config import Gemma4TextConfig
from .generate import GenerationConfig
from .model import Gemma4ForCausalLM, Gemma4TextModel
from .outputs import CausalLMOutput, ModelOutput
from .tokenizer import Gemma4Tokenizer, TextStreamer

__all__ = [
    "Cache",
    "CausalLMOutput",
    "Gemma4ForCausalLM",
    "Gemma4TextConfig",
    "Gemma4TextModel",
    "Gemma4Tokenizer",
    "GenerationConfig",
    "ModelOutput",
    "TextStreamer",
]
