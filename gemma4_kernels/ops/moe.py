"""What routes tokens to experts, and the experts."""

import torch
from torch import Tensor

from ..autocast import cast, product_dtype
from ..opset import HALF, Args, Gradient, NoGradient, Op, new
from ..packed import PackedWeight
from ..reference import moe as reference
from ..reference.moe import is_packed
from .linear import (
    packed_unserved,
    parts_of,
)
from .norm import grad_of, row_unserved


def _y_and_router_x(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return new(x, *x.shape), new(x, *x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))


_moe_norm_backward = Op(
    "moe_norm_backward(Tensor? grad_y, Tensor? grad_router_x, Tensor x, Tensor weight,"
    " Tensor scale, float eps, bool wants_x, bool wants_weight, bool wants_scale)"
    " -> (Tensor, Tensor, Tensor)",
    reference.moe_norm_backward,
    outputs=lambda x, weight, scale, wants_x, wants_weight, wants_scale: (
        grad_of(x, x, wants_x),
        grad_of(x, weight, wants_weight),
        grad_of(x, scale, wants_scale),
    ),
    main="x",
    beside=("weight", "scale"),
    unserved=row_unserved,
    gradient=NoGradient("second derivatives are not offered"),
)


def _through_moe_norm(
    kept: Args, wanted: tuple[bool, ...], *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    found = _moe_norm_backward.registered(*grads, *kept, *wanted[:3])
    return *(grad if want else None for grad, want in zip(found, wanted, strict=False)), None


_moe_norm = Op(
    "moe_norm(Tensor x, Tensor weight, Tensor scale, float eps) -> (Tensor, Tensor)",
    reference.moe_norm,
    check=reference.check_moe_norm,
    outputs=_y_and_router_x,
    beside=("weight", "scale"),
    gradient=Gradient(lambda inputs, output: inputs, _through_moe_norm, in_eager=False),
)


def moe_norm(x: Tensor, weight: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """What the experts and what their router's projection read of the same x.

    y = rms_norm(x, weight); router_x = rms_norm(x) scale D^-½, rounded after each of its products.

    x [..., D]; weight, scale [D], each of a floating dtype; eps as in `rms_norm`. Returns
    (y, router_x), each [..., D]: y in the dtype of x, router_x in the one that x and scale promote
    to.
    """
    return _moe_norm(x, weight, scale, eps)


# As kMostRoutedExperts and kMostRoutes of csrc/moe/ops.h, which hold for every caller.
MOST_EXPERTS, MOST_ROUTES = 512, 32


def _routes(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    shape = (logits.shape[0], k)
    return new(logits, *shape, dtype=dtype), new(logits, *shape, dtype=torch.int32)


def _routes_unserved(logits: Tensor, k: int) -> str | None:
    if logits.ndim != 2 or logits.shape[1] > MOST_EXPERTS or k > MOST_ROUTES:
        most = f"{MOST_EXPERTS} experts and k = {MOST_ROUTES}"
        return f"it is for at most {most}, got logits {list(logits.shape)} and {k}"
    return None


_moe_route = Op(
    "moe_route(Tensor logits, Tensor per_expert_scale, int k) -> (Tensor, Tensor)",
    reference.moe_route,
    check=reference.check_moe_route,
    outputs=_routes,
    beside=("per_expert_scale",),
    unserved=_routes_unserved,
)


def moe_route(logits: Tensor, per_expert_scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of each token and their weights.

    p = softmax(logits) over all experts in fp32; the k largest (ties: the lower index) are divided
    by their sum and multiplied by per_expert_scale.

    logits [T, E], per_expert_scale [E], each of a floating dtype. Returns weights [T, K] fp32
    (fp64 for fp64 logits) and experts [T, K] int32.
    """
    return _moe_route(logits, per_expert_scale, k)


def packed_experts_unserved(**weights: reference.Parts) -> str | None:
    """Why no kernel reads these weights beside each other."""
    if not all(map(is_packed, weights.values())):
        *others, last = weights
        return f"it is for {', '.join(others)} and {last} that are all packed or all dense"
    for name, parts in weights.items():
        if reason := packed_unserved(name, *parts):
            return reason
    return None


def _experts_unserved(
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_row_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    down_row_scales: Tensor | None,
) -> str | None:
    gate_up_parts = gate_up, gate_up_scales, gate_up_row_scales
    down_parts = down, down_scales, down_row_scales
    if is_packed(gate_up_parts) or is_packed(down_parts):
        return packed_experts_unserved(gate_up=gate_up_parts, down=down_parts)
    if down.ndim < 2 or down.shape[-2] % 8 or down.shape[-1] % 8:
        return f"it is for widths that are multiples of 8, got {tuple(down.shape[-2:])}"
    if not (gate_up.is_contiguous() and down.is_contiguous()):
        return "gate_up and down are not contiguous"
    if any(w.storage_offset() * w.itemsize % 16 for w in (gate_up, down)):
        return "gate_up and down do not begin on a multiple of 16 bytes"
    return None


def _gradients(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    wants_x: bool,
    wants_gate_up: bool,
    wants_down: bool,
    wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        grad_of(x, x, wants_x),
        grad_of(gate_up, gate_up, wants_gate_up),
        grad_of(down, down, wants_down),
        grad_of(weights, weights, wants_weights),
    )


def _backward_unserved(
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_row_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    down_row_scales: Tensor | None,
) -> str | None:
    parts = (gate_up, gate_up_scales, gate_up_row_scales), (down, down_scales, down_row_scales)
    if any(map(is_packed, parts)):
        return "it is for gate_up and down that are dense"
    return _experts_unserved(*parts[0], *parts[1])


EXPERTS = (
    "Tensor x, Tensor gate_up, Tensor? gate_up_scales, Tensor? gate_up_row_scales, Tensor down,"
    " Tensor? down_scales, Tensor? down_row_scales"
)

_moe_experts_backward = Op(
    f"moe_experts_backward(Tensor grad, {EXPERTS}, Tensor experts, Tensor weights, bool wants_x,"
    " bool wants_gate_up, bool wants_down, bool wants_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.moe_experts_backward,
    outputs=_gradients,
    dtypes=HALF,
    beside=("weights",),
    unserved=_backward_unserved,
    gradient=NoGradient("second derivatives are not offered"),
)


def _backward(kept: Args, wanted: tuple[bool, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    differentiable = 0, 1, 4, 8  # x, gate_up, down, weights
    made = _moe_experts_backward.registered(grad, *kept, *(wanted[i] for i in differentiable))
    gradients = dict(zip(differentiable, made, strict=True))
    return tuple(gradients[i] if want else None for i, want in enumerate(wanted))


_moe_experts = Op(
    f"moe_experts({EXPERTS}, Tensor experts, Tensor weights) -> Tensor",
    reference.moe_experts,
    check=reference.check_moe_experts,
    outputs=lambda x: new(x, *x.shape),
    dtypes=HALF,
    beside=("weights",),
    unserved=_experts_unserved,
    gradient=Gradient(lambda inputs, output: inputs, _backward),
)


def moe_experts(
    x: Tensor,
    gate_up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    experts: Tensor,
    weights: Tensor,
) -> Tensor:
    """Σ_k weights[:, k] · down[e] geglu(gate_up[e] x) with e = experts[:, k].

    x [T, D]; gate_up [E, 2F, D], gate rows first; down [E, D, F]; experts [T, K] integers, each
    token's distinct, -1 and E meaning "skip" (an expert that lives elsewhere); weights [T, K].
    gate_up and down have the dtype of x or are fp32, or each is packed; they are rounded to the
    dtype of x, each expert when it is multiplied. Packed ones have no gradient, and a kernel only
    if both are. Under autocast x is multiplied in its dtype.
    Returns [T, D] in the dtype of x. Work is done for the experts that are chosen alone, in the
    backward too, which makes gate_up x again and no gradient that is not wanted. In fp16 what
    `geglu` and each product make is held within ±65504. For any other expert the eager twin
    raises ValueError; a kernel, which waits for no device, skips it.
    """
    product = product_dtype(x)
    if product is None:
        return _moe_experts(x, *parts_of(gate_up), *parts_of(down), experts, weights)
    (narrow,) = cast(product, x)
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dtype != torch.float32:
        gate_up, down = cast(product, gate_up, down)
    matrices = *parts_of(gate_up), *parts_of(down)
    return _moe_experts(narrow, *matrices, experts, weights).to(x.dtype)
