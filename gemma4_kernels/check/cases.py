"""Small awkward calls of every op that has a kernel: one token, less than a tile, ragged, grouped,
strided, paged, in a ring. What an op must not read (the gaps of a stride, free slots) is NaN.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..e4m3 import to_e4m3
from ..ops.attention import HEAD_DIMS
from ..ops.decode import CODED_HEAD_DIMS
from ..ops.logits import sample_counters
from ..ops.moe import MOST_EXPERTS, MOST_ROUTES
from ..ops.rope import TRAINED_HEAD_DIMS
from ..opset import HALF
from ..packed import pack
from ..reference.decode import COUNTERS

HOST = torch.device("cpu")
EPS = 1e-6
Arguments = tuple[Any, ...]  # in the order of the op's schema


@dataclass
class Draw:
    """Random tensors in one dtype; the same ones on whatever device."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def others(self) -> list[torch.dtype]:
        """What x may meet: its own dtype, and fp32 as under autocast."""
        return list(dict.fromkeys((self.dtype, torch.float32)))

    @property
    def pairs(self) -> Iterator[tuple[torch.dtype, torch.dtype]]:
        """The dtypes of a residual or a table, and of the weights, which are no narrower."""
        return combinations_with_replacement(self.others, 2)

    def randn(
        self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * std + mean
        return x.to(self.device, dtype or self.dtype)

    def weight(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.randn(width, mean=1.0, std=0.3, dtype=dtype)

    def strided(self, *shape: int, std: float = 1.0) -> Tensor:
        """Rows that do not lie side by side."""
        width = shape[-1]
        wide = torch.full((*shape[:-1], width + 16), torch.nan, dtype=self.dtype).to(self.device)
        wide[..., :width] = self.randn(*shape, std=std)
        return wide[..., :width]

    def ints(self, *values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)


# Rows of one, two and four pieces of 16 bytes a thread, of none, and too wide for pieces of fp32.
WIDTHS = (77, 512, 1536, 3840, 5376)
# More rows than any card runs at once.
MANY = (1200, 2048)
SMALL = EPS**0.5  # values beside which eps counts


def rms_norm(draw: Draw) -> Iterator[Arguments]:
    for width in WIDTHS:
        for dtype in draw.others:
            yield draw.strided(3, width), draw.weight(width, dtype), EPS
        yield draw.strided(1, width), None, EPS
    yield draw.strided(*MANY, std=SMALL), None, EPS


def add_rms_norm(draw: Draw) -> Iterator[Arguments]:
    for width in WIDTHS:
        for other, dtype in draw.pairs:
            residual, scale = draw.randn(3, width, dtype=other), draw.randn(1, dtype=dtype)
            weights = (draw.weight(width, dtype) for _ in range(2))
            yield draw.strided(3, width), residual, *weights, scale, EPS
        unaligned = draw.randn(2, width + 16)[:, 1 : width + 1]
        yield draw.strided(2, width), unaligned, draw.weight(width), None, None, EPS
    x, residual = draw.strided(*MANY, std=SMALL), draw.strided(*MANY)
    weights = (draw.weight(MANY[1]) for _ in range(2))
    yield x, residual, *weights, draw.randn(1, mean=SMALL, std=0), EPS


# Rows that the kernels of gradients take, with 8 columns a thread and with 16; the last is no
# whole number of warps.
BACKWARD_WIDTHS = (512, 3840, 5376, 104)
# More rows than blocks that keep sums.
MANY_SUMMED = (600, 256)


def rms_norm_backward(draw: Draw) -> Iterator[Arguments]:
    for width in BACKWARD_WIDTHS:
        for dtype in draw.others:
            grad, x = draw.strided(3, width), draw.strided(3, width)
            yield grad, x, draw.weight(width, dtype), EPS, True, True
        yield draw.strided(2, width), draw.strided(2, width), None, EPS, True, False
    grad, x = draw.strided(*MANY_SUMMED), draw.strided(*MANY_SUMMED, std=SMALL)
    yield grad, x, draw.weight(MANY_SUMMED[1]), EPS, True, True


def add_rms_norm_backward(draw: Draw) -> Iterator[Arguments]:
    for width in BACKWARD_WIDTHS:
        for other, dtype in draw.pairs:
            grads = [draw.randn(3, width, dtype=other) for _ in range(2)]
            x, residual = draw.strided(3, width), draw.randn(3, width, dtype=other)
            weights = [draw.weight(width, dtype) for _ in range(2)]
            rest = *weights, draw.randn(1, dtype=dtype), EPS
            yield *grads, x, residual, *rest, True, True, True, True
        alone = draw.weight(width), None, None, EPS, True, False, False, False
        yield draw.strided(2, width), None, draw.strided(2, width), draw.randn(2, width), *alone
    rows = [draw.strided(*MANY_SUMMED) for _ in range(3)]
    weights = [draw.weight(MANY_SUMMED[1]) for _ in range(2)]
    rest = draw.strided(*MANY_SUMMED, std=SMALL), *weights, None, EPS, True, True, True, True
    yield *rows, *rest


def moe_norm(draw: Draw) -> Iterator[Arguments]:
    for width in WIDTHS:
        for other, dtype in draw.pairs:
            yield draw.strided(3, width), draw.weight(width, dtype), draw.weight(width, other), EPS
    yield draw.strided(*MANY, std=SMALL), draw.weight(MANY[1]), draw.weight(MANY[1]), EPS


def moe_norm_backward(draw: Draw) -> Iterator[Arguments]:
    for width in BACKWARD_WIDTHS:
        for other, dtype in draw.pairs:
            grads = draw.strided(3, width), draw.randn(3, width, dtype=other)
            weights = draw.weight(width, dtype), draw.weight(width, other)
            yield *grads, draw.strided(3, width), *weights, EPS, True, True, True
        weights = draw.weight(width), draw.weight(width)
        x = draw.strided(2, width)
        yield draw.strided(2, width), None, x, *weights, EPS, True, False, False
    grads = draw.strided(*MANY_SUMMED), draw.strided(*MANY_SUMMED)
    weights = draw.weight(MANY_SUMMED[1]), draw.weight(MANY_SUMMED[1])
    yield *grads, draw.strided(*MANY_SUMMED, std=SMALL), *weights, EPS, True, True, True


def qkv_norm_rope(draw: Draw) -> Iterator[Arguments]:
    for head_dim in (24, *HEAD_DIMS):
        std = SMALL if head_dim == 128 else 1.0
        q, k, v = draw.strided(3, 8, head_dim, std=std).split([4, 2, 2], 1)
        weights = draw.weight(head_dim), draw.weight(head_dim)
        pairs = head_dim // 2
        inv_freq = 1e4 ** -(torch.arange(pairs) / pairs)
        inv_freq[pairs // 4 * 3 :] = 0  # as full attention's, of which a part is left as it is
        rest = draw.ints(0, 7, 5000), inv_freq.to(draw.device), EPS
        yield q, k, v, *weights, *rest
        yield q, k, None, *(w.float() for w in weights), *rest
        yield q, None, None, weights[0], None, *rest


def qkv_norm_rope_backward(draw: Draw) -> Iterator[Arguments]:
    for q, k, v, q_weight, k_weight, *rest in qkv_norm_rope(draw):
        if q.shape[-1] in TRAINED_HEAD_DIMS:
            grads = [None if x is None else draw.randn(*x.shape) for x in (q, k, k)]
            yield *grads, q, k, v, q_weight, k_weight, *rest, True, k is not None
    q, k, v = draw.strided(600, 4, 256).split([2, 1, 1], 1)
    positions, inv_freq = torch.arange(600).to(draw.device), torch.ones(128).to(draw.device)
    last = draw.weight(256), draw.weight(256), positions, inv_freq, EPS, True, True
    yield draw.randn(*q.shape), None, draw.randn(*v.shape), q, k, v, *last


def coded(caches: list[Tensor]) -> tuple[Tensor, ...]:
    """Caches in e4m3, and their scales."""
    codes, scales = zip(*map(to_e4m3, caches), strict=True)
    return *codes, *scales


def qkv_norm_rope_cache(draw: Draw) -> Iterator[Arguments]:
    for q, k, *rest in qkv_norm_rope(draw):
        if k is not None:
            shape = (2, 4, *k.shape[1:])
            caches = [torch.full(shape, torch.nan).to(k) for _ in range(2)]
            yield q, k, *rest, *caches, None, None, draw.ints(6, -1, 1)
            if draw.dtype in HALF and q.shape[-1] in HEAD_DIMS:
                yield q, k, *rest, *coded(caches), draw.ints(6, -1, 1)


def geglu(draw: Draw) -> Iterator[Arguments]:
    for width in (1, 77, 512):
        yield (draw.strided(3, 2 * width),)


def geglu_backward(draw: Draw) -> Iterator[Arguments]:
    for width in (1, 77, 512):
        yield draw.strided(3, width), draw.strided(3, 2 * width)


def packed_weight(draw: Draw, *shape: int, eight: bool) -> list[Tensor]:
    """int4, or float8_e4m3fn, with scales of both kinds; what a schema has of it."""
    *rows, width = shape
    codes = torch.randint(16, shape, generator=draw.generator, dtype=torch.uint8)
    if eight:
        codes = torch.randn(shape, generator=draw.generator).to(torch.float8_e4m3fn)
    each = torch.rand((*rows, width // 32), generator=draw.generator).to(torch.bfloat16)
    row = torch.rand(rows, generator=draw.generator) * width**-0.5
    parts = pack(codes, each, row).parts
    return [part.to(draw.device) for part in parts if part is not None]


def linear_packed(draw: Draw) -> Iterator[Arguments]:
    # Streamed; tiles of 64 tokens, and of 128 where they are enough for the largest card.
    for tokens, width, rows in ((1, 192, 48), (70, 192, 144), (130, 64, 12_800)):
        for eight in (False, True):
            yield draw.strided(tokens, width), *packed_weight(draw, rows, width, eight=eight)


def linear_small(draw: Draw) -> Iterator[Arguments]:
    # Tiles of 8 rows; of 16, where there are two for every multiprocessor of the largest card.
    for tokens, width, rows, gated in (
        *((1, 72, 6400, False), (16, 200, 6400, False), (3, 5376, 16, False), (2, 256, 24, False)),
        *((9, 520, 40, True), (1, 72, 16, True)),
    ):
        height, std = 2 * rows if gated else rows, width**-0.5
        for opens in (False, True):
            residual = draw.strided(tokens, width) if opens else None
            post_weight = draw.weight(width) if opens else None
            norm_weight = draw.weight(width) if opens and rows != 24 else None
            scale = draw.randn(1, mean=0.3, std=0.1) if opens and gated else None
            factor = draw.strided(tokens, rows) if width == 256 else None
            x, weight = draw.strided(tokens, width), draw.randn(height, width, std=std)
            two = opens and tokens == 1
            other = draw.strided(tokens, width) if two else None
            x_weight, other_weight = (draw.weight(width) if two else None for _ in range(2))
            norms = residual, post_weight, scale, norm_weight, factor, x_weight, other, other_weight
            yield x, weight, None, None, *norms, EPS, gated
    # Packed ones: all that stands before and behind them; a tile a block, or two.
    for tokens, rows, gated in ((2, 32, False), (10, 64, True), (1, 12_800, False)):
        for eight in (False, True):
            x = draw.strided(tokens, 64)
            parts = packed_weight(draw, rows * (1 + gated), 64, eight=eight)
            opening = draw.strided(tokens, 64), draw.weight(64), None, draw.weight(64)
            yield x, *parts, *opening, *([None] * 4), EPS, gated
            yield x, *parts, *([None] * 8), EPS, gated


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


def moe_route(draw: Draw) -> Iterator[Arguments]:
    for experts, k in ((5, 5), (128, 8), (MOST_EXPERTS, MOST_ROUTES)):
        for dtype in draw.others:
            logits = torch.stack([draw.permutation(experts) for _ in range(3)]) / experts * 8
            logits[1, 1] = logits[1, 0]  # of equals the first comes first
            logits[2] = 0
            yield logits.to(draw.device, draw.dtype), draw.weight(experts, dtype), k


def moe_experts(draw: Draw) -> Iterator[Arguments]:
    # Weights streamed past up to 8 and up to 32 tokens, tiles of 64 and of 128 assignments.
    for tokens, experts, k in ((1, 5, 2), (12, 16, 2), (20, 2, 1), (133, 2, 1)):
        for dtype in draw.others:
            yield dense_experts(draw, tokens, experts, k, dtype)
    # Packed ones, whose tiles have one height.
    for tokens in (1, 12, 20):
        for eight in (False, True):
            yield (
                draw.strided(tokens, 64),
                *packed_weight(draw, 2, 128, 64, eight=eight),
                *packed_weight(draw, 2, 64, 64, eight=eight),
                (torch.arange(tokens)[:, None] % 3).to(draw.device),
                draw.randn(tokens, 1, mean=0.5, std=0.1, dtype=torch.float32),
            )


def dense_experts(draw: Draw, tokens: int, experts: int, k: int, dtype: torch.dtype) -> Arguments:
    width, hidden = 72, 40
    chosen = torch.stack([draw.permutation(experts + 1)[:k] for _ in range(tokens)])
    return (
        draw.strided(tokens, width),
        *(draw.randn(experts, 2 * hidden, width, std=width**-0.5, dtype=dtype), None, None),
        *(draw.randn(experts, width, hidden, std=hidden**-0.5, dtype=dtype), None, None),
        chosen.to(draw.device),  # the last is one that lives elsewhere
        draw.randn(tokens, k, mean=0.5, std=0.1, dtype=torch.float32),
    )


def moe_experts_backward(draw: Draw) -> Iterator[Arguments]:
    every, frozen, no_routing = (True,) * 4, (True, False, False, True), (True, True, True, False)
    # Experts of nobody and of less than a stage; with more than a tile of assignments sums are of
    # enough for errors of 16 bits to have a size, in fp32 too, but each token's routing weight has
    # one that may cancel.
    few = [(5, 16, 8, draw.dtype, wanted) for wanted in (every, frozen)]
    many = [(333, 2, 1, dtype, no_routing) for dtype in draw.others]
    for tokens, experts, k, dtype, wanted in (*few, *many):
        *forward, weights = dense_experts(draw, tokens, experts, k, dtype)
        # The weights in the dtype in which their gradient is as exact as the others.
        yield draw.strided(tokens, 72), *forward, weights.to(draw.dtype), *wanted


def moe_open(draw: Draw) -> Iterator[Arguments]:
    for tokens, width, rows, experts in ((1, 72, 24, 8), (3, 2816, 16, 32), (16, 520, 2400, 16)):
        std = width**-0.5
        weights = [draw.weight(width) for _ in range(4)]
        yield (
            *(draw.strided(tokens, width), draw.strided(tokens, width), *weights[:2]),
            *(draw.randn(2 * rows, width, std=std), None, None),
            *weights[2:],
            draw.randn(experts, width),
            EPS,
        )
    for eight in (False, True):
        x, residual = draw.strided(3, 64), draw.strided(3, 64)
        weights = [draw.weight(64) for _ in range(4)]
        gate_up = packed_weight(draw, 64, 64, eight=eight)
        yield x, residual, *weights[:2], *gate_up, *weights[2:], draw.randn(8, 64), EPS


def moe_experts_small(draw: Draw) -> Iterator[Arguments]:
    for tokens, experts, k, width, hidden in ((1, 8, 2, 72, 24), (8, 128, 8, 528, 40)):
        for more in (0, 8):
            logits = torch.stack([draw.permutation(experts) for _ in range(tokens + more)])
            logits[0, 1] = logits[0, 0]  # of equals the first comes first
            yield (
                draw.strided(tokens + more, width),
                *(draw.randn(experts, 2 * hidden, width, std=width**-0.5), None, None),
                *(draw.randn(experts, width, hidden, std=hidden**-0.5), None, None),
                (logits / experts * 8).to(draw.device, draw.dtype),
                draw.weight(experts, torch.float32),
                k,
                draw.strided(tokens + more, 136),
                *(draw.randn(width, 136, std=0.1), None, None),
            )
    for tokens in (2, 10):
        for eight in (False, True):
            logits = torch.stack([draw.permutation(4) for _ in range(tokens)])
            yield (
                draw.strided(tokens, 64),
                *packed_weight(draw, 4, 128, 64, eight=eight),
                *packed_weight(draw, 4, 64, 64, eight=eight),
                logits.to(draw.device, draw.dtype),
                draw.weight(4, torch.float32),
                2,
                draw.strided(tokens, 64),
                *packed_weight(draw, 64, 64, eight=eight),
            )


def ple_embed(draw: Draw) -> Iterator[Arguments]:
    for width in (77, 128, 256, 512):
        for other, dtype in draw.pairs:
            table = draw.randn(5, 2 * width, dtype=other)
            table[2] = torch.nan  # nobody's
            if width == 256 and draw.device.type == "cuda":
                table = table.cpu().pin_memory()
            projected = draw.strided(5, 2 * width, std=SMALL if width == 128 else 1.0)
            yield draw.ints(4, 0, 5, -1, 3), table, projected, draw.weight(width, dtype), EPS


def ple_gate(draw: Draw) -> Iterator[Arguments]:
    for width in (77, 256):
        for dtype in draw.others:
            ple = torch.full((3, 4, width), torch.nan, dtype=dtype).to(draw.device)
            ple[:, 2] = draw.randn(3, width, dtype=dtype)
            yield draw.strided(3, width), ple, 2


def ple_gate_backward(draw: Draw) -> Iterator[Arguments]:
    for gate, ple, layer in ple_gate(draw):
        for wanted in ((True, True), (True, False), (False, True)):
            yield draw.randn(*gate.shape, dtype=ple.dtype), gate, ple, layer, *wanted


def softcap(draw: Draw) -> Iterator[Arguments]:
    for width in (1, 97, 1024):
        yield draw.strided(3, width, std=20.0), 30.0


def softcap_argmax(draw: Draw) -> Iterator[Arguments]:
    for width in (7, 96, 1031):
        logits = draw.strided(3, width).clamp_(-3, 3)
        logits[0, 5] = logits[0, 6] = 8
        logits[1, -1] = 8
        logits[2, 3] = logits[2, 4] = torch.nan
        yield logits, 30.0
        yield -1.0 - draw.permutation(width).to(draw.device, draw.dtype)[None], 30.0


def softcap_cross_entropy(draw: Draw) -> Iterator[Arguments]:
    for vocab_size in (7, 1031, 20_000):
        for cap in (0.0, 30.0):
            logits = draw.strided(4, vocab_size, std=8.0)
            logits[1] = torch.nan  # ignored, and not read
            yield logits, draw.ints(0, -100, vocab_size - 1, 3), cap


def softcap_cross_entropy_backward(draw: Draw) -> Iterator[Arguments]:
    for logits, targets, cap in softcap_cross_entropy(draw):
        lse = reference.softcap_cross_entropy(logits.to(HOST).float(), targets.to(HOST), cap)[1]
        grads = (draw.randn(4, dtype=torch.float32) for _ in range(2))
        d_logits = torch.full(logits.shape, torch.nan, dtype=draw.dtype).to(draw.device)
        yield logits, targets, lse.to(draw.device), *grads, cap, d_logits


def sample(draw: Draw) -> Iterator[Arguments]:
    for vocab_size in (7, 96, 4104, 20_000):  # parts of a row: one, three, ten
        for options in (0.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (0.5, 5, 0.4, 0.01):
            logits = draw.strided(3, vocab_size).clamp_(-2, 2)
            logits[:, -1] = logits[:, 3] = 8  # of equals the first is the best
            if options[0]:  # none but one is drawn, by the twin in float64 too
                logits[:, 3] = 40
            rows = draw.ints(-1, 5, 1 << 40, dtype=torch.int64), draw.ints(0, 7, 9)
            ids, done = (draw.ints(0, 0, i, dtype=torch.int64) for i in (0, 1))
            eos = draw.ints(96, 3, dtype=torch.int64)
            state = *rows, ids, done, sample_counters(logits), eos
            yield logits, *state, 0.0 if options[0] else 50.0, *options, 2


CASES: dict[str, Callable[[Draw], Iterator[Arguments]]] = {
    function.__name__: function
    for function in (
        rms_norm,
        rms_norm_backward,
        add_rms_norm,
        add_rms_norm_backward,
        moe_norm,
        moe_norm_backward,
        qkv_norm_rope,
        qkv_norm_rope_backward,
        qkv_norm_rope_cache,
        geglu,
        geglu_backward,
        linear_packed,
        linear_small,
        attention_prefill,
        attention_prefill_backward,
        attention_decode,
        qkv_attention_decode,
        moe_route,
        moe_experts,
        moe_experts_backward,
        moe_open,
        moe_experts_small,
        ple_embed,
        ple_gate,
        ple_gate_backward,
        softcap,
        softcap_argmax,
        softcap_cross_entropy,
        softcap_cross_entropy_backward,
        sample,
    )
}
