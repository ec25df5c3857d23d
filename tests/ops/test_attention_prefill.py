"""Prefill attention: forward, pages, memory.

Longer than 400 lines because one table of cases serves all of these tests.
"""

import subprocess
import sys
from itertools import accumulate

import pytest
import torch
from support import float64
from support.backends import EAGER
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # queries and keys of each sequence, query heads, KV heads, C, options
    "no sequence": ([], 4, 2, 64, {}),
    "no tokens": ([(0, 0)], 4, 2, 64, {}),
    "one token": ([(1, 1)], 4, 2, 64, {}),
    "below a tile": ([(7, 7)], 4, 2, 64, {}),
    "exact tile": ([(64, 64)], 4, 2, 64, {}),
    "ragged": ([(67, 67)], 4, 4, 128, {}),
    "packed": ([(5, 5), (0, 0), (19, 19), (1, 1)], 4, 2, 64, {}),
    "tail of the keys": ([(3, 40), (1, 7), (0, 5), (17, 33)], 4, 1, 64, {}),
    "all queries see all": ([(9, 9), (4, 11)], 4, 2, 64, dict(causal=False)),
    "window": ([(40, 40), (5, 33)], 4, 2, 64, dict(window=8)),
    "window of one": ([(12, 12)], 4, 2, 64, dict(window=1)),
    "window as long as the keys": ([(9, 9), (10, 10), (11, 11)], 2, 1, 64, dict(window=10)),
    "window of many tiles": ([(150, 150)], 2, 1, 64, dict(window=70)),
    "both sides": ([(30, 30), (4, 21)], 4, 2, 64, dict(causal=False, window=6, window_right=3)),
    "right only": ([(30, 30), (4, 21)], 4, 2, 64, dict(causal=False, window_right=3)),
    "right of zero": ([(30, 30)], 4, 2, 64, dict(causal=False, window_right=0)),
    "left only": ([(30, 30)], 4, 2, 64, dict(causal=False, window=6)),
    "left only, no or one key out": (
        [(2, 30), (6, 6), (7, 7), (2, 7)],
        4,
        2,
        64,
        dict(causal=False, window=6),
    ),
    "scale": ([(21, 21)], 4, 2, 64, dict(scale=0.125)),
    "softcap": ([(21, 21), (3, 30)], 4, 2, 64, dict(softcap=4.0)),
    "all options": ([(21, 21), (3, 30)], 4, 2, 64, dict(scale=2.0, softcap=4.0, window=7)),
    "more queries than keys": ([(9, 4), (3, 0), (6, 5)], 4, 2, 64, {}),
    "more queries, window": ([(9, 4), (3, 0)], 4, 2, 64, dict(window=2)),
    "more queries, both sides": (
        [(9, 4), (3, 0)],
        4,
        2,
        64,
        dict(causal=False, window=3, window_right=2),
    ),
    "sliding heads": ([(37, 37), (2, 50)], 8, 4, 256, dict(window=16)),
    "full heads": ([(37, 37), (2, 50)], 8, 1, 512, {}),
}


def inputs(backend, case, dtype, std=0.5):
    lengths, heads, kv_heads, head_dim, options = CASES[case]
    queries, keys = [n for n, _ in lengths], [s for _, s in lengths]
    # Scores of a size of about 2 to 6: neither uniform nor all on one key.
    arguments = {
        "q": backend.randn(sum(queries), heads, head_dim, dtype=dtype, std=std),
        "k": backend.randn(sum(keys), kv_heads, head_dim, dtype=dtype, std=std),
        "v": backend.randn(sum(keys), kv_heads, head_dim, dtype=dtype),
        "cu_seqlens_q": backend.int32(*accumulate(queries, initial=0)),
        "cu_seqlens_k": backend.int32(*accumulate(keys, initial=0)),
    }
    longest = dict(max_seqlen_q=max(queries, default=0), max_seqlen_k=max(keys, default=0))
    return arguments, longest, options


def assert_attention(actual, arguments, options, dtype):
    """Compares (out, lse) of packed or gathered sequences; lse may be None."""
    out, lse = actual
    exact, exact_lse = float64.attention_packed(**arguments, **options)
    rounded, _ = float64.attention_packed(**arguments, **options, dtype=dtype)
    # An error of a score is one of its weight; scores are sums of C products.
    terms = arguments["q"].shape[-1]
    assert_close_to_float64(out, exact, dtype, rounded=rounded, terms=terms, magnitude=4.0)
    if lse is not None:
        wide = torch.promote_types(dtype, torch.float32)
        assert_close_to_float64(lse, exact_lse, wide, terms=terms, magnitude=10.0)  # of a score


@all_dtypes
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("case", CASES)
def test_attention_prefill(backend, poisoned_memory, case, return_lse, dtype):
    arguments, longest, options = inputs(backend, case, dtype)
    out, lse = backend.ops.attention_prefill(
        **arguments, **longest, **options, return_lse=return_lse
    )
    assert (lse is not None) == return_lse
    assert out.is_contiguous()
    assert_attention((out, lse), arguments, options, dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
def test_many_row_blocks(backend, monkeypatch, head_dim, return_lse):
    """Row blocks smaller than the sequence, window edges inside, before and after them."""
    monkeypatch.setattr("gemma4_kernels.reference.attention.FUSED_ROWS", 16)
    monkeypatch.setattr("gemma4_kernels.reference.attention.SCORE_ELEMENTS", 1)
    cu_seqlens = backend.int32(0, 70, 103)
    for options in (
        {},
        dict(window=9),
        dict(window=33),
        dict(causal=False, window=5, window_right=20),
        dict(causal=False),
    ):
        arguments = {
            "q": backend.randn(103, 2, head_dim, std=0.4),
            "k": backend.randn(103, 1, head_dim, std=0.4),
            "v": backend.randn(103, 1, head_dim),
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
        }
        actual = backend.ops.attention_prefill(
            **arguments, max_seqlen_q=70, max_seqlen_k=70, return_lse=return_lse, **options
        )
        assert_attention(actual, arguments, options, torch.float32)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_group_size_at_head_dim_512(backend, group, dtype):
    arguments = {
        "q": backend.randn(19, 2 * group, 512, dtype=dtype, std=0.3),
        "k": backend.randn(19, 2, 512, dtype=dtype, std=0.3),
        "v": backend.randn(19, 2, 512, dtype=dtype),
        "cu_seqlens_q": backend.int32(0, 19),
        "cu_seqlens_k": backend.int32(0, 19),
    }
    for return_lse in (False, True):
        actual = backend.ops.attention_prefill(
            **arguments, max_seqlen_q=19, max_seqlen_k=19, return_lse=return_lse
        )
        assert_attention(actual, arguments, {}, dtype)


PAGED = {  # page size, queries and keys of each sequence, options
    "exact pages": (4, [(8, 8), (4, 4)], {}),
    "last page part full": (4, [(5, 9), (1, 3), (7, 7)], {}),
    "page of one": (1, [(3, 5)], {}),
    "one page": (64, [(3, 5), (11, 30)], {}),
    "empty sequences": (4, [(0, 0), (2, 6), (0, 3), (2, 0)], {}),
    "window": (4, [(3, 30), (9, 9)], dict(window=6)),
    "both sides": (4, [(3, 30), (9, 9)], dict(causal=False, window=6, window_right=2)),
    "softcap": (8, [(3, 30)], dict(softcap=5.0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("order", ["in order", "out of order"])
@pytest.mark.parametrize("case", PAGED)
def test_paged(backend, poisoned_memory, case, order, return_lse, dtype):
    """Slots that no query sees hold NaN, table entries past the last page no page number."""
    page_size, lengths, options = PAGED[case]
    queries, keys = [n for n, _ in lengths], [s for _, s in lengths]
    arguments = {
        "q": backend.randn(sum(queries), 4, 64, dtype=dtype, std=0.5),
        "k": backend.randn(sum(keys), 2, 64, dtype=dtype, std=0.5),
        "v": backend.randn(sum(keys), 2, 64, dtype=dtype),
        "cu_seqlens_q": backend.int32(*accumulate(queries, initial=0)),
        "cu_seqlens_k": backend.int32(*accumulate(keys, initial=0)),
    }
    pages = sum(-(-s // page_size) for s in keys) + 3
    free = (torch.arange(pages) if order == "in order" else torch.randperm(pages)).tolist()
    k_cache = backend.nan(pages, page_size, 2, 64, dtype=dtype)
    v_cache = k_cache.clone()
    table = torch.full((len(lengths), 1 + max(-(-s // page_size) for s in keys)), -(2**20))
    starts = list(accumulate(keys, initial=0))
    for b, (num_queries, num_keys) in enumerate(lengths):
        for j in range(-(-num_keys // page_size)):
            table[b, j] = free.pop(0)
        first = num_keys - num_queries - options.get("window", num_keys) + 1
        for j in range(max(0, first if "window" in options else 0), num_keys):
            page, slot = table[b, j // page_size], j % page_size
            k_cache[page, slot] = arguments["k"][starts[b] + j]
            v_cache[page, slot] = arguments["v"][starts[b] + j]
    actual = backend.ops.attention_prefill(
        **(arguments | {"k": k_cache, "v": v_cache}),
        max_seqlen_q=max(queries),
        max_seqlen_k=max(keys),
        block_table=backend.to(table.int()),
        return_lse=return_lse,
        **options,
    )
    assert_attention(actual, arguments, options, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("view", ["packed projection", "heads outermost", "channels apart"])
def test_strided(backend, view, return_lse, dtype):
    tokens, heads, kv_heads, head_dim = 23, 4, 2, 64
    arguments = {"cu_seqlens_q": backend.int32(0, 9, 23), "cu_seqlens_k": backend.int32(0, 9, 23)}
    if view == "packed projection":
        packed = backend.randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, std=0.5)
        q, k, v = packed.split([heads, kv_heads, kv_heads], 1)
    elif view == "heads outermost":
        packed = backend.randn(heads + 2 * kv_heads, tokens, head_dim, dtype=dtype, std=0.5)
        q, k, v = packed.transpose(0, 1).split([heads, kv_heads, kv_heads], 1)
    else:
        packed = backend.randn(tokens, head_dim, heads + 2 * kv_heads, dtype=dtype, std=0.5)
        q, k, v = packed.transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    arguments |= {"q": q, "k": k, "v": v}
    out, lse = backend.ops.attention_prefill(
        **arguments, max_seqlen_q=14, max_seqlen_k=14, window=6, return_lse=return_lse
    )
    assert out.is_contiguous()
    assert_attention((out, lse), arguments, dict(window=6), dtype)


MEMORY = """
import sys, torch
from gemma4_kernels import attention_prefill

device, window, return_lse = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "lse"

def peak():
    if device == "cuda":
        return torch.cuda.max_memory_allocated() >> 10
    # Not getrusage, whose peak a child process inherits.
    status = open("/proc/self/status").read().split("VmHWM:")[1]
    return int(status.split()[0])

def grown(length):
    before = peak()
    q, k, v = (torch.zeros(length, h, 512, device=device) for h in (8, 1, 1))
    cu = torch.tensor([0, length], dtype=torch.int32, device=device)
    attention_prefill(q, k, v, cu, cu, length, length, window=window, return_lse=return_lse)
    return peak() - before

grown(64)
print(grown(int(sys.argv[4])))
"""


@pytest.mark.parametrize(
    ("window", "output", "lengths"),
    [
        pytest.param(0, "out", (4096, 8192), marks=pytest.mark.slow),
        pytest.param(0, "lse", (4096, 8192), marks=pytest.mark.slow),
        pytest.param(64, "out", (4096, 8192)),
        pytest.param(64, "lse", (4096, 8192)),
    ],
)
def test_memory_is_linear_in_the_length(device_backend, window, output, lengths):
    """The scores of 8 heads would need 0.5 GB at 4,096 tokens, four times that at 8,192."""

    def grown(length):
        command = [
            sys.executable,
            "-c",
            MEMORY,
            device_backend.device,
            str(window),
            output,
            str(length),
        ]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    short, long = (grown(length) for length in lengths)
    assert long < 2.2 * short
    assert short < 400 << 10, f"{short} KB for {lengths[0]} tokens of 72 KB each"


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
def test_grouped_heads_equal_repeated_ones(backend, return_lse):
    arguments = {
        "q": backend.randn(90, 8, 512, std=0.3),
        "k": backend.randn(90, 1, 512, std=0.3),
        "v": backend.randn(90, 1, 512),
        "cu_seqlens_q": backend.int32(0, 90),
        "cu_seqlens_k": backend.int32(0, 90),
    }
    options = dict(max_seqlen_q=90, max_seqlen_k=90, return_lse=return_lse)
    out, _ = backend.ops.attention_prefill(**arguments, **options)
    for name in ("k", "v"):
        arguments[name] = arguments[name].repeat(1, 8, 1)
    repeated, _ = backend.ops.attention_prefill(**arguments, **options)
    assert_close_to_float64(out, repeated.double().cpu(), torch.float32, terms=512, magnitude=4.0)


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_keys_outside_the_window_are_not_read(backend, queries, return_lse):
    arguments = {
        "q": backend.randn(queries, 4, 64, std=0.5),
        "k": backend.randn(40, 2, 64, std=0.5),
        "v": backend.randn(40, 2, 64),
        "cu_seqlens_q": backend.int32(0, queries),
        "cu_seqlens_k": backend.int32(0, 40),
    }
    first_seen = 40 - queries - 8 + 1
    for name in ("k", "v"):
        arguments[name][:first_seen] = float("nan")
    actual = backend.ops.attention_prefill(
        **arguments, max_seqlen_q=queries, max_seqlen_k=40, window=8, return_lse=return_lse
    )
    assert_attention(actual, arguments, dict(window=8), torch.float32)


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
def test_other_sequences_are_not_read(backend, return_lse):
    arguments, longest, _ = inputs(backend, "packed", torch.float32)
    for name in ("q", "k", "v"):
        arguments[name][5:24] = float("nan")
    out, _ = backend.ops.attention_prefill(**arguments, **longest, return_lse=return_lse)
    assert out[:5].isfinite().all() and out[24:].isfinite().all()


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("window", [0, 1, 7, 8, 9, 20, 21])
def test_window_counts_keys(backend, window, return_lse):
    """Values that are unit vectors show the weights: query i gives one to min(i + 1, W) keys."""
    tokens = 20
    value = torch.eye(tokens, 64)[:, None]
    out, _ = backend.ops.attention_prefill(
        backend.randn(tokens, 1, 64, std=0.2),
        backend.randn(tokens, 1, 64, std=0.2),
        backend.to(value),
        backend.int32(0, tokens),
        backend.int32(0, tokens),
        tokens,
        tokens,
        window=window,
        return_lse=return_lse,
    )
    weights = out[:, 0, :tokens].cpu()
    for i, row in enumerate(weights):
        first = max(0, i - (window or tokens) + 1)
        assert row.nonzero().flatten().tolist() == list(range(first, i + 1))


def two_keys(backend, scores, return_lse, **options):
    """Weights that one query gives to two keys of these scores."""
    keys = torch.zeros(2, 1, 64)
    keys[:, 0, 0] = torch.tensor(scores)
    query, value = torch.zeros(1, 1, 64), torch.eye(2, 64)[:, None]
    query[0, 0, 0] = 1.0
    q, k, v = (backend.to(x) for x in (query, keys, value))
    out, _ = backend.ops.attention_prefill(
        q, k, v, backend.int32(0, 1), backend.int32(0, 2), 1, 2, return_lse=return_lse, **options
    )
    return out[0, 0, :2].tolist()


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
def test_scale_is_one(backend, return_lse):
    weights = two_keys(backend, (3.0, 0.0), return_lse)
    assert weights == pytest.approx([0.952574, 0.047426], abs=1e-6)


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
def test_no_softcap_unless_asked(backend, return_lse):
    assert two_keys(backend, (200.0, 100.0), return_lse)[1] < 1e-30
    # 50 tanh(4) - 50 tanh(2) = 1.765085
    weights = two_keys(backend, (200.0, 100.0), return_lse, softcap=50.0)
    assert weights == pytest.approx([0.853846, 0.146154], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_a_query_without_keys_gives_zero(backend, poisoned_memory, causal, dtype):
    """Nine queries on four keys: five stand before the first key; then three on none."""
    arguments, longest, _ = inputs(backend, "more queries than keys", dtype)
    options = dict(causal=causal, **({} if causal else dict(window_right=0)))
    out, lse = backend.ops.attention_prefill(**arguments, **longest, **options, return_lse=True)
    blind = [0, 1, 2, 3, 4, 9, 10, 11, 12]
    assert (out[blind] == 0).all() and (lse[:, blind] == -float("inf")).all()
    seeing = [t for t in range(18) if t not in blind]
    assert out[seeing].isfinite().all() and lse[:, seeing].isfinite().all()


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
def test_large_scores(backend, return_lse):
    """exp(1000) overflows unless the largest score is taken off first."""
    # fp32 knows a score of 2,000 to 1e-4, and a weight here is a fifth as sensitive.
    for score in (1000.0, -2000.0):
        weights = two_keys(backend, (score, score - 1.0), return_lse)
        assert weights == pytest.approx([0.731059, 0.268941], abs=5e-5)


def test_same_bits_every_time(backend):
    arguments, longest, options = inputs(backend, "full heads", torch.bfloat16)
    first, _ = backend.ops.attention_prefill(**arguments, **longest, **options)
    for _ in range(3):
        again, _ = backend.ops.attention_prefill(**arguments, **longest, **options)
        assert torch.equal(first, again)


def bad_inputs(backend):
    arguments, longest, _ = inputs(backend, "tail of the keys", torch.float32)
    return arguments | longest


BAD = {
    "integer q": ({"q": lambda q: q.int()}, TypeError, "q must be a floating.*got torch.int32"),
    "batched q": (
        {"q": lambda q: q[None]},
        ValueError,
        r"q must be \[T, H, C\], got \[1, 21, 4, 64\]",
    ),
    "batched k": (
        {"k": lambda k: k[None]},
        ValueError,
        r"k must be \[T, G, C\], got \[1, 85, 1, 64\]",
    ),
    "k dtype": (
        {"k": lambda k: k.half()},
        TypeError,
        "k must have the dtype of q, torch.float32, got torch.float16",
    ),
    "k head": ({"k": lambda k: k[..., :32]}, ValueError, "k .* head_dim of q, 64, got 32"),
    "k device": (
        {"k": lambda k: k.to("meta")},
        ValueError,
        "k must be on the device of q, c.*, got meta",
    ),
    "v dtype": (
        {"v": lambda v: v.double()},
        TypeError,
        "v must have the dtype of q, torch.float32, got torch.float64",
    ),
    "v tokens": (
        {"v": lambda v: v[:80]},
        ValueError,
        r"v must have shape \[85, 1, 64\], got \[80, 1, 64\]",
    ),
    "heads": (
        {name: lambda x: x.expand(-1, 3, -1) for name in "kv"},
        ValueError,
        "query heads must be a multiple of the KV heads, got 4 and 3",
    ),
    "no KV heads": (
        {name: lambda x: x[:, :0] for name in "kv"},
        ValueError,
        "query heads must be a multiple of the KV heads, got 4 and 0",
    ),
    "cu_seqlens_q dtype": (
        {"cu_seqlens_q": lambda c: c.long()},
        TypeError,
        "cu_seqlens_q must be int32, got torch.int64",
    ),
    "cu_seqlens_k dtype": (
        {"cu_seqlens_k": lambda c: c.float()},
        TypeError,
        "cu_seqlens_k must be int32, got torch.float32",
    ),
    "cu_seqlens_k length": (
        {"cu_seqlens_k": lambda c: c[:3]},
        ValueError,
        r"cu_seqlens_k must have shape \[5\], got \[3\]",
    ),
    "cu_seqlens_q shape": (
        {"cu_seqlens_q": lambda c: c[None]},
        ValueError,
        r"cu_seqlens_q must be \[B \+ 1\], got \[1, 5\]",
    ),
    "cu_seqlens_q device": (
        {"cu_seqlens_q": lambda c: c.to("meta")},
        ValueError,
        "cu_seqlens_q must be on the device of q, c.*, got meta",
    ),
    "window below zero": (
        {"window": lambda _: -1},
        ValueError,
        r"window must be 0 \(none\) or a key count, got -1",
    ),
    "window_right when causal": (
        {"window_right": lambda _: 2},
        ValueError,
        "window_right .* causal=False alone, got 2",
    ),
    "window_right below -1": (
        {"window_right": lambda _: -2, "causal": lambda _: False},
        ValueError,
        "window_right must be .*-1.*, got -2",
    ),
    "table without pages": (
        {"block_table": lambda _: torch.zeros(4, 2, dtype=torch.int32)},
        ValueError,
        r"block_table k and v must be \[pages, page_size, G, C\], got \[85, 1, 64\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = bad_inputs(backend)
    for name, change in changes.items():
        value = change(arguments.get(name))
        arguments[name] = backend.to(value) if name == "block_table" else value
    assert_refused(backend.ops.attention_prefill, arguments, error, sentence)


BAD_TABLE = {
    "dtype": (lambda t: t.float(), TypeError, "block_table must hold integers, got torch.float32"),
    "rows": (
        lambda t: t[:3],
        ValueError,
        "block_table must have one row per sequence, 4, got 3",
    ),
    "shape": (lambda t: t[0], ValueError, r"block_table must be \[B, pages\], got \[9\]"),
    "device": (
        lambda t: t.to("meta"),
        ValueError,
        "block_table must be on the device of q, c.*, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_TABLE)
def test_bad_block_table(backend, case):
    change, error, sentence = BAD_TABLE[case]
    arguments = bad_inputs(backend)
    arguments |= {name: backend.randn(10, 5, 1, 64) for name in "kv"}
    arguments["block_table"] = change(backend.to(torch.zeros(4, 9, dtype=torch.int32)))
    assert_refused(backend.ops.attention_prefill, arguments, error, sentence)


def test_wrong_sums_of_lengths():
    """Known to the eager twin alone: a kernel would have to wait for the device to tell."""
    backend = EAGER
    arguments = bad_inputs(backend)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must end at .* queries, 20, got 21"):
        backend.ops.attention_prefill(**(arguments | {"q": arguments["q"][:20]}))
    with pytest.raises(ValueError, match=r"cu_seqlens_k must end within .* keys, 84, got 85"):
        backend.ops.attention_prefill(**(arguments | {n: arguments[n][:84] for n in "kv"}))
