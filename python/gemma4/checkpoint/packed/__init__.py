"""Quantised weights, as their libraries store them, unpacked to dense ones.

What a weight is, its tensors say by their names, dtypes and shapes; the config is asked only for
what they leave open. A file may therefore mix formats, and lists of modules that were left out need
no reading. Weights are unpacked row by row in float32, each product rounded once.
"""

from .gather import gathered, options_of
from .weight import Options, Packed

__all__ = ["Options", "Packed", "gathered", "options_of"]
