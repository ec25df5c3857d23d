"""Twins that a compiler can look into: nothing in them is read on the host.

Most twins are so as they are. Here stand other forms of those that read lengths or slots, for one
decoding step of a CPU: attention walks all slots of a cache under a mask, in their order there, and
so adds up in another order than the twin. The rest stays one call of the op in a compiled graph.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear, logits, mlp, moe, norm, ple, rope

__all__ = ["TRACED"]


def _seen(seq_lens: Tensor, slots: int, window: int, ring: bool) -> Tensor:
    """Which slots the last token of each sequence sees, [B, slots]."""
    places = torch.arange(slots, dtype=torch.int32, device=seq_lens.device)
    last = seq_lens[:, None] - 1
    # A ring's slot holds the last position that is congruent to it.
    position = last - (last - places) % slots if ring else places
    seen = (position >= 0) & (position <= last)
    return seen & (position > last - window) if window else seen


def attention_decode(
    q_BNHC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    seq_lens: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: int,
    ring: bool,
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """One new token of each sequence, over rows or a ring of finite numbers."""
    if q_BNHC.shape[1] != 1 or block_table is not None or softcap or return_lse:
        raise NotImplementedError("a compiled step has one token a row, no pages and no softcap")
    if k_scales is not None:
        raise NotImplementedError("a compiled step has no cache in e4m3")
    out = F.scaled_dot_product_attention(
        q_BNHC.transpose(1, 2),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        _seen(seq_lens, k_cache.shape[1], window, ring)[:, None, None],
        scale=scale,
        enable_gqa=k_cache.shape[2] != q_BNHC.shape[2],
    )
    return out.transpose(1, 2), q_BNHC.new_empty(0)


def qkv_norm_rope_cache(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    positions_T: Tensor,
    inv_freq: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    slots_T: Tensor,
) -> Tensor:
    """Every token has its slot."""
    rope_of = q_weight, k_weight, positions_T, inv_freq, eps
    if k_scales is not None:
        raise NotImplementedError("a compiled step has no cache in e4m3")
    q, k, v = rope.qkv_norm_rope(q_THC, k_TGC, v_TGC, *rope_of)
    k_cache.flatten(0, -3).index_copy_(0, slots_T.long(), k)
    v_cache.flatten(0, -3).index_copy_(0, slots_T.long(), v)
    return q


def qkv_attention_decode(
    q_BHC: Tensor,
    k_BGC: Tensor | None,
    v_BGC: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    positions_B: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    seq_lens: Tensor,
    block_table: Tensor | None,
    counters: Tensor,
    eps: float,
    scale: float,
    window: int,
    ring: bool,
    softcap: float,
) -> Tensor:
    """Of sequences that all have a new token."""
    rope_of = q_weight, k_weight, positions_B, inv_freq, eps
    cache = k_cache, v_cache, k_scales, v_scales
    if k_BGC is None:
        q, _, _ = rope.qkv_norm_rope(q_BHC, None, None, *rope_of)
    else:
        rows, slots = k_cache.shape[:2]
        newest = seq_lens.long() - 1
        at = torch.arange(rows) * slots + (newest % slots if ring else newest)
        q = qkv_norm_rope_cache(q_BHC, k_BGC, v_BGC, *rope_of, *cache, at)
    keys = *cache, seq_lens, block_table
    out, _ = attention_decode(q[:, None], *keys, scale, window, ring, softcap, False)
    return out[:, 0]


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
    """Which experts there are to multiply is known on the host alone: they stay a call."""
    weights, experts = moe.moe_route(logits, per_expert_scale, k)
    matrices = gate_up, gate_up_scales, gate_up_row_scales, down, down_scales, down_row_scales
    routed = torch.ops.gemma4_kernels.moe_experts(x, *matrices, experts, weights)
    dense_parts = dense, dense_scales, dense_row_scales
    return routed, moe.times(dense_x, dense_parts, _multiply_packed)


def _multiply_packed(*args: Tensor | None) -> Tensor:
    """Packed weights become numbers where the op does it, a part of them at a time."""
    y: Tensor = torch.ops.gemma4_kernels.linear_packed(*args)
    return y


# By the op's name.
TRACED: Mapping[str, Callable[..., Any]] = {
    "add_rms_norm": norm.add_rms_norm,
    "attention_decode": attention_decode,
    "geglu": mlp.geglu,
    "linear_small": partial(linear.linear_small, multiply=_multiply_packed),
    "moe_experts_small": moe_experts_small,
    "moe_norm": moe.moe_norm,
    "moe_open": partial(moe.moe_open, multiply=_multiply_packed),
    "moe_route": moe.moe_route,
    "ple_embed": ple.ple_embed,
    "ple_gate": ple.ple_gate,
    "qkv_attention_decode": qkv_attention_decode,
    "qkv_norm_rope": rope.qkv_norm_rope,
    "qkv_norm_rope_cache": qkv_norm_rope_cache,
    "rms_norm": norm.rms_norm,
    "softcap": logits.softcap,
}
