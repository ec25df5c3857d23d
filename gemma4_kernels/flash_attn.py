"""The functions of the flash-attn package, with its argument names and meanings, on these ops.

Head sizes up to 512. What these kernels do not offer is refused by the argument's name, never left
out in silence. Shapes: B sequences, N queries and S keys each, H query heads, G key-value heads (H
a multiple of G), C head channels.
"""

from typing import TypedDict

import torch
from torch import Tensor

from . import ops
from .flash_attn_cache import FlashAttnCache, check_tensor, count_new, is_count, open_cache
from .reference.common import check_floating

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


class _Options(TypedDict):
    """Keyword arguments of `attention_prefill`."""

    scale: float
    causal: bool
    window: int
    window_right: int
    softcap: float
    return_lse: bool


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is None or (isinstance(value, int | float) and value == 0):
            continue
        got = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} is not supported, got {got}")


def _options(
    q: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    return_lse: bool,
) -> _Options:
    """flash-attn's as these ops have them; its (left, right) are inclusive, -1 for no bound."""
    pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not pair or not all(is_count(side, least=-1) for side in window_size):
        raise ValueError(
            f"window_size must hold two key counts, or -1 for no bound, got {window_size!r}"
        )
    left, right = window_size
    return {
        "scale": q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        "causal": causal,
        "window": left + 1,
        "window_right": -1 if causal else right,
        "softcap": softcap,
        "return_lse": return_lse,
    }


def _equal_spans(q: Tensor, length: int) -> Tensor:
    """cu_seqlens of as many sequences as q has, each of this length."""
    return torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * length


def _lse_by_sequence(lse_HT: Tensor, q_BNHC: Tensor) -> Tensor:
    """[B, H, N]"""
    return lse_HT.unflatten(1, q_BNHC.shape[:2]).transpose(0, 1).contiguous()


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
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, 4)
    num_queries, num_keys = q.shape[1], k.shape[1]
    out, lse = ops.attention_prefill(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        _equal_spans(q, num_queries),
        _equal_spans(q, num_keys),
        num_queries,
        num_keys,
        **_options(q, softmax_scale, causal, window_size, softcap, return_attn_probs),
    )
    out = out.view(q.shape)
    return out if lse is None else (out, _lse_by_sequence(lse, q), None)


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

    No sequence is longer than max_seqlen_q queries and max_seqlen_k keys. softmax_scale, causal,
    window_size, softcap and deterministic as there.
    Returns out [T, H, C]; with return_attn_probs (out, log-sum-exp [H, T] fp32, None).
    Raises ValueError for dropout_p and alibi_slopes, which are not supported.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    check_tensor("q", q, 3)
    out, lse = ops.attention_prefill(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        block_table=block_table,
        **_options(q, softmax_scale, causal, window_size, softcap, return_attn_probs),
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

    q [B, N, H, C]; k_cache, v_cache [rows, S, G, C], sequence b in row b or cache_batch_idx[b]
    ([B] integers), or pages [pages, page_size, G, C] with block_table [B, pages] integers;
    cache_seqlens counts the keys in the cache, one number or [B] integers (none: the cache is
    full); k, v [B, new, G, C] are written behind them, in place, and count. The queries are the
    tail of the keys. softmax_scale, causal, window_size and softcap are `flash_attn_func`'s;
    num_splits is left to the op.

    rotary_cos, rotary_sin [positions, R] turn the first 2R channels: those of k, before it is
    written, at cache_seqlens, cache_seqlens + 1, ...; those of q likewise if causal or under a
    window that is narrower than the cache, else all at cache_seqlens. Pairs are (2i, 2i + 1) if
    rotary_interleaved, else (i, i + R). In fp32, with one rounding.

    Returns out [B, N, H, C], with return_softmax_lse and the log-sum-exp [B, H, N] fp32. Has no
    backward. Raises ValueError for cache_leftpad and alibi_slopes, which are not supported, and for
    keys and positions past block_table, k_cache or rotary_cos. If cache_seqlens is a tensor on a
    GPU, that they fit must hold on the device, where torch's indexing stops the program.
    """
    _refuse(cache_leftpad=cache_leftpad, alibi_slopes=alibi_slopes)
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, x, 4)
    cache = open_cache(q, k_cache, v_cache, cache_batch_idx, block_table, cache_seqlens)
    num_new = count_new(q, k_cache, k, v)
    if cache.longest is not None and cache.longest + num_new > cache.room:
        raise ValueError(
            f"{'k_cache' if block_table is None else 'block_table'} must have room for "
            f"cache_seqlens and the new keys, {cache.longest} + {num_new}, got room for "
            f"{cache.room}"
        )
    options = _options(q, softmax_scale, causal, window_size, softcap, return_softmax_lse)
    if rotary_cos is not None or rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos and rotary_sin must come with k and v, got neither")
        # A window that holds the whole cache is none, there as here.
        follows = causal or any(0 <= side < cache.room for side in window_size)
        turned_q = q.shape[1] if follows else 1
        cos, sin = _cos_and_sin(q, rotary_cos, rotary_sin, cache, max(num_new, turned_q))
        q = _rotate(q, cos[:, :turned_q], sin[:, :turned_q], rotary_interleaved)
        k = _rotate(k, cos[:, :num_new], sin[:, :num_new], rotary_interleaved)
    if k is not None and v is not None:
        cache.append(k, v)
    out, lse = _attend(q, cache, options)
    return out if lse is None else (out, lse)


def _cos_and_sin(
    q: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache: FlashAttnCache,
    count: int,
) -> tuple[Tensor, Tensor]:
    """[B, count, 1, R] each, of the next positions."""
    cos, sin = check_tensor("rotary_cos", rotary_cos, 2), check_tensor("rotary_sin", rotary_sin, 2)
    num_positions = cache.room if cache.longest is None else cache.longest + count
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_floating(name, x)
        if len(x) < num_positions or 2 * x.shape[1] > q.shape[3] or x.device != q.device:
            raise ValueError(
                f"{name} must be [{num_positions} or more, {q.shape[3] // 2} or fewer] on "
                f"{q.device}, got {list(x.shape)} on {x.device}"
            )
    if sin.shape != cos.shape:
        raise ValueError(
            f"rotary_sin must have the shape of rotary_cos, {list(cos.shape)}, "
            f"got {list(sin.shape)}"
        )
    positions = cache.next_positions(count)
    return cos[positions, None], sin[positions, None]


def _attend(q: Tensor, cache: FlashAttnCache, options: _Options) -> tuple[Tensor, Tensor | None]:
    num_queries, table = q.shape[1], cache.block_table
    if options["causal"] or num_queries == 1:
        return ops.attention_decode(
            q,
            cache.k,
            cache.v,
            cache.lengths,
            table,
            scale=options["scale"],
            window=options["window"],
            softcap=options["softcap"],
            return_lse=options["return_lse"],
        )
    if table is None:
        table = torch.arange(len(q), dtype=torch.int32, device=q.device)[:, None]
    out, lse = ops.attention_prefill(
        q.flatten(0, 1),
        cache.k,
        cache.v,
        _equal_spans(q, num_queries),
        torch.nn.functional.pad(cache.lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        num_queries,
        cache.room,
        block_table=table,
        **options,
    )
    return out.view(q.shape), None if lse is None else _lse_by_sequence(lse, q)


def _rotate(x_BNHC: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first 2R channels turned by cos, sin [B, N or 1, 1, R], the rest as they are."""
    wide = torch.promote_types(x_BNHC.dtype, torch.float32)
    head, rest = x_BNHC.tensor_split([2 * cos.shape[-1]], -1)
    pairs = head.unflatten(-1, (-1, 2) if interleaved else (2, -1)).to(wide)
    first, second = pairs.unbind(-1 if interleaved else -2)
    cos, sin = cos.to(wide), sin.to(wide)
    turned = first * cos - second * sin, first * sin + second * cos
    head = torch.stack(turned, -1 if interleaved else -2).flatten(-2)
    return torch.cat([head.to(x_BNHC.dtype), rest], -1)
