"""Twins and checks of `ops/logits.py`."""

import torch
from torch import Tensor

from .common import check_floating

__all__ = ["softcap", "softcap_argmax"]


def check_softcap(logits: Tensor, cap: float) -> None:
    check_floating("logits", logits)
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")


def softcap(logits: Tensor, cap: float) -> Tensor:
    return (torch.tanh_(logits / cap) * cap).contiguous()


def check_softcap_argmax(logits: Tensor, cap: float) -> None:
    check_softcap(logits, cap)
    if logits.ndim < 1 or logits.shape[-1] <= 0:
        raise ValueError(f"logits must end in a non-empty vocabulary, got {list(logits.shape)}")


def softcap_argmax(logits: Tensor, cap: float) -> Tensor:
    return softcap(logits, cap).argmax(-1)
