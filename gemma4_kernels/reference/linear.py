"""Twins and checks of `ops/linear.py`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import packed
from ..packed import PackedWeight
from .common import check_beside, check_floating, check_like, check_same_device, check_shape
from .mlp import geglu
from .norm import add_rms_norm, rms_norm
from .ple import ple_gate

__all__ = ["linear_packed", "linear_small"]

# Of a packed weight, as many of its elements are numbers at once.
BLOCK_ELEMENTS = 1 << 22


def check_linear_packed(
    x: Tensor, weight: Tensor, weight_scales: Tensor | None, weight_row_scales: Tensor | None
) -> None:
    check_floating("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, D], got {list(x.shape)}")
    packed.check("weight", weight, weight_scales, weight_row_scales)
    check_same_device("weight", weight, "x", x)
    width = weight.shape[-2] * packed.COLUMNS
    if weight.ndim != 3 or x.shape[1] != width:
        raise ValueError(
            f"weight must be [N / 16, {x.shape[1]} / 64, codes of a tile], got {list(weight.shape)}"
        )


def _blocks(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in `dtype`, block by block, and which they are."""
    rows, width = weight.shape
    step = max(BLOCK_ELEMENTS // width // packed.ROWS, 1) * packed.ROWS
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield slice(begin, end), weight.rows(begin, end).to(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ, which keeps for its backward what is packed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor | None) -> Tensor:
        ctx.parts = parts
        whole = PackedWeight(*parts)  # type: ignore[arg-type]
        return torch.cat([F.linear(x, block) for _, block in _blocks(whole, x.dtype)], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return linear_packed_backward(grads[0], *ctx.parts), None, None, None


def linear_packed(
    x: Tensor, weight: Tensor, weight_scales: Tensor | None, weight_row_scales: Tensor | None
) -> Tensor:
    y: Tensor = _Product.apply(x, weight, weight_scales, weight_row_scales)
    return y


def linear_packed_backward(
    grad: Tensor, weight: Tensor, weight_scales: Tensor | None, weight_row_scales: Tensor | None
) -> Tensor:
    """Of x: grad W."""
    whole = PackedWeight(weight, weight_scales, weight_row_scales)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    sum = grad.new_zeros(grad.shape[0], whole.shape[1], dtype=dtype)
    for rows, block in _blocks(whole, grad.dtype):
        sum += grad[:, rows] @ block
    return sum.to(grad.dtype)


def check_linear_small(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor | None,
    weight_row_scales: Tensor | None,
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
    rows = _check_weight(x, weight, weight_scales, weight_row_scales)
    tokens, width = x.shape
    if gated and rows % 2:
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
    for name, branch in (("residual", residual), ("other", other)):
        if branch is not None:
            check_beside(name, branch, "x", x, (tokens, width))
    weights = {"post_weight": post_weight, "norm_weight": norm_weight}
    weights |= {"x_weight": x_weight, "other_weight": other_weight}
    for name, row in weights.items():
        if row is not None:
            check_beside(name, row, "x", x, (width,))
    if scale is not None:
        check_beside("scale", scale, "x", x, (1,))
    if factor is not None:
        check_like("factor", factor, "x", x)
        check_shape("factor", factor, (tokens, rows))


def _check_weight(
    x: Tensor, weight: Tensor, weight_scales: Tensor | None, weight_row_scales: Tensor | None
) -> int:
    """Also of x; returns how many rows the weight has."""
    if weight.dtype in packed.CODES:
        check_linear_packed(x, weight, weight_scales, weight_row_scales)
        return weight.shape[0] * packed.ROWS
    check_floating("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, D], got {list(x.shape)}")
    check_like("weight", weight, "x", x)
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be [N, {x.shape[1]}], got {list(weight.shape)}")
    if weight_scales is not None or weight_row_scales is not None:
        raise ValueError("weight_scales and weight_row_scales must come with a packed weight alone")
    return weight.shape[0]


def linear_small(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor | None,
    weight_row_scales: Tensor | None,
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
    multiply: Callable[..., Tensor] = linear_packed,
) -> tuple[Tensor, Tensor]:
    """`multiply` is of packed weights."""
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
    if weight.dtype in packed.CODES:
        y = multiply(a.to(x.dtype), weight, weight_scales, weight_row_scales)
    else:
        y = F.linear(a.to(weight.dtype), weight)
    if gated:
        y = geglu(y)
    elif factor is not None:
        y = ple_gate(y, factor.unsqueeze(1), 0)
    return y, new_residual
