"""Lengths that break what attention expects, which only the device knows: every row is written, no
row of another sequence changes, and nothing past the memory is touched.

The emulator stops at any access out of bounds; what torch allocates without filling it holds NaN.
"""

import pytest
import torch
from support.attention import check
from support.backends import BF16

kernels = pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)
pytestmark = [kernels, pytest.mark.usefixtures("poisoned_memory")]
TOKENS, HEADS, HEAD_DIM = 60, 4, 64


def prefill(backend, cu_q, cu_k, longest, tokens=TOKENS, **options):
    """(out, lse), q, k, v of a call whose lengths are as given; keys have 40 slots more."""
    q = backend.randn(tokens, HEADS, HEAD_DIM, dtype=BF16, std=0.3)
    k = backend.randn(tokens + 40, 2, HEAD_DIM, dtype=BF16, std=0.3)
    v = backend.randn(tokens + 40, 2, HEAD_DIM, dtype=BF16)
    result = backend.ops.attention_prefill(
        q,
        k,
        v,
        backend.int32(*cu_q),
        backend.int32(*cu_k),
        longest,
        tokens + 40,
        return_lse=True,
        **options,
    )
    return result, q, k, v


CASES = {  # cu_seqlens, max_seqlen_q, rows of q that see rows of k, rows that are 0
    "end early": ([0, 20, 50], 30, [((0, 20), (0, 20)), ((20, 50), (20, 50))], (50, 60)),
    "begin late": ([7, 20, 60], 40, [((7, 20), (7, 20)), ((20, 60), (20, 60))], (0, 7)),
    "one is longer than said": (
        [0, 10, 60],
        20,
        [((0, 10), (0, 10)), ((10, 30), (10, 30))],
        (30, 60),
    ),
    "no sequence": ([0], 0, [], (0, 60)),
    "none has a token": ([0, 0], 0, [], (0, 60)),
    "none may have a token": ([0, 20, 60], 0, [], (0, 60)),
    "past the memory": ([0, 20, 90], 60, [((0, 20), (0, 20)), ((20, 60), (20, 90))], (0, 0)),
    "decreasing": ([0, 60, 30], 60, [((0, 60), (0, 60))], (0, 0)),
    "below zero": ([-30, 60], 60, [((0, 60), (0, 60))], (0, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_of_no_sequence_are_zero(backend, case):
    cu, longest, seen, unowned = CASES[case]
    (out, lse), q, k, v = prefill(backend, cu, cu, longest)
    assert out.isfinite().all() and not lse.isnan().any()
    for queries, keys in seen:
        own, keys = slice(*queries), slice(*keys)
        check((out[own], lse[:, own]), q[own], k[keys], v[keys])
    zero = slice(*unowned)
    assert (out[zero] == 0).all() and (lse[:, zero] == -torch.inf).all()


@pytest.mark.parametrize(
    "cu_k", [(0, 30, 2**31 - 1), (-(2**31), 30, 60), (90, 30, 60), (2**31 - 1, -5, 200)], ids=str
)
def test_keys_past_the_memory_are_not_read(backend, cu_k):
    (out, lse), *_ = prefill(backend, (0, 20, 60), cu_k, 40)
    assert out.isfinite().all() and not lse.isnan().any()


def test_keys_are_cut_where_the_memory_ends(backend):
    (out, lse), q, k, v = prefill(backend, (0, 20, 60), (0, 60, 1000), 40)
    check((out[20:], lse[:, 20:]), q[20:], k[60:], v[60:])


@pytest.mark.parametrize("cu_q", [(5, 60), (0, 50), (0, 60, 30), (0, 20, 90), (-9, 60)], ids=str)
def test_gradients_of_rows_of_no_sequence_are_zero(backend, cu_q):
    leaves = [
        backend.randn(60, heads, HEAD_DIM, dtype=BF16, std=0.3).requires_grad_()
        for heads in (HEADS, 2, 2)
    ]
    cu = backend.int32(*cu_q)
    out, _ = backend.ops.attention_prefill(*leaves, cu, cu, 60, 60)
    out.float().square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    outside = [t for t in range(60) if t < cu_q[0] or t >= max(cu_q)]
    assert all((leaf.grad[outside] == 0).all() for leaf in leaves)


@pytest.mark.parametrize("layout", ["rows", "pages"])
def test_decode_of_lengths_past_the_memory_and_below_zero(backend, layout):
    """The memory's size counts as the length, and nothing as a length below zero."""
    slots, lengths = 48, (1000, -7, 2**31 - 1, 48)
    q = backend.randn(4, 2, HEADS, HEAD_DIM, dtype=BF16, std=0.3)
    k = backend.randn(4, slots, 2, HEAD_DIM, dtype=BF16, std=0.3)
    v = backend.randn(4, slots, 2, HEAD_DIM, dtype=BF16)
    pages = None
    if layout == "pages":
        k, v = k.view(12, 16, 2, HEAD_DIM), v.view(12, 16, 2, HEAD_DIM)
        pages = backend.to(torch.arange(12, dtype=torch.int32).view(4, 3))
    out, lse = backend.ops.attention_decode(q, k, v, backend.int32(*lengths), pages)
    rows_k, rows_v = (x.view(4, slots, 2, HEAD_DIM) for x in (k, v))
    for b in (0, 2, 3):
        check((out[b], lse[b]), q[b], rows_k[b], rows_v[b])
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("shape", [(0, 1), (0, 3), (2, 0), (0, 0)], ids=str)
def test_decode_of_nothing(backend, shape):
    batch, new_tokens = shape
    q = backend.randn(batch, new_tokens, HEADS, HEAD_DIM, dtype=BF16)
    cache = backend.randn(batch, 8, 2, HEAD_DIM, dtype=BF16)
    out, lse = backend.ops.attention_decode(q, cache, cache, backend.int32(*[8] * batch))
    assert out.shape == q.shape and lse.shape == (batch, HEADS, new_tokens)
