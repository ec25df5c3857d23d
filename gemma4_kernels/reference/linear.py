"""Twin and check of `ops/linear.py`."""

import torch.nn.functional as F
from torch import Tensor

from .common import check_beside, check_floating, check_like, check_shape
from .mlp import geglu
from .norm import add_rms_norm, rms_norm
from .ple import ple_gate

__all__ = ["linear_small"]


def check_linear_small(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    factor: Tensor | None,
    x_weight: Tensor | None,
    other: Tensor | None,
    other_weight: Tensor | None,
    gated: bool,
) -> None:
    check_floating("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, D], got {list(x.shape)}")
    tokens, width = x.shape
    check_like("weight", weight, "x", x)
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(f"weight must be [N, {width}], got {list(weight.shape)}")
    if gated and weight.shape[0] % 2:
        raise ValueError(f"a gated weight must have an even height, got {list(weight.shape)}")
    if (residual is None) != (post_weight is None):
        raise ValueError("residual and post_weight must come together or not")
    if scale is not None and residual is None:
        raise ValueError("scale must not come without a residual")
    with_other = {other is None, x_weight is None, other_weight is None}
    if len(with_other) > 1 or (other is not None and residual is None):
        raise ValueError(
            "x_weight, other and other_weight must come together and with a residual, or not"
        )
    if factor is not None and gated:
        raise ValueError("factor must not come with gated")
    for name, rows in (("residual", residual), ("other", other)):
        if rows is not None:
            check_beside(name, rows, "x", x, (tokens, width))
    weights = {"post_weight": post_weight, "norm_weight": norm_weight}
    weights |= {"x_weight": x_weight, "other_weight": other_weight}
    for name, row in weights.items():
        if row is not None:
            check_beside(name, row, "x", x, (width,))
    if scale is not None:
        check_beside("scale", scale, "x", x, (1,))
    if factor is not None:
        check_like("factor", factor, "x", x)
        check_shape("factor", factor, (tokens, weight.shape[0]))


def linear_small(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    factor: Tensor | None,
    x_weight: Tensor | None,
    other: Tensor | None,
    other_weight: Tensor | None,
    eps: float,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    a, new_residual = x, x.new_empty(0)
    if residual is not None:
        assert post_weight is not None  # they come together
        if other is not None:
            assert other_weight is not None
            x, _ = add_rms_norm(other, rms_norm(x, x_weight, eps), other_weight, None, None, eps)
        a, _ = add_rms_norm(x, residual, post_weight, None, scale, eps)
        new_residual = a
    if norm_weight is not None:
        a = rms_norm(a, norm_weight, eps)
    y = F.linear(a.to(weight.dtype), weight)
    if gated:
        y = geglu(y)
    elif factor is not None:
        y = ple_gate(y, factor.unsqueeze(1), 0)
    return y, new_residual
