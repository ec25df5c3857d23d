"""Twins and checks of `ops/attention.py`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import check_floating, check_integral, check_like, check_same_device, check_shape
from .rope import check_qkv_norm_rope, qkv_norm_rope
from .scores import (
    grouped,
    keys_on_pages,
    masked_scores,
    query_blocks,
    ring_spans,
    sequences,
    softmax_and_lse,
    ungrouped,
    visible_keys,
    visible_mask,
)

__all__ = [
    "attention_decode",
    "attention_prefill",
    "attention_prefill_backward",
    "qkv_attention_decode",
]

# Attention scores held at once by `attention_prefill`, in elements: bounds its memory whatever the
# prompt, and large enough for full-speed matrix products.
SCORE_ELEMENTS = 1 << 22
# Of each sequence and KV head in `qkv_attention_decode`.
COUNTERS = 9
# Query rows per call of torch's fused CPU attention, which blocks over keys itself.
FUSED_ROWS = 256


def _check_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    window: int,
    k_name: str = "k",
    v_name: str = "v",
) -> None:
    check_floating("q", q)
    if block_table is not None and k.ndim != 4:
        raise ValueError(
            f"with a block_table {k_name} and {v_name} must be [pages, page_size, G, C], "
            f"got {list(k.shape)}"
        )
    for name, x in ((k_name, k), (v_name, v)):
        check_like(name, x, "q", q)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name} must have the head_dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    check_shape(v_name, v, k.shape)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads <= 0 or heads % kv_heads != 0:
        raise ValueError(
            f"the query heads must be a multiple of the KV heads, got {heads} and {kv_heads} "
            f"in q and {k_name}"
        )
    if window < 0:
        raise ValueError(f"window must be 0 (none) or a key count, got {window}")
    if block_table is not None:
        check_integral("block_table", block_table)
        check_same_device("block_table", block_table, "q", q)
        if block_table.ndim != 2:
            raise ValueError(f"block_table must be [B, pages], got {list(block_table.shape)}")


def check_attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    window: int,
    window_right: int,
    causal: bool,
    block_table: Tensor | None,
) -> None:
    if q.ndim != 3:
        raise ValueError(f"q must be [T, H, C], got {list(q.shape)}")
    if block_table is None and k.ndim != 3:
        raise ValueError(f"k must be [T, G, C], got {list(k.shape)}")
    _check_heads(q, k, v, block_table, window)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {cu.dtype}")
        check_same_device(name, cu, "q", q)
        if cu.ndim != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name} must be [B + 1], got {list(cu.shape)}")
    check_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)
    tokens, batch = q.shape[0], cu_seqlens_q.shape[0] - 1
    # Not of the compiler's symbols: a guard for each length would be one.
    if type(max_seqlen_q) is int and type(tokens) is int and max_seqlen_q * batch < tokens:
        raise ValueError(
            f"max_seqlen_q must be the longest of {batch} sequences of {tokens} queries together, "
            f"got {max_seqlen_q}"
        )
    if block_table is not None and block_table.shape[0] != cu_seqlens_q.shape[0] - 1:
        raise ValueError(
            f"block_table must have one row per sequence, {cu_seqlens_q.shape[0] - 1}, "
            f"got {block_table.shape[0]}"
        )
    if window_right < -1 or (causal and window_right > 0):
        raise ValueError(
            f"window_right must be -1 (no bound) or a key count, and is for causal=False alone, "
            f"got {window_right}"
        )


def attention_prefill(
    q_THC: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int,
    window_right: int,
    softcap: float,
    block_table: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(q_THC.dtype, torch.float32)
    kv_heads = k.shape[-2]
    fused = q_THC.is_cpu and not softcap and not return_lse
    out_THC = torch.zeros_like(q_THC, memory_format=torch.contiguous_format)
    lse_HT = q_THC.new_full(
        (q_THC.shape[1], q_THC.shape[0] if return_lse else 0), -math.inf, dtype=acc
    )
    held = k.shape[0] if block_table is None else None
    cu_and_longest = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    for b, queries, keys in sequences(*cu_and_longest, q_THC.shape[0], held):
        num_keys = keys.stop - keys.start
        if num_keys == 0:
            continue
        if block_table is not None and num_keys > block_table.shape[1] * k.shape[1]:
            raise ValueError(
                f"block_table must have pages for the {num_keys} keys of sequence {b}, got "
                f"{block_table.shape[1]} of {k.shape[1]}"
            )
        if block_table is None:
            k_SGC, v_SGC = k[keys], v[keys]
        else:
            pages = block_table[b, : -(-num_keys // k.shape[1])].tolist()
            k_SGC, v_SGC = keys_on_pages(k, pages, num_keys), keys_on_pages(v, pages, num_keys)
        if not fused:
            k_SGC, v_SGC = k_SGC.to(acc), v_SGC.to(acc)
        scores_of_row = max(num_keys * q_THC.shape[1], 1)
        rows = FUSED_ROWS if fused else max(16, SCORE_ELEMENTS // scores_of_row)
        blocks = query_blocks(queries, num_keys, rows, causal, window, window_right)
        for block, first, lo, hi, right in blocks:
            last = first + block.stop - block.start
            mask = visible_mask(first, last, lo, hi, window, right, q_THC.device)
            if fused and first >= 0:
                out_THC[block] = (
                    F.scaled_dot_product_attention(
                        q_THC[block].transpose(0, 1)[None],
                        k_SGC[lo:hi].transpose(0, 1)[None],
                        v_SGC[lo:hi].transpose(0, 1)[None],
                        mask,
                        scale=scale,
                        enable_gqa=kv_heads != q_THC.shape[1],
                    )[0]
                ).transpose(0, 1)
                continue
            q_GRTC = grouped(q_THC[block].to(acc), kv_heads)
            p, lse = softmax_and_lse(
                masked_scores(q_GRTC, k_SGC[lo:hi].to(acc), mask, scale, softcap)
            )
            out = torch.matmul(p.flatten(1, 2), v_SGC[lo:hi].to(acc).transpose(0, 1))
            out_THC[block] = ungrouped(out.view(q_GRTC.shape)).to(q_THC.dtype)
            if return_lse:
                lse_HT[:, block] = lse.flatten(0, 1)
    return out_THC, lse_HT


def attention_prefill_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    out_THC: Tensor,
    lse_HT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from p = exp(s - lse) recomputed block by block.

    dv = pᵀ do, ds = p (do vᵀ - rowsum(do out) + dlse), dq = ds k, dk = dsᵀ q.
    """
    acc = lse_HT.dtype
    kv_heads = k_SGC.shape[1]
    dq = torch.zeros_like(q_THC, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(k_SGC, dtype=acc, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(v_SGC, dtype=acc, memory_format=torch.contiguous_format)
    cu_and_longest = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    for _, queries, keys in sequences(*cu_and_longest, q_THC.shape[0], k_SGC.shape[0]):
        num_keys = keys.stop - keys.start
        rows = max(16, SCORE_ELEMENTS // max(num_keys * q_THC.shape[1], 1))
        blocks = query_blocks(queries, num_keys, rows, causal, window, window_right)
        for block, first, lo, hi, right in blocks:
            last = first + block.stop - block.start
            seen = slice(keys.start + lo, keys.start + hi)
            k, v = k_SGC[seen].to(acc), v_SGC[seen].to(acc)
            q, do, o = (grouped(x[block].to(acc), kv_heads) for x in (q_THC, grad_out, out_THC))
            mask = visible_mask(first, last, lo, hi, window, right, q_THC.device)
            lse = lse_HT[:, block].unflatten(0, (kv_heads, -1))
            s = masked_scores(q, k, mask, scale, softcap)
            p = (s - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp()
            dp = torch.matmul(do.flatten(1, 2), v.permute(1, 2, 0)).view_as(p)
            d_lse = grad_lse[:, block].unflatten(0, (kv_heads, -1))
            ds = p * (dp + (d_lse - (do * o).sum(-1)).unsqueeze(-1))
            if softcap:
                ds = ds * (1 - (s.masked_fill(s == -math.inf, 0.0) / softcap) ** 2)
            ds = ds.flatten(1, 2) * scale
            dq[block] = ungrouped(torch.matmul(ds, k.transpose(0, 1)).view_as(q)).to(dq.dtype)
            dk[seen] += torch.matmul(ds.transpose(1, 2), q.flatten(1, 2)).transpose(0, 1)
            dv[seen] += torch.matmul(p.flatten(1, 2).transpose(1, 2), do.flatten(1, 2)).transpose(
                0, 1
            )
    return dq, dk.to(k_SGC.dtype), dv.to(v_SGC.dtype)


def check_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    window: int,
    ring: bool,
) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, N, H, C], got {list(q.shape)}")
    if k_cache.ndim != 4:
        raise ValueError(f"k_cache must be 4-d, got {list(k_cache.shape)}")
    _check_heads(q, k_cache, v_cache, block_table, window, "k_cache", "v_cache")
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
    seq_lens: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: int,
    ring: bool,
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    fused = q_BNHC.is_cpu and not softcap and not return_lse
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
        if block_table is None:
            # Views, not one copied block: a wrapped ring is two spans whose scores are joined.
            spans = ring_spans(page_size, lo, hi) if ring else [slice(lo, hi)]
            ks, vs = ([cache[rows, span] for span in spans] for cache in (k_cache, v_cache))
        else:
            skipped = lo // page_size
            pages = block_table[b, skipped : -(-hi // page_size)].tolist()
            seen = slice(lo - skipped * page_size, None)
            num_keys = hi - skipped * page_size
            ks, vs = (
                [keys_on_pages(cache, pages, num_keys)[None, seen]] for cache in (k_cache, v_cache)
            )
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
        ks, vs = ([x[0].to(acc) for x in xs] for xs in (ks, vs))
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
    seq_lens: Tensor,
    block_table: Tensor | None,
    counters: Tensor,
    window: int,
    ring: bool,
) -> None:
    check_qkv_norm_rope(q, k, v, q_weight, k_weight, positions, inv_freq)
    decode = (k_cache, v_cache, seq_lens, block_table, window, ring)
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
        k_cache[outer, inner] = new_k_BGC[rows]
        v_cache[outer, inner] = new_v_BGC[rows]
    options = block_table, scale, window, ring, softcap, False
    out, _ = attention_decode(q_BHC.unsqueeze(1), k_cache, v_cache, seq_lens, *options)
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
