"""What routes tokens to experts, and the experts."""

import torch
from torch import Tensor

from ..autocast import cast, product_dtype
from ..opset import HALF, Args, Gradient, NoGradient, Op, new
from ..reference import moe as reference


def _y_and_router_x(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return new(x, *x.shape), new(x, *x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))


_moe_norm = Op(
    "moe_norm(Tensor x, Tensor weight, Tensor scale, float eps) -> (Tensor, Tensor)",
    reference.moe_norm,
    check=reference.check_moe_norm,
    outputs=_y_and_router_x,
    beside=("weight", "scale"),
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


def _experts_unserved(gate_up: Tensor, down: Tensor) -> str | None:
    if down.ndim < 2 or down.shape[-2] % 8 or down.shape[-1] % 8:
        return f"it is for widths that are multiples of 8, got {tuple(down.shape[-2:])}"
    if not (gate_up.is_contiguous() and down.is_contiguous()):
        return "gate_up and down are not contiguous"
    if any(w.storage_offset() * w.itemsize % 16 for w in (gate_up, down)):
        return "gate_up and down do not begin on a multiple of 16 bytes"
    return None


def _like_each(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, d_gate_up = new(x, *x.shape), new(gate_up, *gate_up.shape)
    return dx, d_gate_up, new(down, *down.shape), new(weights, *weights.shape)


_moe_experts_backward = Op(
    "moe_experts_backward(Tensor grad, Tensor x, Tensor gate_up, Tensor down, Tensor experts,"
    " Tensor weights) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.moe_experts_backward,
    outputs=_like_each,
    gradient=NoGradient("second derivatives are not offered"),
)


def _backward(kept: Args, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, d_gate_up, d_down, d_weights = _moe_experts_backward.registered(grad, *kept)
    return dx, d_gate_up, d_down, None, d_weights


_moe_experts = Op(
    "moe_experts(Tensor x, Tensor gate_up, Tensor down, Tensor experts, Tensor weights) -> Tensor",
    reference.moe_experts,
    check=reference.check_moe_experts,
    outputs=lambda x: new(x, *x.shape),
    dtypes=HALF,
    beside=("weights",),
    unserved=_experts_unserved,
    gradient=Gradient(lambda inputs, output: inputs, _backward),
)


def moe_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """Σ_k weights[:, k] · down[e] geglu(gate_up[e] x) with e = experts[:, k].

    x [T, D]; gate_up [E, 2F, D], gate rows first; down [E, D, F]; experts [T, K] integers, each
    token's distinct, -1 and E meaning "skip" (an expert that lives elsewhere); weights [T, K].
    gate_up and down have the dtype of x or are fp32, then rounded to it, each expert when it is
    multiplied. Under autocast x is multiplied in its dtype.
    Returns [T, D] in the dtype of x. Work is done for the experts that are chosen alone. In fp16
    what `geglu` and each product make is held within ±65504. For any other expert the eager twin
    raises ValueError; a kernel, which waits for no device, skips it.
    """
    product = product_dtype(x)
    if product is None:
        return _moe_experts(x, gate_up, down, experts, weights)
    (narrow,) = cast(product, x)
    if isinstance(gate_up, Tensor) and gate_up.dtype != torch.float32:
        gate_up, down = cast(product, gate_up, down)
    return _moe_experts(narrow, gate_up, down, experts, weights).to(x.dtype)
