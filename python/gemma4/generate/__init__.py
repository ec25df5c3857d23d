"""Generation: prefill in chunks, then one token a step for the whole batch."""

from .loop import GenerateOutput, Streamer, generate
from .options import GenerationConfig

__all__ = ["GenerateOutput", "GenerationConfig", "Streamer", "generate"]
