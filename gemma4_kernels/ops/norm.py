"""RMS norms over a row."""

import torch
from torch import Tensor

from ..opset import Op, new
from ..reference import norm as reference

_rms_norm = Op(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    reference.rms_norm,
    check=reference.check_rms_norm,
    outputs=lambda x: new(x, *x.shape),
    beside=("weight",),
)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMS norm over the last dimension: x (mean x² + eps)^-½ weight, fp32 inside, one cast.

    x [..., D] and weight [D], each of a floating dtype; the weight multiplies as it is (no 1 + w)
    and may be absent. Returns [..., D] in the dtype of x.
    """
    return _rms_norm(x, weight, eps)


def _residual_and_y(
    x: Tensor, residual: Tensor, next_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    y_shape = (0,) if next_weight is None else x.shape
    return new(x, *x.shape, dtype=dtype), new(x, *y_shape, dtype=dtype)


_add_rms_norm = Op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor post_weight, Tensor? next_weight,"
    " Tensor? scale, float eps) -> (Tensor, Tensor)",
    reference.add_rms_norm,
    check=reference.check_add_rms_norm,
    outputs=_residual_and_y,
    beside=("residual", "post_weight", "next_weight", "scale"),
)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    next_weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """Closes one branch of a sandwich norm and opens the next.

    residual' = (residual + rms_norm(x, post_weight)) scale, y = rms_norm(residual', next_weight).

    x, residual [..., D]; post_weight, next_weight [D]; scale [1] (the layer scalar, 1 if absent),
    each of a floating dtype; eps as in `rms_norm`, for both norms. Returns (residual', y), both in
    the dtype that x and residual promote to; y is None without a next_weight.
    """
    residual, y = _add_rms_norm(x, residual, post_weight, next_weight, scale, eps)
    return residual, None if next_weight is None else y
