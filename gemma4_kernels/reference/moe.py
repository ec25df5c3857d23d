"""Twins and checks of `ops/moe.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
from .mlp import geglu
from .norm import add_rms_norm, check_rms_norm, rms_norm

__all__ = [
    "moe_experts",
    "moe_experts_backward",
    "moe_experts_small",
    "moe_norm",
    "moe_open",
    "moe_route",
]


def check_moe_norm(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    check_rms_norm(x, weight)
    check_beside("scale", scale, "x", x, x.shape[-1:])


def moe_norm(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    router_x = rms_norm(x, None, eps) * scale * max(x.shape[-1], 1) ** -0.5
    return rms_norm(x, weight, eps), router_x.contiguous()


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
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor
) -> None:
    _check_experts(x, gate_up, down)
    check_integral("experts", experts)
    check_same_device("experts", experts, "x", x)
    if experts.ndim != 2 or experts.shape[0] != x.shape[0]:
        raise ValueError(f"experts must be [{x.shape[0]}, K], got {list(experts.shape)}")
    check_beside("weights", weights, "x", x, experts.shape)


def _check_experts(x: Tensor, gate_up: Tensor, down: Tensor) -> None:
    check_floating("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, D], got {list(x.shape)}")
    if gate_up.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"gate_up must be torch.float32 or of the dtype of x, {x.dtype}, got {gate_up.dtype}"
        )
    check_same_device("gate_up", gate_up, "x", x)
    check_like("down", down, "gate_up", gate_up)
    if down.ndim != 3:
        raise ValueError(f"down must be [E, D, F], got {list(down.shape)}")
    num_experts, width, hidden = down.shape
    if width != x.shape[1]:
        raise ValueError(f"down must be [E, {x.shape[1]}, F], got [E, {width}, F]")
    check_shape("gate_up", gate_up, (num_experts, 2 * hidden, width))


def moe_experts(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    order, runs = _by_expert(experts_TK, down_EDF.shape[0])
    tokens = order // experts_TK.shape[1]
    x_sorted, weights = x_TD[tokens], weights_TK.flatten()[order, None]
    out_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, weights.dtype))
    for e, run in runs:
        gate_up, down = gate_up_E2FD[e].to(x_TD.dtype), down_EDF[e].to(x_TD.dtype)
        hidden = geglu(F.linear(x_sorted[run], gate_up))
        # A token meets an expert at most once, so each index_add_ is free of order.
        out_TD.index_add_(0, tokens[run], finite(F.linear(hidden, down)) * weights[run])
    return finite(out_TD.to(x_TD.dtype))


def moe_experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and weights, expert by expert, activations recomputed."""
    order, runs = _by_expert(experts_TK, down_EDF.shape[0])
    tokens = order // experts_TK.shape[1]
    weights = weights_TK.flatten()[order, None]
    dx, d_gate_up, d_down = (t.new_zeros(t.shape) for t in (x_TD, gate_up_E2FD, down_EDF))
    d_weights = weights_TK.new_zeros(weights_TK.numel())
    for e, run in runs:
        x, dy = x_TD[tokens[run]], grad_TD[tokens[run]]
        gate_up, down = gate_up_E2FD[e].to(x.dtype), down_EDF[e].to(x.dtype)
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        act = F.gelu(gate, approximate="tanh")
        product = act * up
        hidden = finite(product)
        d_weights[order[run]] = (dy * F.linear(hidden, down)).sum(-1).to(d_weights.dtype)
        dy = (dy * weights[run]).to(x.dtype)
        d_down[e] = dy.T @ hidden
        d_hidden = dy @ down
        if hidden is not product:  # what was held back passes nothing on
            d_hidden = d_hidden.masked_fill(product.isinf(), 0.0)
        d_gate = torch.ops.aten.gelu_backward(d_hidden * up, gate, approximate="tanh")
        d_pair = torch.cat([d_gate, d_hidden * act], -1)
        d_gate_up[e] = d_pair.T @ x
        dx.index_add_(0, tokens[run], d_pair @ gate_up)
    return dx, d_gate_up, d_down, d_weights.view_as(weights_TK)


def check_moe_open(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    norm_weight: Tensor,
    gate_up: Tensor,
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
    for name, weight in (("gate_up", gate_up), ("router", router)):
        check_like(name, weight, "x", x)
        if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(f"{name} must be [N, {x.shape[1]}], got {list(weight.shape)}")
    if gate_up.shape[0] % 2:
        raise ValueError(f"gate_up must have an even height, got {list(gate_up.shape)}")


def moe_open(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    norm_weight: Tensor,
    gate_up: Tensor,
    expert_weight: Tensor,
    router_scale: Tensor,
    router: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new_residual, y = add_rms_norm(x, residual, post_weight, norm_weight, None, eps)
    hidden = geglu(F.linear(y.to(gate_up.dtype), gate_up))
    expert_x, router_x = moe_norm(new_residual, expert_weight, router_scale, eps)
    return hidden, F.linear(router_x.to(router.dtype), router), expert_x, new_residual


def check_moe_experts_small(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    logits: Tensor,
    per_expert_scale: Tensor,
    k: int,
    dense_x: Tensor,
    dense: Tensor,
) -> None:
    _check_experts(x, gate_up, down)
    check_beside("logits", logits, "x", x, (x.shape[0], down.shape[0]))
    check_moe_route(logits, per_expert_scale, k)
    check_like("dense", dense, "x", x)
    if dense.ndim != 2 or dense.shape[0] != x.shape[1]:
        raise ValueError(f"dense must be [{x.shape[1]}, N], got {list(dense.shape)}")
    check_like("dense_x", dense_x, "x", x)
    check_shape("dense_x", dense_x, (x.shape[0], dense.shape[1]))


def moe_experts_small(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    logits: Tensor,
    per_expert_scale: Tensor,
    k: int,
    dense_x: Tensor,
    dense: Tensor,
) -> tuple[Tensor, Tensor]:
    weights, experts = moe_route(logits, per_expert_scale, k)
    return moe_experts(x, gate_up, down, experts, weights), F.linear(dense_x, dense)
