"""Generation: prefill in chunks, then one token a step for the whole batch."""

from .loop import Streamer, generate
from .options import GenerationConfig

__all__ = ["GenerationConfig", "Streamer", "generate"]
