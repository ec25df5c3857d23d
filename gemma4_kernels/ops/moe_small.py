"""A layer with experts on up to 16 tokens, in two launches."""

import torch
from torch import Tensor

from ..autocast import cast, product_dtype
from ..opset import HALF, NoGradient, Op, new
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
from .moe import EXPERTS, MOST_ROUTES, packed_experts_unserved

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
        if reason := packed_experts_unserved(**weights):
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
    f"moe_experts_small({EXPERTS}, Tensor logits, Tensor per_expert_scale, int k, Tensor dense_x,"
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
