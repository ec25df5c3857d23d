"""What the twins of attention are made of: who sees whom, scores, softmax, sequences and pages."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor


def visible_keys(
    first: int, last: int, num_keys: int, window: int, right: int | None
) -> tuple[int, int]:
    """The keys [lo, hi) that some query at key positions first..last - 1 can see."""
    lo = max(0, first - window + 1) if window else 0
    hi = num_keys if right is None else min(num_keys, last + right)
    return min(lo, max(hi, 0)), max(hi, 0)


def visible_mask(
    first: int, last: int, lo: int, hi: int, window: int, right: int | None, device: torch.device
) -> Tensor | None:
    """True where query i of first..last - 1 sees key j of lo..hi - 1; None if all see all."""
    inside_right = right is None or hi - 1 <= first + right
    inside_left = not window or lo > last - 1 - window
    if inside_right and inside_left:
        return None
    distance = torch.arange(first, last, device=device)[:, None] - torch.arange(
        lo, hi, device=device
    )
    mask = torch.ones_like(distance, dtype=torch.bool)
    if right is not None:
        mask &= distance >= -right
    if window:
        mask &= distance < window
    return mask


def masked_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """[G, R, rows, keys] scores, capped and masked, from q [G, R, rows, C] and k [keys, G, C]."""
    s = torch.matmul(q.flatten(1, 2), k.permute(1, 2, 0)).unflatten(1, q.shape[1:3])
    if scale != 1.0:
        s = s * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    return s if mask is None else s.masked_fill(~mask, -math.inf)


def softmax_and_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the keys and its log-sum-exp; a row that sees no key gives 0 and -inf.

    The largest probability is exp(max - lse) and at least 1 / keys, so it gives lse exactly enough
    and saves the passes of logsumexp.
    """
    highest = scores.amax(-1)
    blind = highest == -math.inf
    p = scores.softmax(-1).masked_fill_(blind.unsqueeze(-1), 0.0)
    return p, (highest - p.amax(-1).log()).masked_fill_(blind, -math.inf)


def grouped(x_THC: Tensor, kv_heads: int) -> Tensor:
    """[T, H, C] as [G, R, T, C]: the query heads that share a KV head beside each other."""
    return x_THC.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def ungrouped(x_GRTC: Tensor) -> Tensor:
    return x_GRTC.permute(2, 0, 1, 3).flatten(1, 2)


def _offsets(name: str, cu_seqlens: Tensor, max_seqlen: int) -> list[int]:
    """cu_seqlens_q or _k (q or k the name), read on the host."""
    cu = cu_seqlens.tolist()
    if cu[0] != 0:
        raise ValueError(f"cu_seqlens_{name} must begin at 0, got {cu[0]}")
    for begin, end in itertools.pairwise(cu):
        if end < begin:
            raise ValueError(f"cu_seqlens_{name} must not decrease, got {end} after {begin}")
        if end - begin > max_seqlen:
            raise ValueError(
                f"max_seqlen_{name} must not fall below the longest sequence, {end - begin}, "
                f"got {max_seqlen}"
            )
    return cu


def sequences(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_queries: int,
    num_keys: int | None,
) -> Iterator[tuple[int, slice, slice]]:
    """(b, its queries, its keys) for each sequence that has a query; reads the two on the host."""
    cu_q = _offsets("q", cu_seqlens_q, max_seqlen_q)
    cu_k = _offsets("k", cu_seqlens_k, max_seqlen_k)
    if cu_q[-1] != num_queries:
        raise ValueError(
            f"cu_seqlens_q must end at the number of queries, {num_queries}, got {cu_q[-1]}"
        )
    if num_keys is not None and cu_k[-1] > num_keys:
        raise ValueError(
            f"cu_seqlens_k must end within the number of keys, {num_keys}, got {cu_k[-1]}"
        )
    for b in range(len(cu_q) - 1):
        if cu_q[b + 1] > cu_q[b]:
            yield b, slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])


def query_blocks(
    queries: slice, num_keys: int, rows: int, causal: bool, window: int, window_right: int
) -> Iterator[tuple[slice, int, int, int, int | None]]:
    """(its queries, position of the first, keys [lo, hi), right bound) of each block of `rows`
    queries that sees a key. Positions count keys: the queries are the tail of the keys."""
    right = 0 if causal else None if window_right < 0 else window_right
    for begin in range(queries.start, queries.stop, rows):
        block = slice(begin, min(begin + rows, queries.stop))
        first = num_keys - (queries.stop - begin)
        lo, hi = visible_keys(first, first + block.stop - begin, num_keys, window, right)
        if lo < hi:
            yield block, first, lo, hi, right


def keys_on_pages(cache: Tensor, pages: list[int], num_keys: int) -> Tensor:
    """The first num_keys keys [S, G, C] on `pages`; a view where the pages lie in order."""
    if min(pages) < 0 or max(pages) >= len(cache):
        raise ValueError(
            f"block_table must lie in 0..{len(cache) - 1} where it is used, got {pages}"
        )
    if pages == list(range(pages[0], pages[0] + len(pages))):
        return cache[pages[0] : pages[0] + len(pages)].flatten(0, 1)[:num_keys]
    return cache[torch.tensor(pages, device=cache.device)].flatten(0, 1)[:num_keys]


def ring_spans(slots: int, lo: int, hi: int) -> list[slice]:
    """The slots of positions lo..hi - 1 in a ring, oldest first."""
    begin, end = lo % slots, (hi - 1) % slots + 1
    return [slice(begin, end)] if begin < end else [slice(begin, slots), slice(0, end)]
