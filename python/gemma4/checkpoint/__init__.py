"""Checkpoints: finding one, reading it tensor by tensor, and writing one."""

from .folder import resolve
from .load import Pretrained
from .save import save_pretrained

__all__ = ["Pretrained", "resolve", "save_pretrained"]
