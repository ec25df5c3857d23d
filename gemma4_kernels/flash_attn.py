"""The functions of the flash-attn package, with its argument names and meanings, on these ops.

Head sizes up to 512. What these kernels do not offer is refused by the argument's name, never left
out in silence. Shapes: B sequences, N queries and S keys each, H query heads, G key-value heads (H
a multiple of G), C head channels. Over 400 lines for the signatures, of up to 19 arguments, and
what is said of each.
"""

from typing import TypedDict

import torch
from torch import Tensor

from . import ops

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


class _Bounds(TypedDict):
    causal: bool
    window: int
    window_right: int


class _Options(TypedDict):
    scale: float
    softcap: float
    return_lse: bool


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is None or (isinstance(value, int | float) and value == 0):
            continue
        got = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} is not supported, got {got}")


def _tensor(name: str, x: object, ndim: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got {list(x.shape)}")
    return x


def _check_indices(name: str, given: object, ndim: int, q: Tensor) -> None:
    """Integers for each of q's sequences."""
    x = _tensor(name, given, ndim)
    if x.dtype == torch.bool or x.is_floating_point():
        raise TypeError(f"{name} must hold integers, got {x.dtype}")
    if len(x) != len(q) or x.device != q.device:
        raise ValueError(
            f"{name} must have a row for each of {len(q)} sequences on {q.device}, "
            f"got {list(x.shape)} on {x.device}"
        )


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _window(window_size: tuple[int, int], causal: bool) -> _Bounds:
    """flash-attn's (left, right), both inclusive and -1 for no bound, as these ops have it."""
    pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not pair or not all(_is_count(side, least=-1) for side in window_size):
        raise ValueError(
            f"window_size must hold two key counts, or -1 for no bound, got {window_size!r}"
        )
    left, right = window_size
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
    for name, x in (("q", q), ("k", k), ("v", v)):
        _tensor(name, x, 4)
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

    No sequence is longer than max_seqlen_q queries and max_seqlen_k keys. softmax_scale, causal,
    window_size, softcap and deterministic as there.
    Returns out [T, H, C]; with return_attn_probs (out, log-sum-exp [H, T] fp32, None).
    Raises ValueError for dropout_p and alibi_slopes, which are not supported.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    _tensor("q", q, 3)
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
        _tensor(name, x, 4)
    room_name = "k_cache" if block_table is None else "block_table"
    k_cache, v_cache, block_table = _rows_or_pages(
        q, k_cache, v_cache, cache_batch_idx, block_table
    )
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths, longest = _lengths(q, room if cache_seqlens is None else cache_seqlens)
    num_new = _count_new(q, k_cache, k, v)
    if longest is not None and longest + num_new > room:
        raise ValueError(
            f"{room_name} must have room for cache_seqlens and the new keys, "
            f"{longest} + {num_new}, got room for {room}"
        )
    bounds = _window(window_size, causal)
    if rotary_cos is not None or rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos and rotary_sin must come with k and v, got neither")
        # A window that holds the whole cache is none, there as here.
        follows = causal or any(0 <= side < room for side in window_size)
        turned_q = q.shape[1] if follows else 1
        num_positions = max(num_new, turned_q)
        needed = room if longest is None else longest + num_positions
        cos, sin = _cos_and_sin(q, rotary_cos, rotary_sin, needed)
        positions = lengths.long()[:, None] + torch.arange(num_positions, device=q.device)
        cos, sin = cos[positions, None], sin[positions, None]
        q = _rotate(q, cos[:, :turned_q], sin[:, :turned_q], rotary_interleaved)
        k = _rotate(k, cos[:, :num_new], sin[:, :num_new], rotary_interleaved)
    if k is not None and v is not None:
        _append(k_cache, v_cache, k, v, lengths, block_table)
        lengths = lengths + num_new
    options: _Options = {
        "scale": _scale(softmax_scale, q),
        "softcap": softcap,
        "return_lse": return_softmax_lse,
    }
    out, lse = _attend(q, k_cache, v_cache, lengths, block_table, bounds, options)
    return out if lse is None else (out, lse)


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    bounds: _Bounds,
    options: _Options,
) -> tuple[Tensor, Tensor | None]:
    batch, num_queries = q.shape[:2]
    if bounds["causal"] or num_queries == 1:
        window = bounds["window"]
        return ops.attention_decode(
            q, k_cache, v_cache, lengths, block_table, window=window, **options
        )
    if block_table is None:
        block_table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    out, lse = ops.attention_prefill(
        q.flatten(0, 1),
        k_cache,
        v_cache,
        torch.arange(batch + 1, dtype=torch.int32, device=q.device) * num_queries,
        torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        num_queries,
        k_cache.shape[1] * block_table.shape[1],
        block_table=block_table,
        **bounds,
        **options,
    )
    if lse is not None:
        lse = lse.unflatten(1, (batch, num_queries)).transpose(0, 1).contiguous()
    return out.view(q.shape), lse


def _rows_or_pages(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The caches with one row a sequence, or with a table of their pages."""
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"v_cache must have the shape of k_cache, {list(k_cache.shape)}, "
            f"got {list(v_cache.shape)}"
        )
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx and block_table must not come together")
        _check_indices("cache_batch_idx", cache_batch_idx, 1, q)
        _check_pages("cache_batch_idx", cache_batch_idx, k_cache)
        return k_cache, v_cache, cache_batch_idx[:, None]  # rows are pages too, one each
    if block_table is not None:
        _check_indices("block_table", block_table, 2, q)
        return k_cache, v_cache, block_table
    if len(k_cache) < len(q):
        raise ValueError(
            f"k_cache must have a row for each of {len(q)} sequences, got {len(k_cache)}"
        )
    return k_cache[: len(q)], v_cache[: len(q)], None


def _lengths(q: Tensor, cache_seqlens: int | Tensor) -> tuple[Tensor, int | None]:
    """[B] int32 counts of the keys in the cache, and the largest, if the host need not wait."""
    if not isinstance(cache_seqlens, Tensor):
        if not _is_count(cache_seqlens):
            raise ValueError(f"cache_seqlens must be a count of keys, got {cache_seqlens!r}")
        lengths = torch.full((len(q),), cache_seqlens, dtype=torch.int32, device=q.device)
        return lengths, cache_seqlens
    _check_indices("cache_seqlens", cache_seqlens, 1, q)
    lengths = cache_seqlens.int()
    if not _on_host(lengths) or not len(q):
        return lengths, None
    shortest, longest = (int(x) for x in cache_seqlens.aminmax())
    if shortest < 0:
        raise ValueError(f"cache_seqlens must be counts of keys, got {shortest}")
    return lengths, longest


def _on_host(x: Tensor) -> bool:
    """Whether values can be looked at: not on a device, and not by the compiler."""
    return x.is_cpu and not torch.compiler.is_compiling()


def _check_pages(name: str, pages: Tensor, cache: Tensor) -> None:
    if _on_host(pages) and ((pages < 0) | (pages >= len(cache))).any():
        raise ValueError(f"{name} must lie in 0..{len(cache) - 1}, got {pages.tolist()}")


def _count_new(q: Tensor, k_cache: Tensor, k: Tensor | None, v: Tensor | None) -> int:
    """How many keys each sequence appends."""
    if (k is None) != (v is None):
        raise ValueError("k and v must come together or not")
    if k is None:
        return 0
    want = [len(q), _tensor("k", k, 4).shape[1], *k_cache.shape[2:]]
    for name, given in (("k", k), ("v", v)):
        x = _tensor(name, given, 4)
        if x.dtype != k_cache.dtype:
            raise TypeError(f"{name} must have k_cache's dtype, {k_cache.dtype}, got {x.dtype}")
        if list(x.shape) != want or x.device != k_cache.device:
            raise ValueError(
                f"{name} must be {want} on {k_cache.device}, got {list(x.shape)} on {x.device}"
            )
    return k.shape[1]


def _cos_and_sin(
    q: Tensor, rotary_cos: Tensor | None, rotary_sin: Tensor | None, num_positions: int
) -> tuple[Tensor, Tensor]:
    cos, sin = _tensor("rotary_cos", rotary_cos, 2), _tensor("rotary_sin", rotary_sin, 2)
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
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
    return cos, sin


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


def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
) -> None:
    positions = lengths.long()[:, None] + torch.arange(k.shape[1], device=k.device)
    page_size = k_cache.shape[1]
    if block_table is None:
        rows = torch.arange(len(k), device=k.device)[:, None].expand_as(positions)
    else:
        rows = block_table.gather(1, positions // page_size).long()
        _check_pages("block_table", rows, k_cache)
        positions = positions % page_size
    k_cache.index_put_((rows, positions), k)
    v_cache.index_put_((rows, positions), v)
