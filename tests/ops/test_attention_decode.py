import pytest
import torch
from support import float64
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # layout, slots of a row or page, seq_lens, new tokens, query heads, KV heads, C, options
    "no rows": ("rows", 8, [], 1, 4, 2, 64, {}),
    "one key": ("rows", 8, [1], 1, 4, 2, 64, {}),
    "below a tile": ("rows", 8, [5, 8], 1, 4, 2, 64, {}),
    "exact tile": ("rows", 64, [64, 63], 1, 4, 2, 64, {}),
    "many tiles": ("rows", 300, [257, 3, 300], 1, 4, 2, 64, {}),
    "rows alike": ("rows", 40, [33, 33, 33], 3, 4, 2, 64, {}),
    "rows alike, window": ("rows", 40, [33, 33], 3, 4, 2, 64, dict(window=8)),
    "rows alike, softcap": ("rows", 40, [33, 33], 3, 4, 2, 64, dict(softcap=4.0)),
    "rows left out": ("rows", 16, [0, 9, 0, 16, 0], 1, 4, 2, 64, {}),
    "all rows left out": ("rows", 16, [0, 0], 2, 4, 2, 64, {}),
    "new tokens": ("rows", 40, [40, 17, 5], 5, 4, 2, 64, {}),
    "sixteen new tokens": ("rows", 40, [40, 17, 16], 16, 8, 1, 64, {}),
    "more new tokens than keys": ("rows", 16, [2, 1, 0, 9], 4, 4, 2, 64, {}),
    "window": ("rows", 40, [40, 8, 7, 9, 1], 1, 4, 2, 64, dict(window=8)),
    "window, new tokens": ("rows", 40, [40, 8, 12, 5], 5, 4, 2, 64, dict(window=8)),
    "window, more new than keys": ("rows", 40, [3, 1], 5, 4, 2, 64, dict(window=2)),
    "scale": ("rows", 20, [17], 1, 4, 2, 64, dict(scale=0.125)),
    "softcap": ("rows", 20, [17, 4], 2, 4, 2, 64, dict(softcap=4.0)),
    "all options": ("rows", 20, [17, 4], 2, 4, 2, 64, dict(scale=2.0, softcap=4.0, window=6)),
    "ring, not yet full": ("ring", 8, [1, 5, 8], 1, 4, 2, 64, dict(window=8)),
    "ring, wrapped": ("ring", 8, [9, 15, 16, 17, 0], 1, 4, 2, 64, dict(window=8)),
    "ring, wrapped often": ("ring", 8, [1000, 1003, 1007], 1, 4, 2, 64, dict(window=8)),
    "ring with room": ("ring", 13, [9, 13, 14, 40, 65], 1, 4, 2, 64, dict(window=8)),
    "ring, new tokens": ("ring", 12, [5, 12, 13, 24, 25, 77], 5, 4, 2, 64, dict(window=8)),
    "ring, sixteen new tokens": ("ring", 23, [16, 40, 46, 99], 16, 4, 2, 64, dict(window=8)),
    "ring, more new than keys": ("ring", 12, [2, 4], 5, 4, 2, 64, dict(window=8)),
    "ring, rows alike": ("ring", 13, [40, 40, 40], 1, 4, 2, 64, dict(window=8)),
    "ring, rows alike, new tokens": ("ring", 12, [77, 77], 5, 4, 2, 64, dict(window=8)),
    "ring of one": ("ring", 1, [1, 2, 9], 1, 4, 2, 64, dict(window=1)),
    "ring, softcap": ("ring", 8, [30, 3], 1, 4, 2, 64, dict(window=8, softcap=4.0, scale=2.0)),
    "pages": ("paged", 4, [9, 4, 1, 0, 16], 1, 4, 2, 64, {}),
    "pages of one": ("paged", 1, [9, 4], 1, 4, 2, 64, {}),
    "one page": ("paged", 64, [9, 64, 1], 2, 4, 2, 64, {}),
    "pages, new tokens": ("paged", 4, [9, 4, 7, 13], 4, 4, 2, 64, {}),
    "pages, window": ("paged", 4, [30, 4, 7, 13], 3, 4, 2, 64, dict(window=6)),
    "generic 128": ("rows", 50, [50, 31], 2, 8, 4, 128, {}),
    "sliding heads": ("ring", 32, [100, 20, 32], 1, 8, 4, 256, dict(window=32)),
    "full heads": ("paged", 16, [70, 33, 16], 2, 8, 1, 512, {}),
}


def inputs(backend, case, dtype):
    """The arguments, and the keys and values of each row in their own order."""
    layout, slots, seq_lens, num_new, heads, kv_heads, head_dim, options = case
    batch, window = len(seq_lens), options.get("window", 0)
    pages_of = [-(-length // slots) for length in seq_lens]
    rows = sum(pages_of) + 2 if layout == "paged" else batch
    k_cache = backend.nan(rows, slots, kv_heads, head_dim, dtype=dtype)
    v_cache = k_cache.clone()
    # Entries past the last page name no page.
    table = torch.full((batch, max(pages_of, default=0) + 1), -(2**20), dtype=torch.int32)
    free = torch.randperm(rows).tolist()
    keys, values = [], []
    for b, length in enumerate(seq_lens):
        k = backend.randn(length, kv_heads, head_dim, dtype=dtype, std=0.5)
        v = backend.randn(length, kv_heads, head_dim, dtype=dtype)
        for j in range(pages_of[b] if layout == "paged" else 0):
            table[b, j] = free.pop()
        first = max(0, length - num_new - window + 1) if window else 0
        for p in range(first, length):
            if layout == "paged":
                row, slot = table[b, p // slots], p % slots
            else:
                row, slot = b, p % slots
            k_cache[row, slot], v_cache[row, slot] = k[p], v[p]
        keys.append(k)
        values.append(v)
    arguments = {
        "q": backend.randn(batch, num_new, heads, head_dim, dtype=dtype, std=0.5),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "seq_lens": backend.int32(*seq_lens),
        "block_table": backend.to(table) if layout == "paged" else None,
    }
    return arguments | options | ({"ring": True} if layout == "ring" else {}), keys, values


def assert_decode(actual, arguments, keys, values, dtype):
    out, lse = actual
    assert out.shape == arguments["q"].shape and out.is_contiguous()
    options = {n: arguments[n] for n in ("scale", "window", "softcap") if n in arguments}
    terms = out.shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        q = arguments["q"][b]
        exact, exact_lse = float64.attention(q, k, v, **options)
        rounded, _ = float64.attention(q, k, v, **options, dtype=dtype)
        # An error of a score, whose largest are near 10, is one of its weight and of the lse.
        size = dict(terms=terms, magnitude=10.0)
        assert_close_to_float64(out[b], exact, dtype, rounded=rounded, **size)
        assert_close_to_float64(lse[b], exact_lse, wide, **size)


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_attention_decode(backend, poisoned_memory, case, dtype):
    """Slots that no new token sees hold NaN; among them those of rows that are left out."""
    arguments, keys, values = inputs(backend, CASES[case], dtype)
    out, lse = backend.ops.attention_decode(**arguments)
    assert_decode((out, lse), arguments, keys, values, dtype)
    out, none = backend.ops.attention_decode(**arguments, return_lse=False)
    assert none is None
    assert_decode((out, lse), arguments, keys, values, dtype)


@pytest.mark.parametrize("num_new", range(1, 17))
@pytest.mark.parametrize("layout", ["rows", "ring", "paged"])
def test_one_to_sixteen_new_tokens(backend, layout, num_new):
    slots = {"rows": 60, "ring": 8 + num_new - 1, "paged": 4}[layout]
    lengths = [num_new, num_new + 3, 20, 33, 60]
    for options in ({"window": 8},) if layout == "ring" else ({}, {"window": 8}):
        case = (layout, slots, lengths, num_new, 4, 2, 64, options)
        arguments, keys, values = inputs(backend, case, torch.float32)
        actual = backend.ops.attention_decode(**arguments)
        assert_decode(actual, arguments, keys, values, torch.float32)


@pytest.mark.parametrize("length", range(1, 40))
def test_ring_at_every_length(backend, length):
    for slots, num_new in ((6, 1), (7, 1), (8, 3)):
        case = ("ring", slots, [length], num_new, 2, 1, 64, {"window": 6})
        arguments, keys, values = inputs(backend, case, torch.float32)
        actual = backend.ops.attention_decode(**arguments)
        assert_decode(actual, arguments, keys, values, torch.float32)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_group_size_at_head_dim_512(backend, group, dtype):
    case = ("rows", 40, [40, 21], 2, 2 * group, 2, 512, {"scale": 0.5})
    arguments, keys, values = inputs(backend, case, dtype)
    assert_decode(backend.ops.attention_decode(**arguments), arguments, keys, values, dtype)


def test_calls_of_other_head_sizes_leave_no_trace(backend, poisoned_memory):
    sliding, *_ = inputs(backend, CASES["sliding heads"], torch.bfloat16)
    full, *_ = inputs(backend, CASES["full heads"], torch.bfloat16)
    first = backend.ops.attention_decode(**sliding)
    alone = backend.ops.attention_decode(**full)
    for again, fresh in ((sliding, first), (full, alone), (sliding, first)):
        for a, b in zip(backend.ops.attention_decode(**again), fresh, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("layout", ["rows", "ring", "paged"])
def test_slots_outside_the_window_are_not_read(backend, layout, num_new):
    """What stands there makes no difference to any bit: NaN, zeros or large values."""
    slots = {"rows": 40, "ring": 16, "paged": 8}[layout]
    case = (layout, slots, [40], num_new, 4, 2, 64, {"window": 8})
    arguments, *_ = inputs(backend, case, torch.float32)
    expected = backend.ops.attention_decode(**arguments)
    assert all(x.isfinite().all() for x in expected)
    for value in (0.0, 1e30):
        for name in ("k_cache", "v_cache"):
            arguments[name] = arguments[name].nan_to_num(value)
        for a, b in zip(backend.ops.attention_decode(**arguments), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("window", [0, 1, 7, 8, 9, 20, 21])
def test_window_counts_keys(backend, window):
    """Values that are unit vectors show the weights, query i giving one to min(i + 1, W) keys."""
    tokens = 20
    value = torch.eye(tokens, 64)[None, :, None]
    out, _ = backend.ops.attention_decode(
        backend.randn(1, tokens, 1, 64, std=0.2),
        backend.randn(1, tokens, 1, 64, std=0.2),
        backend.to(value),
        backend.int32(tokens),
        window=window,
    )
    for i, row in enumerate(out[0, :, 0, :tokens].cpu()):
        first = max(0, i - (window or tokens) + 1)
        assert row.nonzero().flatten().tolist() == list(range(first, i + 1))


def two_keys(backend, scores, **options):
    keys = torch.zeros(1, 2, 1, 64)
    keys[0, :, 0, 0] = torch.tensor(scores)
    query, value = torch.zeros(1, 1, 1, 64), torch.eye(2, 64)[None, :, None]
    query[..., 0] = 1.0
    q, k, v = (backend.to(x) for x in (query, keys, value))
    out, _ = backend.ops.attention_decode(q, k, v, backend.int32(2), **options)
    return out[0, 0, 0, :2].tolist()


def test_scale_is_one(backend):
    assert two_keys(backend, (3.0, 0.0)) == pytest.approx([0.952574, 0.047426], abs=1e-6)


def test_no_softcap_unless_asked(backend):
    assert two_keys(backend, (200.0, 100.0))[1] < 1e-30
    # 50 tanh(4) - 50 tanh(2) = 1.765085
    weights = two_keys(backend, (200.0, 100.0), softcap=50.0)
    assert weights == pytest.approx([0.853846, 0.146154], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_query_without_keys_gives_zero(backend, poisoned_memory, dtype):
    arguments, *_ = inputs(backend, CASES["more new tokens than keys"], dtype)
    out, lse = backend.ops.attention_decode(**arguments)
    for b, blind in enumerate((2, 3, 4, 0)):
        assert (out[b, :blind] == 0).all() and (lse[b, :, :blind] == -float("inf")).all()
        assert out[b, blind:].isfinite().all() and lse[b, :, blind:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_queries_and_caches(backend, dtype):
    """q as columns of a packed projection, K and V interleaved in one cache."""
    arguments, keys, values = inputs(backend, CASES["window, new tokens"], dtype)
    packed = backend.randn(4, 5, 8, 64, dtype=dtype, std=0.5)
    arguments["q"] = packed[:, :, :4]
    both = torch.stack([arguments["k_cache"], arguments["v_cache"]], 2)
    arguments["k_cache"], arguments["v_cache"] = both.unbind(2)
    assert_decode(backend.ops.attention_decode(**arguments), arguments, keys, values, dtype)
    arguments["q"] = packed.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :4]
    assert_decode(backend.ops.attention_decode(**arguments), arguments, keys, values, dtype)


def test_long_table_of_int64(backend):
    arguments, keys, values = inputs(backend, CASES["pages, window"], torch.float32)
    arguments["block_table"] = arguments["block_table"].long()
    actual = backend.ops.attention_decode(**arguments)
    assert_decode(actual, arguments, keys, values, torch.float32)


def test_rows_do_not_depend_on_their_neighbours(backend):
    arguments, *_ = inputs(backend, CASES["many tiles"], torch.bfloat16)
    out, lse = backend.ops.attention_decode(**arguments)
    for b in range(3):
        alone = {n: x[b : b + 1] for n, x in arguments.items() if x is not None}
        for a, e in zip(backend.ops.attention_decode(**alone), (out, lse), strict=True):
            assert torch.equal(a, e[b : b + 1])


def test_same_bits_every_time(backend):
    arguments, *_ = inputs(backend, CASES["many tiles"], torch.bfloat16)
    first = backend.ops.attention_decode(**arguments)
    for _ in range(3):
        for a, b in zip(backend.ops.attention_decode(**arguments), first, strict=True):
            assert torch.equal(a, b)


def test_caches_stay_as_they_are(backend):
    arguments, *_ = inputs(backend, CASES["ring, new tokens"], torch.float32)
    before = {name: arguments[name].clone() for name in ("q", "k_cache", "v_cache")}
    backend.ops.attention_decode(**arguments)
    for name, tensor in before.items():
        assert torch.equal(arguments[name].nan_to_num(7.0), tensor.nan_to_num(7.0))


def test_has_no_backward(backend):
    arguments, *_ = inputs(backend, CASES["one key"], torch.float32)
    arguments["q"].requires_grad_()
    out, _ = backend.ops.attention_decode(**arguments)
    with pytest.raises(RuntimeError, match=r"attention_decode has no backward.*attention_prefill"):
        out.sum().backward()


BAD = {
    "integer q": ({"q": lambda q: q.int()}, TypeError, "q must be a floating.*got torch.int32"),
    "packed q": (
        {"q": lambda q: q[0]},
        ValueError,
        r"q must be \[B, N, H, C\], got \[2, 4, 64\]",
    ),
    "flat k_cache": ({"k_cache": lambda k: k[0]}, ValueError, r"k_cache .* 4-d, got \[20, 2, 64\]"),
    "k_cache dtype": (
        {"k_cache": lambda k: k.half()},
        TypeError,
        "k_cache must have the dtype of q, torch.float32, got torch.float16",
    ),
    "k_cache head": (
        {"k_cache": lambda k: k[..., :32]},
        ValueError,
        "k_cache must have the head_dim of q, 64, got 32",
    ),
    "k_cache device": (
        {"k_cache": lambda k: k.to("meta")},
        ValueError,
        "k_cache must be on the device of q, c.*, got meta",
    ),
    "v_cache slots": (
        {"v_cache": lambda v: v[:, :19]},
        ValueError,
        r"v_cache must have shape \[2, 20, 2, 64\], got \[2, 19, 2, 64\]",
    ),
    "heads": (
        {name: lambda x: x[:, :, [0, 0, 0]] for name in ("k_cache", "v_cache")},
        ValueError,
        "query heads must be a multiple of the KV heads, got 4 and 3",
    ),
    "rows": (
        {name: lambda x: x[:1] for name in ("k_cache", "v_cache")},
        ValueError,
        "k_cache must have one row per sequence, 2, got 1",
    ),
    "seq_lens dtype": (
        {"seq_lens": lambda s: s.long()},
        TypeError,
        "seq_lens must be int32, got torch.int64",
    ),
    "seq_lens length": (
        {"seq_lens": lambda s: s[:1]},
        ValueError,
        r"seq_lens must have shape \[2\], got \[1\]",
    ),
    "seq_lens device": (
        {"seq_lens": lambda s: s.to("meta")},
        ValueError,
        "seq_lens must be on the device of q, c.*, got meta",
    ),
    "window below zero": ({"window": lambda _: -1}, ValueError, "window must be .* got -1"),
    "ring without window": (
        {"ring": lambda _: True},
        ValueError,
        "a ring cache needs a window .*, got window 0 and 20 slots",
    ),
    "ring too small": (
        {"ring": lambda _: True, "window": lambda _: 20},
        ValueError,
        "a ring cache needs .* got window 20 and 20 slots for 2 new tokens",
    ),
    "ring with pages": (
        {
            "ring": lambda _: True,
            "window": lambda _: 8,
            "block_table": lambda _: torch.zeros(2, 3, dtype=torch.int32),
        },
        ValueError,
        "a ring cache takes no block_table",
    ),
    "table dtype": (
        {"block_table": lambda _: torch.zeros(2, 3)},
        TypeError,
        "block_table must hold integers, got torch.float32",
    ),
    "table rows": (
        {"block_table": lambda _: torch.zeros(3, 3, dtype=torch.int32)},
        ValueError,
        "block_table must have one row per sequence, 2, got 3",
    ),
    "table shape": (
        {"block_table": lambda _: torch.zeros(3, dtype=torch.int32)},
        ValueError,
        r"block_table must be \[B, pages\], got \[3\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments, *_ = inputs(backend, CASES["softcap"], torch.float32)
    for name, change in changes.items():
        value = change(arguments.get(name))
        arguments[name] = backend.to(value) if name == "block_table" else value
    assert_refused(backend.ops.attention_decode, arguments, error, sentence)
