"""What routes tokens to experts, and the experts."""

import torch
from torch import Tensor

from ..autocast import cast, product_dtype
from ..opset import HALF, Args, Gradient, NoGradient, Op, new
from ..packed import PackedWeight
from ..reference import moe as reference
from ..reference.moe import is_packed, shape_of
from .linear import (
    MOST_NORMED_ELEMENTS,
    MOST_NORMED_WIDTH,
    MOST_TOKENS,
    lies_ready,
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


def _packed_unserved(**weights: reference.Parts) -> str | None:
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
        return _packed_unserved(gate_up=gate_up_parts, down=down_parts)
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
    want_x: bool,
    want_gate_up: bool,
    want_down: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (x, want_x), (gate_up, want_gate_up), (down, want_down), (weights, want_weights)
    dx, d_gate_up, d_down, d_weights = (new(t, *(t.shape if want else (0,))) for t, want in wanted)
    return dx, d_gate_up, d_down, d_weights


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


_EXPERTS = (
    "Tensor x, Tensor gate_up, Tensor? gate_up_scales, Tensor? gate_up_row_scales, Tensor down,"
    " Tensor? down_scales, Tensor? down_row_scales"
)

_moe_experts_backward = Op(
    f"moe_experts_backward(Tensor grad, {_EXPERTS}, Tensor experts, Tensor weights, bool want_x,"
    " bool want_gate_up, bool want_down, bool want_weights) -> (Tensor, Tensor, Tensor, Tensor)",
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
    f"moe_experts({_EXPERTS}, Tensor experts, Tensor weights) -> Tensor",
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


# As kMostSmallExperts and kMostSmallAssignments of csrc/moe/ops.h.
MOST_SMALL_EXPERTS, MOST_SMALL_ASSIGNMENTS = 128, 128


def _open_unserved(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    norm_weight: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_row_scales: Tensor | None,
    expert_weight: Tensor,
    router_scale: Tensor,
    router: Tensor,
) -> str | None:
    parts = gate_up, gate_up_scales, gate_up_row_scales
    shape, row_step = shape_of(parts), 32 if is_packed(parts) else 16
    if x.ndim != 2 or len(shape) != 2 or router.ndim != 2:
        return "it is for x [T, D], gate_up [2F, D] and router [E, D]"
    tokens, width = x.shape
    if tokens > MOST_TOKENS or width > MOST_NORMED_WIDTH or tokens * width > MOST_NORMED_ELEMENTS:
        most = f"{MOST_TOKENS} tokens, {MOST_NORMED_WIDTH} columns and {MOST_NORMED_ELEMENTS}"
        return f"it is for at most {most} elements, got {list(x.shape)}"
    if width % 8 or shape[0] % row_step or router.shape[0] % 8:
        shapes = f"{list(shape)} and {list(router.shape)}"
        return f"it is for widths that are multiples of 8, got {shapes}"
    rows = (residual, post_weight, norm_weight, expert_weight, router_scale, router)
    if any(t.dtype != x.dtype for t in rows) or not (is_packed(parts) or gate_up.dtype == x.dtype):
        return f"it is for tensors of the dtype of x, {x.dtype}, alone"
    if not (lies_ready(gate_up) and lies_ready(router)):
        return "gate_up or router is not contiguous, or does not begin on a multiple of 16 bytes"
    return packed_unserved("gate_up", *parts) if is_packed(parts) else None


def _opened(
    x: Tensor, residual: Tensor, gate_up: Tensor, router: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, wide = x.shape[0], torch.promote_types(x.dtype, residual.dtype)
    rows = shape_of((gate_up, None, None))[0]
    hidden, logits = new(x, tokens, rows // 2), new(x, tokens, router.shape[0])
    return hidden, logits, new(x, *x.shape, dtype=wide), new(x, *x.shape, dtype=wide)


_moe_open = Op(
    "moe_open(Tensor x, Tensor residual, Tensor post_weight, Tensor norm_weight, Tensor gate_up,"
    " Tensor? gate_up_scales, Tensor? gate_up_row_scales, Tensor expert_weight,"
    " Tensor router_scale, Tensor router, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.moe_open,
    check=reference.check_moe_open,
    outputs=_opened,
    dtypes=HALF,
    beside=("residual", "post_weight", "norm_weight", "expert_weight", "router_scale"),
    unserved=_open_unserved,
)


def moe_open(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    norm_weight: Tensor,
    gate_up: Tensor | PackedWeight,
    expert_weight: Tensor,
    router_scale: Tensor,
    router: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What opens both branches of a layer with experts, for up to 16 tokens.

    r = residual + rms_norm(x, post_weight); hidden = geglu(rms_norm(r, norm_weight) gate_upᵀ);
    expert_x, router_x = moe_norm(r, expert_weight, router_scale); logits = router_x routerᵀ.

    x, residual [T, D]; gate_up [2F, D], gate rows first; router [E, D]; the other weights [D]; eps
    as in `rms_norm`. x, gate_up and router have one floating dtype, and under autocast are cast to
    its dtype; or gate_up is packed. The others may be of any. Returns (hidden [T, F], logits
    [T, E], expert_x [T, D], r [T, D]), the first two in the dtype of x, the others in the one that
    x and residual promote to. A kernel reads every weight once, and a token's bits do not depend on
    the others.
    """
    dtype = product_dtype(x)
    if dtype is not None:
        x, router = cast(dtype, x, router)
        if isinstance(gate_up, Tensor):
            (gate_up,) = cast(dtype, gate_up)
    opening = x, residual, post_weight, norm_weight, *parts_of(gate_up)
    return _moe_open(*opening, expert_weight, router_scale, router, eps)


def _experts_small_unserved(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_row_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    down_row_scales: Tensor | None,
    logits: Tensor,
    k: int,
    dense_x: Tensor,
    dense: Tensor,
    dense_scales: Tensor | None,
    dense_row_scales: Tensor | None,
) -> str | None:
    weights = {
        "gate_up": (gate_up, gate_up_scales, gate_up_row_scales),
        "down": (down, down_scales, down_row_scales),
        "dense": (dense, dense_scales, dense_row_scales),
    }
    all_packed = all(map(is_packed, weights.values()))
    if any(map(is_packed, weights.values())):
        if reason := _packed_unserved(**weights):
            return reason
        if (gate_up.dtype == torch.uint8) != (dense.dtype == torch.uint8):
            return "it is for gate_up and dense whose codes have as many bits"
    down_shape, dense_shape = shape_of(weights["down"]), shape_of(weights["dense"])
    if x.ndim != 2 or len(down_shape) != 3 or len(dense_shape) != 2:
        return "it is for x [T, D], down [E, D, F] and dense [D, N]"
    tokens, num_experts = x.shape[0], down.shape[0]
    if (
        tokens > MOST_TOKENS
        or tokens * k > MOST_SMALL_ASSIGNMENTS
        or num_experts > MOST_SMALL_EXPERTS
        or k > MOST_ROUTES
    ):
        most = f"{MOST_TOKENS} tokens, {MOST_SMALL_ASSIGNMENTS} assignments, {MOST_SMALL_EXPERTS}"
        got = f"{tokens} tokens and {k} of {num_experts} experts"
        return f"it is for at most {most} experts and k = {MOST_ROUTES}, got {got}"
    if any(n % 8 for n in (*down_shape[1:], dense_shape[1])) or not down_shape[2]:
        shapes = f"{list(down_shape)} and {list(dense_shape)}"
        return f"it is for widths that are multiples of 8, got {shapes}"
    floats = (logits, dense_x) if all_packed else (logits, dense_x, gate_up, down, dense)
    if any(t.dtype != x.dtype for t in floats):
        return f"it is for tensors of the dtype of x, {x.dtype}, alone"
    if not all(map(lies_ready, (gate_up, down, dense))):
        return "a weight is not contiguous, or does not begin on a multiple of 16 bytes"
    return None


_moe_experts_small = Op(
    f"moe_experts_small({_EXPERTS}, Tensor logits, Tensor per_expert_scale, int k, Tensor dense_x,"
    " Tensor dense, Tensor? dense_scales, Tensor? dense_row_scales) -> (Tensor, Tensor)",
    reference.moe_experts_small,
    check=reference.check_moe_experts_small,
    outputs=lambda x: (new(x, *x.shape), new(x, *x.shape)),
    dtypes=HALF,
    beside=("logits", "per_expert_scale"),
    unserved=_experts_small_unserved,
    gradient=NoGradient("it is for decoding; use moe_route and moe_experts for training"),
)


def moe_experts_small(
    x: Tensor,
    gate_up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    logits: Tensor,
    per_expert_scale: Tensor,
    k: int,
    dense_x: Tensor,
    dense: Tensor | PackedWeight,
) -> tuple[Tensor, Tensor]:
    """The experts of up to 16 tokens with the choice among them, and the dense branch beside them.

    y = moe_experts(x, gate_up, down, experts, weights) of the experts and weights that
    moe_route(logits, per_expert_scale, k) chooses; dense_y = dense_x denseᵀ.

    x, gate_up and down as in `moe_experts`; logits and per_expert_scale as in `moe_route`; dense_x
    [T, N] in the dtype of x, and dense [D, N] in it or packed. Under autocast all but the routing
    is cast to its dtype. Returns (y, dense_y), each [T, D] in the dtype of x. There is a kernel
    where all three weights are packed or none is; it reads every touched weight once, and a token's
    bits do not depend on the others.
    """
    dtype = product_dtype(x)
    if dtype is not None:
        x, dense_x = cast(dtype, x, dense_x)
        gate_up, down, dense = (
            cast(dtype, w)[0] if isinstance(w, Tensor) else w for w in (gate_up, down, dense)
        )
    matrices = *parts_of(gate_up), *parts_of(down)
    routing = logits, per_expert_scale, k
    return _moe_experts_small(x, *matrices, *routing, dense_x, *parts_of(dense))


def moe_small_pays(
    opening: tuple[Tensor | PackedWeight, ...],
    experts: tuple[Tensor | PackedWeight, Tensor | PackedWeight],
    k: int,
    dense: Tensor | PackedWeight,
) -> bool:
    """Whether `moe_open` of these, up to eps, and `moe_experts_small` behind it are no slower than
    their parts; experts: gate_up and down."""
    x, *norms, gate_up, expert_weight, router_scale, router = opening
    assert isinstance(x, Tensor) and isinstance(router, Tensor)
    logits, dense_x = new(x, x.shape[0], router.shape[0]), new(x, x.shape[0], dense.shape[-1])
    opens = x, *norms, *parts_of(gate_up), expert_weight, router_scale, router
    matrices = *parts_of(experts[0]), *parts_of(experts[1])
    routing = logits, logits, k
    return _moe_open.pays(opens) and _moe_experts_small.pays(
        (x, *matrices, *routing, dense_x, *parts_of(dense))
    )
