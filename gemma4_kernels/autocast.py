"""What `torch.autocast` means for an op: its products are cast, its own arithmetic is not."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def product_dtype(x: Tensor) -> torch.dtype | None:
    """What operands of matrix products on x's device are cast to; None where they stay."""
    if not isinstance(x, Tensor):
        return None  # the op says so
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in `dtype`; fp64 stays, as under autocast, and so does what the op refuses."""
    return tuple(x.to(dtype) if _is_cast(x) else x for x in tensors)


def _is_cast(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def unaffected(function: Callable[..., R]) -> Callable[..., R]:
    """Runs `function` as if autocast were off, so that it computes what it says."""

    @functools.wraps(function)
    def call(*args: object) -> R:
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        with torch._C._DisableAutocast():
            return function(*args)

    return call
