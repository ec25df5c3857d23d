"""Linear layers: packed ones, and those of few tokens with what stands before and behind them."""

import torch
from torch import Tensor

from .. import packed
from ..autocast import cast, product_dtype
from ..opset import HALF, Args, Gradient, Op, new
from ..packed import PackedWeight
from ..reference import linear as reference

# Of a kernel: tokens; columns of a row that it norms, and elements of all of them.
MOST_TOKENS, MOST_NORMED_WIDTH, MOST_NORMED_ELEMENTS = 16, 6144, 40960


def lies_ready(weight: Tensor) -> bool:
    """Contiguous, and beginning on a multiple of 16 bytes: no kernel copies a layer."""
    # The compiler knows no offsets; where the call runs it is asked again.
    offset = 0 if torch.compiler.is_compiling() else weight.storage_offset()
    return weight.is_contiguous() and offset * weight.itemsize % 16 == 0


def parts_of(weight: Tensor | PackedWeight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a schema has of a weight: itself or codes, scales, row scales."""
    return weight.parts if isinstance(weight, PackedWeight) else (weight, None, None)


def packed_unserved(
    name: str, codes: Tensor, scales: Tensor | None, row_scales: Tensor | None
) -> str | None:
    """Why no kernel reads this packed weight."""
    for part in (codes, scales, row_scales):
        if part is not None and not lies_ready(part):
            return f"{name} is not contiguous, or does not begin on a multiple of 16 bytes"
    return None


def _packed_unserved(
    x: Tensor, weight: Tensor, weight_scales: Tensor | None, weight_row_scales: Tensor | None
) -> str | None:
    if x.ndim != 2 or weight.ndim != 3:
        return f"it is for x [T, D] and one weight, got {list(x.shape)}, {list(weight.shape)}"
    return packed_unserved("weight", weight, weight_scales, weight_row_scales)


def _packed_outputs(x: Tensor, weight: Tensor) -> Tensor:
    return new(x, x.shape[0], weight.shape[0] * packed.ROWS)


def _packed_gradient(
    kept: Args, wanted: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    return reference.linear_packed_backward(grad, *kept), None, None, None


_linear_packed = Op(
    "linear_packed(Tensor x, Tensor weight, Tensor? weight_scales, Tensor? weight_row_scales)"
    " -> Tensor",
    reference.linear_packed,
    check=reference.check_linear_packed,
    outputs=_packed_outputs,
    dtypes=HALF,
    unserved=_packed_unserved,
    gradient=Gradient(keep=lambda inputs, _: inputs[1:], backward=_packed_gradient),
)


def linear_packed(x: Tensor, weight: PackedWeight) -> Tensor:
    """A linear layer whose weight is packed: y = x Wᵀ, W rounded to the dtype of x.

    x [T, D] of any floating dtype, under autocast cast to its dtype; weight a PackedWeight [N, D].
    Returns y [T, N] in the dtype of x. Only x has a gradient. No more than a part of the weight is
    numbers at any time; up to 16 tokens a kernel reads every code once, and a token's bits do not
    depend on the others.
    """
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"weight must be a PackedWeight, got {type(weight).__name__}")
    dtype = product_dtype(x)
    if dtype is not None:
        (x,) = cast(dtype, x)
    return _linear_packed(x, *weight.parts)


def _unserved(
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
) -> str | None:
    is_packed = weight.dtype in packed.CODES
    if x.ndim != 2 or weight.ndim != 2 + is_packed:
        return f"it is for x [T, D] and weight [N, D], got {list(x.shape)}, {list(weight.shape)}"
    (tokens, width), rows = x.shape, weight.shape[0] * (packed.ROWS if is_packed else 1)
    if tokens > MOST_TOKENS:
        return f"it is for at most {MOST_TOKENS} tokens, got {tokens}"
    if width % 8 or rows % (16 if gated else 8):
        return f"it is for widths that are multiples of 8, got {list(weight.shape)}"
    if is_packed and gated and rows % 32:
        return (
            f"a gated packed weight must have two halves of whole tiles, got {list(weight.shape)}"
        )
    weights = (None if is_packed else weight, post_weight, norm_weight, x_weight, other_weight)
    if any(t is not None and t.dtype != x.dtype for t in weights):
        return f"it is for weights in the dtype of x, {x.dtype}"
    if any(t is not None and t.dtype != x.dtype for t in (residual, scale, factor, other)):
        return f"it is for a residual, scale, factor and other in the dtype of x, {x.dtype}"
    normed = residual is not None or norm_weight is not None
    if normed and (width > MOST_NORMED_WIDTH or tokens * width > MOST_NORMED_ELEMENTS):
        return (
            f"its norms are for at most {MOST_NORMED_WIDTH} columns and "
            f"{MOST_NORMED_ELEMENTS} elements, got {list(x.shape)}"
        )
    return packed_unserved("weight", weight, weight_scales, weight_row_scales)


def _outputs(
    x: Tensor, weight: Tensor, residual: Tensor | None, gated: bool
) -> tuple[Tensor, Tensor]:
    rows = weight.shape[0] * (packed.ROWS if weight.dtype in packed.CODES else 1)
    y = new(x, x.shape[0], rows // 2 if gated else rows)
    if residual is None:
        return y, new(x, 0)
    return y, new(x, *x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


_linear_small = Op(
    "linear_small(Tensor x, Tensor weight, Tensor? weight_scales, Tensor? weight_row_scales,"
    " Tensor? residual, Tensor? post_weight, Tensor? scale, Tensor? norm_weight, Tensor? factor,"
    " Tensor? x_weight, Tensor? other, Tensor? other_weight, float eps, bool gated)"
    " -> (Tensor, Tensor)",
    reference.linear_small,
    check=reference.check_linear_small,
    outputs=_outputs,
    dtypes=HALF,
    beside=(
        *("residual", "post_weight", "scale", "norm_weight"),
        *("x_weight", "other", "other_weight"),
    ),
    unserved=_unserved,
)


def linear_small(
    x: Tensor,
    weight: Tensor | PackedWeight,
    *,
    residual: Tensor | None = None,
    post_weight: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    factor: Tensor | None = None,
    x_weight: Tensor | None = None,
    other: Tensor | None = None,
    other_weight: Tensor | None = None,
    gated: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """A linear layer of up to 16 tokens, with the norms before it and the gate behind it.

    a = x; with a residual, new_residual = (residual + rms_norm(x, post_weight)) scale and a = that;
    with norm_weight, a = rms_norm(a, norm_weight). y = a weightᵀ; gated, geglu(y) of its two
    halves; with a factor, gelu(y, approximate="tanh") · factor. With other, a branch that closes
    beside x and like it needs a residual, x is rms_norm(x, x_weight) + rms_norm(other,
    other_weight) in all this.

    x, residual, other [T, D]; weight [N, D], gated with the N / 2 gate rows first, or a
    PackedWeight, as in `linear_packed`; post_weight, which comes with a residual, x_weight and
    other_weight, which come with other, and norm_weight [D]; scale [1]; factor [T, N]; eps as in
    `rms_norm`. x, a dense weight and factor have one floating dtype, and under autocast are cast to
    its dtype; the others may be of any.
    Returns y [T, N or N / 2] in the dtype of x, and new_residual [T, D] in the one that x and
    residual promote to, or None. A kernel reads every weight once, and a token's bits do not depend
    on the others. Products with a gate or factor are held within ±65504 in fp16, as in `geglu`.
    """
    dtype = product_dtype(x)
    if dtype is not None:
        (x,) = cast(dtype, x)
        if not isinstance(weight, PackedWeight):
            (weight,) = cast(dtype, weight)
        if factor is not None:
            (factor,) = cast(dtype, factor)
    opening = residual, post_weight, scale, norm_weight
    args = (*opening, factor, x_weight, other, other_weight, eps, gated)
    y, new_residual = _linear_small(x, *parts_of(weight), *args)
    return y, None if residual is None else new_residual


def linear_small_pays(
    x: Tensor, weight: Tensor | PackedWeight, norm_weight: Tensor | None, gated: bool
) -> bool:
    """Whether such a call is no slower than its parts: it has a kernel, or they would have none.

    x, weight, norm_weight (with or without a residual) and gated as in `linear_small`.
    """
    opening = None, None, None, norm_weight, None, None, None, None
    return _linear_small.pays((x, *parts_of(weight), *opening, 0.0, gated))
