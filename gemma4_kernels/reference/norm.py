"""Twins and checks of `ops/norm.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import check_beside, check_floating

__all__ = ["add_rms_norm", "add_rms_norm_backward", "rms_norm", "rms_norm_backward"]


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


def through_norm(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x and, row by row, of the weight, from that of y = n weight.

    With n = x r, r = (mean x² + eps)^-½: dx = r (dn - n mean(dn n)), dweight = Σ_rows dy n.
    All are wide already.
    """
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = x * r
    grad_n = grad if weight is None else grad * weight
    return r * (grad_n - n * (grad_n * n).mean(-1, keepdim=True)), grad * n


def sum_of_rows(x: Tensor, rows: Tensor, weight: Tensor | None, wanted: bool) -> Tensor:
    """A weight's gradient in its dtype; where none is wanted, an empty tensor beside x."""
    if weight is None or not wanted:
        return x.new_empty(0)
    return rows.reshape(-1, rows.shape[-1]).sum(0).to(weight.dtype)


def widest(*tensors: Tensor | None) -> torch.dtype:
    """What the tensors promote to, no less than fp32."""
    dtype = torch.float32
    for x in tensors:
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    return dtype


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    wide = widest(x, weight)
    wide_weight = None if weight is None else weight.to(wide)
    grad_x, weight_rows = through_norm(grad.to(wide), x.to(wide), wide_weight, eps)
    grad_x = grad_x.to(x.dtype).contiguous() if wants_x else x.new_empty(0)
    return grad_x, sum_of_rows(x, weight_rows, weight, wants_weight)


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


def add_rms_norm_backward(
    grad_residual: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor,
    new_residual: Tensor,
    post_weight: Tensor,
    next_weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    wants_x: bool,
    wants_residual: bool,
    wants_post_weight: bool,
    wants_next_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = widest(x, new_residual, post_weight, next_weight, scale)
    grad = torch.zeros_like(new_residual, dtype=wide)
    next_rows = grad
    if grad_residual is not None:
        grad = grad + grad_residual
    if grad_y is not None and next_weight is not None:
        into, next_rows = through_norm(
            grad_y.to(wide), new_residual.to(wide), next_weight.to(wide), eps
        )
        grad = grad + into
    if scale is not None:
        grad = grad * scale
    grad_x, post_rows = through_norm(grad, x.to(wide), post_weight.to(wide), eps)
    return (
        grad_x.to(x.dtype).contiguous() if wants_x else x.new_empty(0),
        grad.to(new_residual.dtype).contiguous() if wants_residual else x.new_empty(0),
        sum_of_rows(x, post_rows, post_weight, wants_post_weight),
        sum_of_rows(x, next_rows, next_weight, wants_next_weight),
    )
