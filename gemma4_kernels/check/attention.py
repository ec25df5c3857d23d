"""Small awkward calls of attention."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from ..ops.attention import HEAD_DIMS
from ..ops.decode import CODED_HEAD_DIMS
from ..reference.decode import COUNTERS
from .draw import EPS, HOST, Arguments, Draw, coded


def heads(draw: Draw, *shape: int) -> Tensor:
    return draw.strided(*shape, std=0.3)


# Queries and keys of a sequence: one, none, less than a tile, more queries than keys, many tiles.
RAGGED = (1, 0, 19, 5, 70), (1, 3, 40, 3, 150)
# causal, window (one wider than a tile, one narrower), window_right, softcap
MASKS = ((True, 0, -1, 0.0), (True, 75, -1, 0.0), (False, 0, -1, 0.0), (False, 9, 3, 20.0))


def starts(draw: Draw, lengths: tuple[int, ...]) -> Tensor:
    return draw.ints(*torch.tensor((0, *lengths)).cumsum(0).tolist())


def packed(draw: Draw, kv_heads: int, head_dim: int) -> Arguments:
    lengths_q, lengths_k = RAGGED
    q = heads(draw, sum(lengths_q), 2, head_dim)
    k, v = (heads(draw, sum(lengths_k) + 2, kv_heads, head_dim) for _ in range(2))
    k[-2:] = v[-2:] = torch.nan  # behind the last sequence
    spans = starts(draw, lengths_q), starts(draw, lengths_k)
    return q, k, v, *spans, max(lengths_q), max(lengths_k)


def paged(draw: Draw, lengths: tuple[int, ...], page_size: int, *shape: int) -> Arguments:
    """K and V in shuffled pages, and their block table; NaN where no key of a sequence is."""
    most = -(-max(lengths) // page_size)
    order = draw.permutation(len(lengths) * most).view(len(lengths), most)
    pages = [heads(draw, order.numel(), page_size, *shape) for _ in range(2)]
    for row, length in zip(order.tolist(), lengths, strict=True):
        for i, page in enumerate(row):
            for cache in pages:
                cache[page, max(length - i * page_size, 0) :] = torch.nan
    return *pages, order.int().to(draw.device)


def attention_prefill(draw: Draw) -> Iterator[Arguments]:
    for head_dim in HEAD_DIMS:
        for causal, window, right, softcap in MASKS:
            options = 1.0, causal, window, right, softcap, None, True
            yield *packed(draw, 1 if causal else 2, head_dim), *options
        lengths = (1, 20, 0)
        k, v, table = paged(draw, lengths, 8, 1, head_dim)
        q, spans = heads(draw, 8, 2, head_dim), (starts(draw, (1, 7, 0)), starts(draw, lengths))
        yield q, k, v, *spans, 7, 20, 0.5, True, 9, -1, 0.0, table, False


def attention_prefill_backward(draw: Draw) -> Iterator[Arguments]:
    for head_dim in HEAD_DIMS:
        for mask in MASKS:
            arguments = packed(draw, 1 if mask[0] else 2, head_dim)
            tensors = (x.to(HOST) for x in arguments[:5])
            tensors = (x.float() if x.is_floating_point() else x for x in tensors)
            forward = *tensors, *arguments[5:], 1.0, *mask, None, True
            out, lse = (x.to(draw.device) for x in reference.attention_prefill(*forward))
            out = out.to(draw.dtype)
            grads = draw.randn(*out.shape), draw.randn(*lse.shape, dtype=torch.float32)
            yield *grads, *arguments[:3], out, lse, *arguments[3:], 1.0, *mask


def attention_decode(draw: Draw) -> Iterator[Arguments]:
    lengths = 1, 0, 45, 270  # the last is divided among blocks
    for head_dim in HEAD_DIMS:
        for new, group in ((1, 4), (3, 8)):
            seq_lens, q = draw.ints(*lengths), heads(draw, 4, new, 2 * group, head_dim)
            rows = [heads(draw, 4, 272, 2, head_dim) for _ in range(2)]
            for b, length in enumerate(lengths):
                for cache in rows:
                    cache[b, length:] = torch.nan
            yield q, *rows, None, None, seq_lens, None, 1.0, 0, False, 0.0, True
            yield q, *rows, None, None, seq_lens, None, 0.5, 33, False, 20.0, True
            k, v, table = paged(draw, lengths, 16, 2, head_dim)
            yield q, k, v, None, None, seq_lens, table, 1.0, 0, False, 0.0, False
            ring = [heads(draw, 4, 40, 2, head_dim) for _ in range(2)]
            yield q, *ring, None, None, seq_lens, None, 1.0, 37, True, 0.0, True
            if head_dim in CODED_HEAD_DIMS:
                yield q, *coded(rows), seq_lens, None, 1.0, 0, False, 0.0, True
                yield q, *coded([k, v]), seq_lens, table, 1.0, 33, False, 0.0, True


def qkv_attention_decode(draw: Draw) -> Iterator[Arguments]:
    lengths = 1, 0, 45, 270  # the last is divided among blocks
    for head_dim in HEAD_DIMS:
        weights = draw.weight(head_dim), draw.weight(head_dim)
        positions, inv_freq = (
            draw.ints(0, 0, 44, 900),
            1e4 ** -(torch.arange(head_dim // 2) / head_dim),
        )
        rope = *weights, positions, inv_freq.to(draw.device)
        counters = torch.zeros(4, 2, COUNTERS, dtype=torch.int32).to(draw.device)

        def qkv(group: int, head_dim: int = head_dim) -> tuple[Tensor, ...]:
            return draw.strided(4, 2 * group + 4, head_dim).split([2 * group, 2, 2], 1)

        rows = [heads(draw, 4, 272, 2, head_dim) for _ in range(2)]
        for b, length in enumerate(lengths):
            for cache in rows:
                cache[b, max(length - 1, 0) :] = torch.nan
        seq_lens, scale = draw.ints(*lengths), head_dim**-0.5
        whole = seq_lens, None, counters, EPS, scale, 0, False, 0.0
        yield *qkv(4), *rope, *rows, None, None, *whole
        if head_dim in CODED_HEAD_DIMS:
            # The new k and v of one size and not turned: no rounding makes another code of them.
            q, k, v = (x.sign() if i else x for i, x in enumerate(qkv(4)))
            still = weights[0], weights[1].sign(), positions, torch.zeros_like(rope[-1])
            yield q, k, v, *still, *coded(rows), *whole
            yield qkv(16)[0], k, None, *still, *coded(rows), *whole
        q, k, _ = qkv(16)
        k_pages, v_pages, table = paged(draw, lengths, 16, 2, head_dim)
        pages = k_pages, v_pages, None, None, seq_lens, table, counters
        yield q, k, None, *rope, *pages, EPS, scale, 33, False, 20.0
        ring = [heads(draw, 4, 40, 2, head_dim) for _ in range(2)]
        borrowed = None, None, weights[0], None, *rope[2:]
        seen = *ring, None, None, seq_lens, None, counters
        yield qkv(1)[0], *borrowed, *seen, EPS, scale, 37, True, 0.0
