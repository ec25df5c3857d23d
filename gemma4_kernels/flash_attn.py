"""The functions of the flash-attn package, with its argument names and meanings, on these ops.

Head sizes up to 512. What these kernels do not offer is refused by the argument's name, never left
out in silence. Shapes: B sequences, N queries and S keys each, H query heads, G key-value heads (H
a multiple of G), C head channels.
"""

from typing import TypedDict

import torch
from torch import Tensor

from . import ops


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is None or (isinstance(value, int | float) and value == 0):
            continue
        got = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} is not supported, got {got}")


class _Bounds(TypedDict):
    causal: bool
    window: int
    window_right: int


def _window(window_size: tuple[int, int], causal: bool) -> _Bounds:
    """flash-attn's (left, right), both inclusive and -1 for no bound, as these ops have it."""
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size must hold key counts, or -1 for no bound, got {window_size}")
    return {"causal": causal, "window": left + 1, "window_right": -1 if causal else right}


def _scale(softmax_scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """softmax(softcap(softmax_scale q kᵀ)) v for sequences of one length.

    q [B, N, H, C]; k, v [B, S, G, C]. Without a softmax_scale C^-½ is taken. Query i sees key j if
    i + S - N - left <= j <= i + S - N + right for window_size (left, right), and j <= i + S - N if
    causal. Always deterministic. Returns out [B, N, H, C]; with return_attn_probs (out, log-sum-exp
    [B, H, N] fp32, None): no probabilities are kept.

    Raises ValueError for dropout_p and alibi_slopes, which are not supported.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"q must be [B, N, H, C] and k [B, S, G, C], got {list(q.shape)} and {list(k.shape)}"
        )
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    cu_q, cu_k = (
        torch.arange(batch + 1, dtype=torch.int32, device=q.device) * n
        for n in (num_queries, num_keys)
    )
    out, lse = ops.attention_prefill(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_q,
        cu_k,
        num_queries,
        num_keys,
        scale=_scale(softmax_scale, q),
        softcap=softcap,
        return_lse=return_attn_probs,
        **_window(window_size, causal),
    )
    out = out.view(q.shape)
    if lse is None:
        return out
    return out, lse.unflatten(1, (batch, num_queries)).transpose(0, 1).contiguous(), None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` over packed sequences: q [T, H, C]; k, v [S, G, C], or pages
    [pages, page_size, G, C] with block_table [B, pages]; cu_seqlens_q, cu_seqlens_k [B + 1] int32.

    Returns out [T, H, C]; with return_attn_probs (out, log-sum-exp [H, T] fp32, None).
    Raises ValueError for dropout_p and alibi_slopes, which are not supported.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    out, lse = ops.attention_prefill(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=_scale(softmax_scale, q),
        softcap=softcap,
        block_table=block_table,
        return_lse=return_attn_probs,
        **_window(window_size, causal),
    )
    return out if lse is None else (out, lse, None)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last N tokens of each sequence over its cache, after writing k and v there.

    q [B, N, H, C]; k_cache, v_cache [B, S, G, C], or pages [pages, page_size, G, C] with a
    block_table [B, pages] int32; cache_seqlens counts the keys in the cache, one number or [B]
    int32 (none: the cache is full); k, v [B, new, G, C] are written behind them, in place, and
    count. The queries are the tail of the keys. num_splits is left to the op. Returns out
    [B, N, H, C], with return_softmax_lse and the log-sum-exp [B, H, N] fp32.

    Raises ValueError for rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad and alibi_slopes,
    which are not supported.
    """
    _refuse(
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        alibi_slopes=alibi_slopes,
    )
    if (k is None) != (v is None):
        raise ValueError("k and v must come together or not")
    if q.ndim != 4 or k_cache.ndim != 4:
        raise ValueError(
            f"q must be [B, N, H, C] and k_cache 4-d, got {list(q.shape)} and {list(k_cache.shape)}"
        )
    batch, num_new = q.shape[:2]
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None:
        cache_seqlens = room
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if k is not None and v is not None:
        _append(k_cache, v_cache, k, v, cache_seqlens, block_table)
        cache_seqlens = cache_seqlens + k.shape[1]

    scale, bounds = _scale(softmax_scale, q), _window(window_size, causal)
    if causal or num_new == 1:
        out, lse = ops.attention_decode(
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            block_table,
            scale=scale,
            window=bounds["window"],
            softcap=softcap,
            return_lse=return_softmax_lse,
        )
    else:
        # Rows of a cache are pages too, one each.
        if block_table is None:
            block_table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
        cu_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * num_new
        cu_k = torch.nn.functional.pad(cache_seqlens.cumsum(0, dtype=torch.int32), (1, 0))
        out, lse = ops.attention_prefill(
            q.flatten(0, 1),
            k_cache,
            v_cache,
            cu_q,
            cu_k,
            num_new,
            room,
            scale=scale,
            softcap=softcap,
            block_table=block_table,
            return_lse=return_softmax_lse,
            **bounds,
        )
        out = out.view(q.shape)
        if lse is not None:
            lse = lse.unflatten(1, (batch, num_new)).transpose(0, 1).contiguous()
    return out if lse is None else (out, lse)


def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:
    positions = cache_seqlens[:, None] + torch.arange(k.shape[1], device=k.device)
    page_size = k_cache.shape[1]
    if block_table is None:
        rows = torch.arange(len(k), device=k.device)[:, None].expand_as(positions)
    else:
        rows = block_table.gather(1, positions.long() // page_size)
        positions = positions % page_size
    k_cache.index_put_((rows.long(), positions.long()), k)
    v_cache.index_put_((rows.long(), positions.long()), v)
