"""Twins and checks of `ops/moe.py`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import packed
from ..packed import PackedWeight
from .common import (
    check_beside,
    check_floating,
    check_integral,
    check_like,
    check_same_device,
    check_shape,
    extremes,
    finite,
)
from .linear import linear_packed, linear_packed_backward
from .mlp import geglu
from .norm import add_rms_norm, check_rms_norm, rms_norm, sum_of_rows, through_norm, widest

__all__ = [
    "moe_experts",
    "moe_experts_backward",
    "moe_experts_small",
    "moe_norm",
    "moe_norm_backward",
    "moe_open",
    "moe_route",
]

# A weight as a schema has it: itself, or codes, scales and row scales.
Parts = tuple[Tensor, Tensor | None, Tensor | None]


def is_packed(parts: Parts) -> bool:
    return parts[0].dtype in packed.CODES


def shape_of(parts: Parts) -> tuple[int, ...]:
    """Of the weight; codes that are none, having too few dimensions, keep their own."""
    whole = is_packed(parts) and parts[0].ndim > 2
    return PackedWeight(*parts).shape if whole else tuple(parts[0].shape)


def _check_parts(name: str, parts: Parts, x: Tensor) -> None:
    """A packed weight or a dense one, of any dtype, on the device of x."""
    weight, *scales = parts
    check_same_device(name, weight, "x", x)
    if is_packed(parts):
        packed.check(name, *parts)
    elif any(part is not None for part in scales):
        raise ValueError(
            f"{name}_scales and {name}_row_scales must come with a packed {name} alone"
        )


def _expert(parts: Parts, e: int) -> Parts:
    codes, scales, row_scales = (None if x is None else x[e] for x in parts)
    assert codes is not None
    return codes, scales, row_scales


def times(x: Tensor, parts: Parts, multiply: Callable[..., Tensor] = linear_packed) -> Tensor:
    """x weightᵀ, the weight rounded to the dtype of x; `multiply` is of packed weights."""
    return multiply(x, *parts) if is_packed(parts) else F.linear(x, parts[0].to(x.dtype))


def check_moe_norm(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    check_rms_norm(x, weight)
    check_beside("scale", scale, "x", x, x.shape[-1:])


def moe_norm(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    router_x = rms_norm(x, None, eps) * scale * max(x.shape[-1], 1) ** -0.5
    return rms_norm(x, weight, eps), router_x.contiguous()


def moe_norm_backward(
    grad_y: Tensor | None,
    grad_router_x: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
    wants_x: bool,
    wants_weight: bool,
    wants_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = widest(x, weight, scale)
    router_scale = scale.to(wide) * max(x.shape[-1], 1) ** -0.5
    grad_x = weight_rows = scale_rows = torch.zeros_like(x, dtype=wide)
    if grad_y is not None:
        grad_x, weight_rows = through_norm(grad_y.to(wide), x.to(wide), weight.to(wide), eps)
    if grad_router_x is not None:
        into, rows = through_norm(grad_router_x.to(wide), x.to(wide), router_scale, eps)
        grad_x, scale_rows = grad_x + into, rows * max(x.shape[-1], 1) ** -0.5
    return (
        grad_x.to(x.dtype).contiguous() if wants_x else x.new_empty(0),
        sum_of_rows(x, weight_rows, weight, wants_weight),
        sum_of_rows(x, scale_rows, scale, wants_scale),
    )


def check_moe_route(logits: Tensor, per_expert_scale: Tensor, k: int) -> None:
    check_floating("logits", logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [T, E], got {list(logits.shape)}")
    check_beside("per_expert_scale", per_expert_scale, "logits", logits, logits.shape[1:])
    if not (1 <= k <= logits.shape[1]):
        raise ValueError(f"k must lie in 1..E = {logits.shape[1]}, got {k}")


def moe_route(logits_TE: Tensor, per_expert_scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(logits_TE.dtype, torch.float32)
    probabilities = logits_TE.softmax(-1, dtype=acc)
    # A stable sort and not topk, which leaves the order of equal values open.
    weights, experts = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :k], experts[:, :k]
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights * per_expert_scale[experts]).to(acc), experts.int()


def _by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, list[tuple[int, slice]]]:
    """The assignments (t K + k) sorted by expert, and (e, its run) of each expert that has any."""
    flat = experts_TK.flatten().long()
    for e in extremes(flat):
        if not -1 <= e <= num_experts:
            raise ValueError(
                f"experts must lie in 0..{num_experts - 1}, or be -1 or {num_experts} for none, "
                f"got {e}"
            )
    order = flat.argsort(stable=True)
    none, *counts = (flat + 1).bincount(minlength=num_experts + 1).tolist()
    runs, begin = [], none
    for e, count in enumerate(counts[:num_experts]):
        if count:
            runs.append((e, slice(begin, begin + count)))
        begin += count
    return order, runs


def check_moe_experts(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_row_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    down_row_scales: Tensor | None,
    experts: Tensor,
    weights: Tensor,
) -> None:
    gate_up_parts = gate_up, gate_up_scales, gate_up_row_scales
    _check_experts(x, gate_up_parts, (down, down_scales, down_row_scales))
    check_integral("experts", experts)
    check_same_device("experts", experts, "x", x)
    if experts.ndim != 2 or experts.shape[0] != x.shape[0]:
        raise ValueError(f"experts must be [{x.shape[0]}, K], got {list(experts.shape)}")
    check_beside("weights", weights, "x", x, experts.shape)


def _check_experts(x: Tensor, gate_up: Parts, down: Parts) -> None:
    check_floating("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, D], got {list(x.shape)}")
    for name, parts in (("gate_up", gate_up), ("down", down)):
        dtype = parts[0].dtype
        if not is_packed(parts) and dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{name} must be torch.float32 or of the dtype of x, {x.dtype}, got {dtype}"
            )
        _check_parts(name, parts, x)
    if not is_packed(gate_up) and not is_packed(down):
        check_like("down", down[0], "gate_up", gate_up[0])
    if len(shape_of(down)) != 3:
        raise ValueError(f"down must be [E, D, F], got {list(shape_of(down))}")
    num_experts, width, hidden = shape_of(down)
    if width != x.shape[1]:
        raise ValueError(f"down must be [E, {x.shape[1]}, F], got [E, {width}, F]")
    want = num_experts, 2 * hidden, width
    if shape_of(gate_up) != want:
        raise ValueError(f"gate_up must have shape {list(want)}, got {list(shape_of(gate_up))}")


def moe_experts(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_row_scales: Tensor | None,
    down_EDF: Tensor,
    down_scales: Tensor | None,
    down_row_scales: Tensor | None,
    experts_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    gate_up, down = (
        (gate_up_E2FD, gate_up_scales, gate_up_row_scales),
        (down_EDF, down_scales, down_row_scales),
    )
    order, runs = _by_expert(experts_TK, down_EDF.shape[0])
    tokens = order // experts_TK.shape[1]
    x_sorted, weights = x_TD[tokens], weights_TK.flatten()[order, None]
    out_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, weights.dtype))
    for e, run in runs:
        hidden = geglu(times(x_sorted[run], _expert(gate_up, e)))
        # A token meets an expert at most once, so each index_add_ is free of order.
        out_TD.index_add_(0, tokens[run], finite(times(hidden, _expert(down, e))) * weights[run])
    return finite(out_TD.to(x_TD.dtype))


def moe_experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_row_scales: Tensor | None,
    down_EDF: Tensor,
    down_scales: Tensor | None,
    down_row_scales: Tensor | None,
    experts_TK: Tensor,
    weights_TK: Tensor,
    wants_x: bool,
    wants_gate_up: bool,
    wants_down: bool,
    wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and weights, expert by expert, activations recomputed; what is
    not wanted is empty."""
    gate_up, down = (
        (gate_up_E2FD, gate_up_scales, gate_up_row_scales),
        (down_EDF, down_scales, down_row_scales),
    )
    order, runs = _by_expert(experts_TK, shape_of(down)[0])
    tokens = order // experts_TK.shape[1]
    weights = weights_TK.flatten()[order, None]
    dx, d_gate_up, d_down, d_weights = (
        t.new_zeros(t.shape if want else 0)
        for t, want in (
            *((x_TD, wants_x), (gate_up_E2FD, wants_gate_up)),
            *((down_EDF, wants_down), (weights_TK, wants_weights)),
        )
    )
    inner = torch.promote_types(x_TD.dtype, torch.float32)
    for e, run in runs:
        x, dy = x_TD[tokens[run]], grad_TD[tokens[run]]
        gate, up = times(x, _expert(gate_up, e)).chunk(2, -1)
        act = F.gelu(gate, approximate="tanh")
        product = act * up
        hidden = finite(product)
        if wants_weights:
            out = finite(times(hidden, _expert(down, e)))
            d_weights.view(-1)[order[run]] = (dy * out.to(inner)).sum(-1).to(d_weights.dtype)
        dy = (dy * weights[run]).to(x.dtype)
        if wants_down:
            d_down[e] = dy.T @ hidden
        if not (wants_x or wants_gate_up):
            continue
        d_hidden = _times_transposed(dy, _expert(down, e))
        if hidden is not product:  # what was held back passes nothing on
            d_hidden = d_hidden.masked_fill(product.isinf(), 0.0)
        d_gate = torch.ops.aten.gelu_backward(d_hidden * up, gate, approximate="tanh")
        d_pair = torch.cat([d_gate, d_hidden * act], -1)
        if wants_gate_up:
            d_gate_up[e] = d_pair.T @ x
        if wants_x:
            dx.index_add_(0, tokens[run], _times_transposed(d_pair, _expert(gate_up, e)))
    return dx, d_gate_up, d_down, d_weights


def _times_transposed(x: Tensor, parts: Parts) -> Tensor:
    """x weight, likewise."""
    return linear_packed_backward(x, *parts) if is_packed(parts) else x @ parts[0].to(x.dtype)


def check_moe_open(
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
) -> None:
    check_floating("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, D], got {list(x.shape)}")
    check_beside("residual", residual, "x", x, x.shape)
    rows = {"post_weight": post_weight, "norm_weight": norm_weight}
    rows |= {"expert_weight": expert_weight, "router_scale": router_scale}
    for name, row in rows.items():
        check_beside(name, row, "x", x, x.shape[1:])
    gate_up_parts: Parts = gate_up, gate_up_scales, gate_up_row_scales
    for name, parts in (("gate_up", gate_up_parts), ("router", (router, None, None))):
        if not is_packed(parts):
            check_like(name, parts[0], "x", x)
        _check_parts(name, parts, x)
        shape = shape_of(parts)
        if len(shape) != 2 or shape[1] != x.shape[1]:
            raise ValueError(f"{name} must be [N, {x.shape[1]}], got {list(shape)}")
    if shape_of(gate_up_parts)[0] % 2:
        shape = shape_of(gate_up_parts)
        raise ValueError(f"gate_up must have an even height, got {list(shape)}")


def moe_open(
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
    eps: float,
    multiply: Callable[..., Tensor] = linear_packed,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new_residual, y = add_rms_norm(x, residual, post_weight, norm_weight, None, eps)
    parts = gate_up, gate_up_scales, gate_up_row_scales
    hidden = geglu(times(y.to(x.dtype), parts, multiply))
    expert_x, router_x = moe_norm(new_residual, expert_weight, router_scale, eps)
    return hidden, F.linear(router_x.to(router.dtype), router), expert_x, new_residual


def check_moe_experts_small(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_row_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    down_row_scales: Tensor | None,
    logits: Tensor,
    per_expert_scale: Tensor,
    k: int,
    dense_x: Tensor,
    dense: Tensor,
    dense_scales: Tensor | None,
    dense_row_scales: Tensor | None,
) -> None:
    gate_up_parts = gate_up, gate_up_scales, gate_up_row_scales
    _check_experts(x, gate_up_parts, (down, down_scales, down_row_scales))
    check_beside("logits", logits, "x", x, (x.shape[0], down.shape[0]))
    check_moe_route(logits, per_expert_scale, k)
    dense_parts = dense, dense_scales, dense_row_scales
    if not is_packed(dense_parts):
        check_like("dense", dense, "x", x)
    _check_parts("dense", dense_parts, x)
    shape = shape_of(dense_parts)
    if len(shape) != 2 or shape[0] != x.shape[1]:
        raise ValueError(f"dense must be [{x.shape[1]}, N], got {list(shape)}")
    check_like("dense_x", dense_x, "x", x)
    check_shape("dense_x", dense_x, (x.shape[0], shape[1]))


def moe_experts_small(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_row_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    down_row_scales: Tensor | None,
    logits: Tensor,
    per_expert_scale: Tensor,
    k: int,
    dense_x: Tensor,
    dense: Tensor,
    dense_scales: Tensor | None,
    dense_row_scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    weights, experts = moe_route(logits, per_expert_scale, k)
    matrices = gate_up, gate_up_scales, gate_up_row_scales, down, down_scales, down_row_scales
    dense_y = times(dense_x, (dense, dense_scales, dense_row_scales))
    return moe_experts(x, *matrices, experts, weights), dense_y
