"""Small awkward calls of what routes tokens to experts, and of the experts."""

from collections.abc import Iterator

import torch

from ..ops.moe import MOST_EXPERTS, MOST_ROUTES
from .draw import EPS, Arguments, Draw, packed_weight


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
