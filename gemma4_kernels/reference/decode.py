"""Twins and checks of `ops/decode.py`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..e4m3 import check_scales, from_e4m3, to_e4m3
from .attention import check_heads
from .common import check_same_device, check_shape
from .rope import check_qkv_norm_rope, qkv_norm_rope
from .scores import (
    grouped,
    keys_on_pages,
    masked_scores,
    ring_spans,
    softmax_and_lse,
    ungrouped,
    visible_keys,
    visible_mask,
)

__all__ = ["attention_decode", "qkv_attention_decode"]

# Of each sequence and KV head in `qkv_attention_decode`.
COUNTERS = 9


def check_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    seq_lens: Tensor,
    block_table: Tensor | None,
    window: int,
    ring: bool,
) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, N, H, C], got {list(q.shape)}")
    if k_cache.ndim != 4:
        raise ValueError(f"k_cache must be 4-d, got {list(k_cache.shape)}")
    coded = check_scales(k_cache, v_cache, k_scales, v_scales)
    check_heads(q, k_cache, v_cache, block_table, window, "k_cache", "v_cache", coded)
    if seq_lens.dtype != torch.int32:
        raise TypeError(f"seq_lens must be int32, got {seq_lens.dtype}")
    check_same_device("seq_lens", seq_lens, "q", q)
    check_shape("seq_lens", seq_lens, q.shape[:1])
    rows, rows_name = (k_cache, "k_cache") if block_table is None else (block_table, "block_table")
    if rows.shape[0] != q.shape[0]:
        raise ValueError(
            f"{rows_name} must have one row per sequence, {q.shape[0]}, got {rows.shape[0]}"
        )
    if ring:
        if block_table is not None:
            raise ValueError("a ring cache takes no block_table")
        need = window + q.shape[1] - 1
        if window <= 0 or need > k_cache.shape[1]:
            raise ValueError(
                f"a ring cache needs a window and window + new tokens - 1 slots, "
                f"got window {window} and {k_cache.shape[1]} slots for {q.shape[1]} new tokens"
            )


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
    # Codes are no longer exact in a narrow dtype once they are scaled.
    fused = q_BNHC.is_cpu and not softcap and not return_lse and k_scales is None
    acc = torch.promote_types(q_BNHC.dtype, torch.float32)
    _, num_new, heads, _ = q_BNHC.shape
    kv_heads = k_cache.shape[2]
    page_size = k_cache.shape[1]
    room = page_size if block_table is None else page_size * block_table.shape[1]
    lse_shape = (q_BNHC.shape[0], heads, num_new if return_lse else 0)
    out = torch.zeros_like(q_BNHC, memory_format=torch.contiguous_format)
    lse_BHN = q_BNHC.new_full(lse_shape, -math.inf, dtype=acc)
    lengths = seq_lens.tolist()
    groups = [(slice(b, b + 1), length) for b, length in enumerate(lengths)]
    if fused and block_table is None and len(set(lengths)) == 1 and lengths[0] >= num_new:
        groups = [(slice(0, len(lengths)), lengths[0])]  # one call, as for most decoding on a CPU
    for rows, length in groups:
        b = rows.start
        if length == 0:
            continue
        if length < 0 or (length > room and not ring):
            whose = "the cache" if block_table is None else "block_table"
            raise ValueError(f"seq_lens[{b}] must lie in 0..{room}, {whose}'s keys, got {length}")
        first = length - num_new
        lo, hi = visible_keys(first, length, length, window, 0)
        mask = visible_mask(first, length, lo, hi, window, 0, q_BNHC.device)
        where = rows, lo, hi, block_table, ring
        ks, vs = _visible(k_cache, *where), _visible(v_cache, *where)
        if fused and first >= 0:
            k, v = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in (ks, vs))
            out[rows] = F.scaled_dot_product_attention(
                q_BNHC[rows].transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                mask,
                scale=scale,
                enable_gqa=kv_heads != heads,
            ).transpose(1, 2)
            continue
        if k_scales is None or v_scales is None:
            ks, vs = ([x[0].to(acc) for x in xs] for xs in (ks, vs))
        else:
            pairs = (ks, _visible(k_scales, *where)), (vs, _visible(v_scales, *where))
            ks, vs = (
                [from_e4m3(x[0], scales[0], acc) for x, scales in zip(*pair, strict=True)]
                for pair in pairs
            )
        q = grouped(q_BNHC[b].to(acc), kv_heads)
        scores = [masked_scores(q, k, None, scale, softcap) for k in ks]
        s = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
        if mask is not None:
            s = s.masked_fill(~mask, -math.inf)
        p, lse = softmax_and_lse(s)
        parts = p.flatten(1, 2).split([len(v) for v in vs], -1)
        o = torch.matmul(parts[0], vs[0].transpose(0, 1))
        if len(vs) == 2:
            o = o + torch.matmul(parts[1], vs[1].transpose(0, 1))
        out[b] = ungrouped(o.view(q.shape))
        if return_lse:
            lse_BHN[b] = lse.flatten(0, 1)
    return out, lse_BHN


def _visible(
    cache: Tensor, rows: slice, lo: int, hi: int, block_table: Tensor | None, ring: bool
) -> list[Tensor]:
    """Keys lo..hi - 1 of the rows, [B, S, ...]: views, where they are not pages out of order. A
    wrapped ring is two of them."""
    size = cache.shape[1]
    if block_table is None:
        spans = ring_spans(size, lo, hi) if ring else [slice(lo, hi)]
        return [cache[rows, span] for span in spans]
    skipped = lo // size
    pages = block_table[rows.start, skipped : -(-hi // size)].tolist()
    seen = slice(lo - skipped * size, None)
    return [keys_on_pages(cache, pages, hi - skipped * size)[None, seen]]


def check_qkv_attention_decode(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    seq_lens: Tensor,
    block_table: Tensor | None,
    counters: Tensor,
    window: int,
    ring: bool,
) -> None:
    check_qkv_norm_rope(q, k, v, q_weight, k_weight, positions, inv_freq)
    decode = (k_cache, v_cache, k_scales, v_scales, seq_lens, block_table, window, ring)
    check_attention_decode(q.unsqueeze(1), *decode)
    kv_heads = k_cache.shape[2]
    if k is not None and k.shape[1] != kv_heads:
        raise ValueError(f"k must have the heads of k_cache, {kv_heads}, got {k.shape[1]}")
    if counters.dtype != torch.int32:
        raise TypeError(f"counters must be int32, got {counters.dtype}")
    check_same_device("counters", counters, "q", q)
    check_shape("counters", counters, (q.shape[0], kv_heads, COUNTERS))
    if not counters.is_contiguous():
        raise ValueError("counters must be contiguous")


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
    rope = q_weight, k_weight, positions_B, inv_freq, eps
    q_BHC, new_k_BGC, new_v_BGC = qkv_norm_rope(q_BHC, k_BGC, v_BGC, *rope)
    if k_BGC is not None:
        rows, outer, inner = _newest(k_cache, seq_lens, block_table, ring)
        for cache, scales, new in ((k_cache, k_scales, new_k_BGC), (v_cache, v_scales, new_v_BGC)):
            if scales is None:
                cache[outer, inner] = new[rows]
            else:
                cache[outer, inner], scales[outer, inner] = to_e4m3(new[rows])
    cache_of = k_cache, v_cache, k_scales, v_scales, seq_lens, block_table
    options = scale, window, ring, softcap, False
    out, _ = attention_decode(q_BHC.unsqueeze(1), *cache_of, *options)
    return out.squeeze(1)


def _newest(
    cache: Tensor, seq_lens: Tensor, block_table: Tensor | None, ring: bool
) -> list[Tensor]:
    """The rows whose newest key has a place, and its index in the cache's first two dimensions."""
    size = cache.shape[1]
    room = size if block_table is None else size * block_table.shape[1]
    newest = [length - 1 for length in seq_lens.tolist()]
    rows = [b for b, p in enumerate(newest) if p >= 0 and (ring or p < room)]
    outer = rows
    if block_table is not None:
        outer = [int(block_table[b, newest[b] // size]) for b in rows]
    inner = [newest[b] % size for b in rows]
    return [torch.tensor(x, dtype=torch.int64, device=cache.device) for x in (rows, outer, inner)]
