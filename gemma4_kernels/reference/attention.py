"""Twins and checks of `ops/attention.py`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import check_floating, check_integral, check_like, check_same_device, check_shape
from .scores import (
    grouped,
    keys_on_pages,
    masked_scores,
    query_blocks,
    sequences,
    softmax_and_lse,
    ungrouped,
    visible_mask,
)

__all__ = ["attention_prefill", "attention_prefill_backward"]

# Attention scores held at once by `attention_prefill`, in elements: bounds its memory whatever the
# prompt, and large enough for full-speed matrix products.
SCORE_ELEMENTS = 1 << 22
# Query rows per call of torch's fused CPU attention, which blocks over keys itself.
FUSED_ROWS = 256


def check_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    window: int,
    k_name: str = "k",
    v_name: str = "v",
    coded: bool = False,
) -> None:
    check_floating("q", q)
    if block_table is not None and k.ndim != 4:
        raise ValueError(
            f"with a block_table {k_name} and {v_name} must be [pages, page_size, G, C], "
            f"got {list(k.shape)}"
        )
    for name, x in ((k_name, k), (v_name, v)):
        (check_same_device if coded else check_like)(name, x, "q", q)
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
    check_heads(q, k, v, block_table, window)
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
