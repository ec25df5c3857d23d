"""Small awkward calls of every op that has a kernel: one token, less than a tile, ragged, grouped,
strided, paged, in a ring. What an op must not read (the gaps of a stride, free slots) is NaN.
"""

from collections.abc import Callable, Iterator

import torch

from .. import reference
from ..ops.attention import HEAD_DIMS
from ..ops.logits import sample_counters
from ..ops.rope import TRAINED_HEAD_DIMS
from ..opset import HALF
from .attention import (
    attention_decode,
    attention_prefill,
    attention_prefill_backward,
    qkv_attention_decode,
)
from .draw import EPS, HOST, Arguments, Draw, coded, packed_weight
from .experts import moe_experts, moe_experts_backward, moe_experts_small, moe_open, moe_route

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
