"""Ops of Google's Gemma 4 text models for PyTorch, usable alone from any program."""

from . import extension, flash_attn, ops, opset
from .check import record
from .dependent import dependent_launches
from .flash_attn import *
from .info import build_info
from .ops import *

__version__ = "0.1.0"

# In steps that type checkers follow, though the names stand elsewhere.
__all__ = ["build_info", "dependent_launches"]
__all__ += flash_attn.__all__
__all__ += ops.__all__

opset.kernels = opset.Kernels("gemma4_kernels_compiled", "CUDA", extension.covers, record.failed)
