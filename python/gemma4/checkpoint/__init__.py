"""Checkpoints: finding one, reading it tensor by tensor, and writing one."""

from .folder import resolve
from .load import load
from .save import save_pretrained

__all__ = ["load", "resolve", "save_pretrained"]
