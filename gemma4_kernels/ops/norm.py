"""RMS norms over a row."""

import torch
from torch import Tensor

from ..opset import Args, Gradient, NoGradient, Op, new
from ..reference import norm as reference

# Of the rows that the kernels of gradients take, as csrc/norm/ops.h has it.
ROW_MULTIPLE, WIDEST_ROW = 8, 6144


def row_unserved(x: Tensor) -> str | None:
    width = x.shape[-1]
    if width % ROW_MULTIPLE == 0 and width <= WIDEST_ROW:
        return None
    return f"it is for widths up to {WIDEST_ROW} that {ROW_MULTIPLE} divides, got {width}"


def grad_of(x: Tensor, like: Tensor | None, wanted: bool) -> Tensor:
    """A new tensor beside x for the gradient of another, which is empty where none is wanted."""
    if like is None or not wanted:
        return new(x, 0)
    return new(x, *like.shape, dtype=like.dtype)


_rms_norm_backward = Op(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps, bool wants_x,"
    " bool wants_weight) -> (Tensor, Tensor)",
    reference.rms_norm_backward,
    outputs=lambda x, weight, wants_x, wants_weight: (
        grad_of(x, x, wants_x),
        grad_of(x, weight, wants_weight),
    ),
    main="x",
    beside=("weight",),
    unserved=row_unserved,
    gradient=NoGradient("second derivatives are not offered"),
)


def _through_rms_norm(
    kept: Args, wanted: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = _rms_norm_backward.registered(grad, *kept, *wanted[:2])
    return grad_x if wanted[0] else None, grad_weight if wanted[1] else None, None


_rms_norm = Op(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    reference.rms_norm,
    check=reference.check_rms_norm,
    outputs=lambda x: new(x, *x.shape),
    beside=("weight",),
    gradient=Gradient(lambda inputs, output: inputs, _through_rms_norm, in_eager=False),
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


def _add_rms_norm_grads(
    x: Tensor,
    new_residual: Tensor,
    post_weight: Tensor,
    next_weight: Tensor | None,
    wants_x: bool,
    wants_residual: bool,
    wants_post_weight: bool,
    wants_next_weight: bool,
) -> tuple[Tensor, ...]:
    return (
        grad_of(x, x, wants_x),
        grad_of(x, new_residual, wants_residual),
        grad_of(x, post_weight, wants_post_weight),
        grad_of(x, next_weight, wants_next_weight),
    )


_add_rms_norm_backward = Op(
    "add_rms_norm_backward(Tensor? grad_residual, Tensor? grad_y, Tensor x, Tensor new_residual,"
    " Tensor post_weight, Tensor? next_weight, Tensor? scale, float eps, bool wants_x,"
    " bool wants_residual, bool wants_post_weight, bool wants_next_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.add_rms_norm_backward,
    outputs=_add_rms_norm_grads,
    main="x",
    beside=("new_residual", "post_weight", "next_weight", "scale"),
    unserved=row_unserved,
    gradient=NoGradient("second derivatives are not offered"),
)


def _keep_of_add(inputs: Args, output: tuple[Tensor, Tensor]) -> Args:
    """The residual that comes out, and that which went in only for the gradient of the scale."""
    x, residual, *rest = inputs
    scale = inputs[4]
    trained = scale is not None and scale.requires_grad
    return x, output[0], *rest, residual if trained else None


def _through_add_rms_norm(
    kept: Args, wanted: tuple[bool, ...], grad_residual: Tensor | None, grad_y: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, new_residual, *rest, residual = kept
    if wanted[4]:  # the layer scalar, which is a buffer in Gemma 4; at 0 the output tells nothing
        given = x, residual, *rest
        return _add_rms_norm.differentiate_twin(given, wanted, (grad_residual, grad_y))
    if rest[1] is None:
        grad_y = None  # of nothing
    grads = _add_rms_norm_backward.registered(
        grad_residual, grad_y, x, new_residual, *rest, *wanted[:4]
    )
    found = [grad if want else None for grad, want in zip(grads, wanted, strict=False)]
    return *found, None, None


_add_rms_norm = Op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor post_weight, Tensor? next_weight,"
    " Tensor? scale, float eps) -> (Tensor, Tensor)",
    reference.add_rms_norm,
    check=reference.check_add_rms_norm,
    outputs=_residual_and_y,
    beside=("residual", "post_weight", "next_weight", "scale"),
    gradient=Gradient(_keep_of_add, _through_add_rms_norm, in_eager=False),
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
