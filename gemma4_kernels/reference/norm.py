"""Twins and checks of `ops/norm.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import check_beside, check_floating

__all__ = ["add_rms_norm", "rms_norm"]


def check_rms_norm(x: Tensor, weight: Tensor | None, name: str = "weight") -> None:
    check_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if weight is not None:
        check_beside(name, weight, "x", x, x.shape[-1:])


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    # torch's own: fp32 inside, weight multiplied before the one cast, as Gemma 4 has it.
    if weight is None or weight.dtype == x.dtype:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


def check_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    next_weight: Tensor | None,
    scale: Tensor | None,
) -> None:
    check_rms_norm(x, post_weight, "post_weight")
    check_beside("residual", residual, "x", x, x.shape)
    if next_weight is not None:
        check_beside("next_weight", next_weight, "x", x, x.shape[-1:])
    if scale is not None:
        check_beside("scale", scale, "x", x, (1,))


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    next_weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    residual = residual + rms_norm(x, post_weight, eps)
    if scale is not None:
        # In place, in the reference: the dtype stays.
        residual = (residual * scale).to(residual.dtype)
    residual = residual.contiguous()
    if next_weight is None:
        return residual, residual.new_empty(0)
    return residual, rms_norm(residual, next_weight, eps)
