import pytest
import torch
from support import cases, emulated, float64
from support.backends import BF16, EAGER, FP16, FP32
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes, emulated_backend

from gemma4_kernels import opset
from gemma4_kernels.reference.decode import COUNTERS
from gemma4_kernels.reference.traced import TRACED

EPS = 1e-6
CASES = {  # layout, slots of a row or page, seq_lens, query heads, KV heads, C, options
    "no rows": ("rows", 8, [], 4, 2, 64, {}),
    "first token": ("rows", 8, [1], 4, 2, 64, {}),
    "full row": ("rows", 8, [5, 8], 4, 2, 64, {}),
    "tiles": ("rows", 64, [64, 63, 33, 32], 4, 2, 64, {}),
    "rows left out": ("rows", 16, [0, 9, 0, 16, 0], 4, 2, 64, {}),
    "all rows left out": ("rows", 16, [0, 0], 4, 2, 64, {}),
    "V from K": ("rows", 40, [33, 1], 4, 2, 64, dict(with_v=False)),
    "borrowed": ("rows", 40, [33, 1], 4, 2, 64, dict(borrowed=True)),
    "window": ("rows", 40, [40, 8, 7, 9, 1], 4, 2, 64, dict(window=8)),
    "window of one": ("rows", 40, [40, 1], 4, 2, 64, dict(window=1)),
    "softcap": ("rows", 20, [17, 4], 4, 2, 64, dict(softcap=4.0)),
    "ring, not yet full": ("ring", 8, [1, 5, 8], 4, 2, 64, dict(window=8)),
    "ring, wrapped": ("ring", 8, [9, 16, 17, 0, 1003], 4, 2, 64, dict(window=8)),
    "ring with room": ("ring", 13, [9, 13, 14, 40, 65], 4, 2, 64, dict(window=8)),
    "ring, borrowed": ("ring", 13, [9, 40], 4, 2, 64, dict(window=8, borrowed=True)),
    "pages": ("paged", 4, [9, 4, 1, 0, 16], 4, 2, 64, {}),
    "pages, window": ("paged", 4, [30, 5], 4, 2, 64, dict(window=6)),
    "heads alone": ("rows", 20, [17, 4], 3, 3, 64, {}),
    "sixteen heads share": ("rows", 20, [17, 4], 16, 1, 64, {}),
    "five heads share": ("rows", 20, [17, 4], 10, 2, 128, {}),
    "generic 128": ("rows", 50, [50, 31], 8, 4, 128, {}),
    "sliding heads": ("ring", 32, [100, 20, 32], 8, 4, 256, dict(window=32)),
    "full heads": ("paged", 16, [70, 33, 16], 16, 1, 512, dict(with_v=False)),
    "splits": ("rows", 700, [700, 64, 65, 129, 500, 1], 4, 1, 64, {}),
    "splits of a ring": ("ring", 300, [700, 300, 65], 4, 1, 128, dict(window=290)),
    "splits of pages": ("paged", 16, [321, 65], 8, 1, 512, {}),
}


def inputs(backend, case, dtype):
    """The arguments, and the keys and values that each row has before the new ones."""
    layout, slots, seq_lens, heads, kv_heads, head_dim, options = case
    sizes = seq_lens, 1, heads, kv_heads, head_dim
    arguments = cases.qkv_attention_decode(backend, *sizes, dtype=dtype, **options)
    # Any position, not the key's own alone.
    arguments["positions"] = arguments["positions"] * 3 + 2
    pages_of = [-(-length // slots) for length in seq_lens]
    rows = sum(pages_of) + 2 if layout == "paged" else len(seq_lens)
    k_cache = backend.nan(rows, slots, kv_heads, head_dim, dtype=dtype)
    v_cache = k_cache.clone()
    # Entries past the last page name no page.
    table = torch.full((len(seq_lens), max(pages_of, default=0) + 1), -(2**20), dtype=torch.int32)
    free = torch.randperm(rows).tolist()
    keys, values, places = [], [], []
    for b, length in enumerate(seq_lens):
        there = length - (not options.get("borrowed", False))
        k = backend.randn(max(there, 0), kv_heads, head_dim, dtype=dtype)
        v = backend.randn(max(there, 0), kv_heads, head_dim, dtype=dtype)
        for j in range(pages_of[b] if layout == "paged" else 0):
            table[b, j] = free.pop()

        def place(p, b=b):
            return (table[b, p // slots] if layout == "paged" else b), p % slots

        window = options.get("window", 0)
        for p in range(max(0, length - window) if window else 0, there):
            k_cache[place(p)], v_cache[place(p)] = k[p], v[p]
        keys.append(k)
        values.append(v)
        places.append(place(length - 1) if length else None)
    arguments |= {"k_cache": k_cache, "v_cache": v_cache}
    arguments["block_table"] = backend.to(table) if layout == "paged" else None
    return arguments | ({"ring": True} if layout == "ring" else {}), keys, values, places


def assert_decoded(out, arguments, before, keys, values, places, dtype):
    """The output, the new keys, and that nothing else was written."""
    names = ("q", "k", "v", "q_weight", "k_weight", "positions", "inv_freq")
    options = {n: arguments[n] for n in ("scale", "window", "softcap") if n in arguments}
    made = (*(arguments[n] for n in names), keys, values, EPS)
    there = [b for b, place in enumerate(places) if place is not None]
    assert not out[[b for b, place in enumerate(places) if place is None]].any()
    assert not arguments["counters"].any()
    if there:
        exact, k, v = float64.qkv_attention_decode(*made, **options)
        rounded, rounded_k, rounded_v = float64.qkv_attention_decode(*made, **options, dtype=dtype)
        # Angles are made in fp32; an error of a score, near 10 at most, is one of its weight.
        size = dict(terms=out.shape[-1], inner=FP32)
        pair = exact[there], rounded[there]
        assert_close_to_float64(out[there], pair[0], dtype, rounded=pair[1], magnitude=10.0, **size)
    for name in ("k_cache", "v_cache"):
        cache, expected = arguments[name].clone(), before[name]
        for b in there if arguments["k"] is not None else ():
            pair = (k, rounded_k) if name == "k_cache" else (v, rounded_v)
            assert_close_to_float64(cache[places[b]], pair[0][b], dtype, rounded=pair[1][b], **size)
            cache[places[b]] = expected[places[b]]
        assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))


def run(backend, arguments):
    before = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    return backend.ops.qkv_attention_decode(**arguments, eps=EPS), before


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_qkv_attention_decode(backend, poisoned_memory, case, dtype):
    """Slots that no token sees hold NaN, as does that of the new one before."""
    arguments, *rest = inputs(backend, CASES[case], dtype)
    for _ in range(2):  # the counters of the first call serve the second
        out, before = run(backend, arguments)
        assert_decoded(out, arguments, before, *rest, dtype)


def in_two(backend, arguments):
    """What the op stands for: k and v into their slots, then attention; borrowed keys are there."""
    rope = ("q", "k", "v", "q_weight", "k_weight", "positions", "inv_freq")
    q, k, v = backend.ops.qkv_norm_rope(*(arguments[n] for n in rope), EPS)
    caches = {n: arguments[n].clone() for n in ("k_cache", "v_cache")}
    if k is not None:
        for b, length in enumerate(arguments["seq_lens"].tolist()):
            p, slots = length - 1, caches["k_cache"].shape[1]
            if arguments["block_table"] is not None:
                at = arguments["block_table"][b, p // slots], p % slots
            else:
                at = b, p % slots
            if length:
                caches["k_cache"][at], caches["v_cache"][at] = k[b], v[b]
    names = ("seq_lens", "block_table", "scale", "window", "ring", "softcap")
    options = {n: arguments[n] for n in names if n in arguments}
    out, _ = backend.ops.attention_decode(q[:, None], **caches, **options, return_lse=False)
    return out[:, 0], caches


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("case", [name for name in CASES if name != "no rows"])
@pytest.mark.parametrize("backend", ["eager", "emulated"], indirect=True)
def test_bits_are_those_of_the_ops_in_a_row(backend, case, dtype):
    arguments, *_ = inputs(backend, CASES[case], dtype)
    expected, caches = in_two(backend, arguments)
    out = backend.ops.qkv_attention_decode(**arguments, eps=EPS)
    assert torch.equal(out, expected)
    for name, cache in caches.items():
        assert torch.equal(arguments[name].nan_to_num(7.0), cache.nan_to_num(7.0))


@pytest.mark.parametrize("backend", ["eager", "emulated"], indirect=True)
@pytest.mark.parametrize("case", ["tiles", "sliding heads", "full heads"])
def test_weights_in_fp32(backend, case):
    """Beside 16-bit heads, as under autocast: one rounding, at the end."""
    arguments, *rest = inputs(backend, CASES[case], BF16)
    for name in ("q_weight", "k_weight"):
        arguments[name] = backend.weight(arguments["q"].shape[-1])
    expected, _ = in_two(backend, arguments)
    out, before = run(backend, arguments)
    assert torch.equal(out, expected)
    assert_decoded(out, arguments, before, *rest, BF16)


@pytest.mark.parametrize("group", range(1, 17))
@pytest.mark.parametrize("head_dim", [64, 512])
def test_every_group_size(backend, head_dim, group):
    case = ("rows", 40, [40], 2 * group, 2, head_dim, {})
    arguments, *rest = inputs(backend, case, BF16)
    out, before = run(backend, arguments)
    assert_decoded(out, arguments, before, *rest, BF16)


@pytest.mark.parametrize("length", range(1, 25))
def test_ring_at_every_length(backend, length):
    for slots in (6, 7, 9):
        case = ("ring", slots, [length], 2, 1, 64, {"window": 6})
        arguments, *rest = inputs(backend, case, BF16)
        out, before = run(backend, arguments)
        assert_decoded(out, arguments, before, *rest, BF16)


@pytest.fixture(params=["emulated"])
def large_card(request, monkeypatch):
    """One that is given as many splits as there may be."""
    backend = emulated_backend()
    monkeypatch.setattr(emulated.control().settings, "sm_count", 132)
    return backend


MANY = {  # head_dim, lengths to 64 splits and more; eight, one more, and no multiple of it
    "knots": (64, [64 * 8, 64 * 8 + 1, 64 * 16, 1000, 7], {}),
    "window": (256, [900, 600, 9], {"window": 640}),
    "full heads": (512, [64 * 8 + 1], {}),
    "all": (64, [4096 + 3000, 64], {"with_v": False}),
}


@pytest.mark.parametrize("case", MANY)
def test_merges_of_merges(large_card, poisoned_memory, case):
    """More splits than one block merges; a row alone gives the bits that it gives in a batch."""
    head_dim, lengths, options = MANY[case]
    sizes = ("rows", max(lengths), lengths, 3, 1, head_dim, options)
    arguments, *rest = inputs(large_card, sizes, BF16)
    expected, _ = in_two(large_card, arguments)
    out, before = run(large_card, arguments)
    assert torch.equal(out, expected)
    assert_decoded(out, arguments, before, *rest, BF16)
    shared = ("q_weight", "k_weight", "inv_freq")
    for b in range(len(lengths)):
        alone = {
            n: x[b : b + 1] if isinstance(x, torch.Tensor) and n not in shared else x
            for n, x in arguments.items()
        }
        assert torch.equal(large_card.ops.qkv_attention_decode(**alone, eps=EPS), out[b : b + 1])


def test_bits_do_not_depend_on_what_is_reserved(large_card):
    arguments, *_ = inputs(large_card, ("rows", 5000, [600], 2, 1, 64, {}), BF16)
    roomy = large_card.ops.qkv_attention_decode(**arguments, eps=EPS)
    for slots in (600, 601, 1500):
        tight = {n: arguments[n][:, :slots].contiguous() for n in ("k_cache", "v_cache")}
        out = large_card.ops.qkv_attention_decode(**arguments | tight, eps=EPS)
        assert torch.equal(out, roomy)


@pytest.mark.parametrize("layout", ["rows", "ring", "paged"])
def test_slots_outside_the_window_are_not_read(backend, layout):
    slots = {"rows": 40, "ring": 16, "paged": 8}[layout]
    arguments, *_ = inputs(backend, (layout, slots, [40], 4, 2, 64, {"window": 8}), BF16)
    expected = backend.ops.qkv_attention_decode(**arguments, eps=EPS)
    assert expected.isfinite().all()
    for value in (0.0, 1e30):
        caches = {n: arguments[n].nan_to_num(value) for n in ("k_cache", "v_cache")}
        out = backend.ops.qkv_attention_decode(**arguments | caches, eps=EPS)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)
@pytest.mark.parametrize("length", [21, 2**31 - 1, -1, -(2**31)])
def test_a_length_that_the_memory_does_not_have_writes_nothing(backend, length):
    """Its keys end where the memory does, or there are none."""
    arguments, *_ = inputs(backend, ("rows", 20, [20, 9], 4, 2, 64, {}), BF16)
    before = backend.ops.qkv_attention_decode(**arguments, eps=EPS)
    caches = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    arguments["seq_lens"][0] = length
    arguments["k"][0] *= -1  # would be another key
    out = backend.ops.qkv_attention_decode(**arguments, eps=EPS)
    assert torch.equal(out[1], before[1])
    assert torch.equal(out[0], before[0] if length > 0 else torch.zeros_like(out[0]))
    for name, cache in caches.items():
        assert torch.equal(arguments[name].nan_to_num(7.0), cache.nan_to_num(7.0))


def test_heads_of_any_stride(backend):
    """Interleaved caches, and heads that lie apart."""
    arguments, *rest = inputs(backend, CASES["window"], BF16)
    both = torch.stack([arguments["k_cache"], arguments["v_cache"]], 2)
    arguments["k_cache"], arguments["v_cache"] = both.unbind(2)
    for name in "qkv":
        arguments[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    out, before = run(backend, arguments)
    assert_decoded(out, arguments, before, *rest, BF16)


def test_has_no_backward(backend):
    arguments, *_ = inputs(backend, CASES["first token"], BF16)
    arguments["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="qkv_attention_decode has no backward"):
        backend.ops.qkv_attention_decode(**arguments)


def test_more_heads_than_a_tile_has_rows_run_the_twin(large_card):
    arguments, *rest = inputs(large_card, ("rows", 20, [17, 4], 17, 1, 64, {}), BF16)
    opset.warn.cache_clear()
    with pytest.warns(UserWarning, match="at most 16 query heads may share a KV head, got"):
        out, before = run(large_card, arguments)
    assert_decoded(out, arguments, before, *rest, BF16)


BAD = {
    "packed q": ({"q": lambda q: q[None]}, ValueError, r"q must be \[T, H, C\]"),
    "k without weight": ({"k_weight": lambda w: None}, ValueError, "k and k_weight must come tog"),
    "v without k": (
        {"k": lambda k: None, "k_weight": lambda w: None},
        ValueError,
        "v must not come without k",
    ),
    "k heads": (
        {"k": lambda k: k[:, :1], "v": lambda v: v[:, :1]},
        ValueError,
        "k must have the heads of k_cache, 2, got 1",
    ),
    "k_cache dtype": (
        {"k_cache": lambda k: k.half()},
        TypeError,
        "k_cache must have the dtype of q, torch.float32, got torch.float16",
    ),
    "seq_lens dtype": ({"seq_lens": lambda s: s.long()}, TypeError, "seq_lens must be int32, got"),
    "counters dtype": ({"counters": lambda c: c.long()}, TypeError, "counters must be int32, got"),
    "few counters": (
        {"counters": lambda c: c[:, :, :8]},
        ValueError,
        rf"counters must have shape \[2, 2, {COUNTERS}\], got \[2, 2, 8\]",
    ),
    "counters apart": (
        {"counters": lambda c: c.transpose(0, 1)},
        ValueError,
        "counters must be contiguous",
    ),
    "half table": (
        {"inv_freq": lambda f: f.half()},
        TypeError,
        "inv_freq must be torch.float32 .*, got torch.float16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments, *_ = inputs(backend, CASES["full row"], torch.float32)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.qkv_attention_decode, arguments, error, sentence)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("length", [-1, 21])
def test_the_twin_refuses_lengths(length, ring):
    arguments, *_ = inputs(EAGER, ("rows", 20, [20, 9], 4, 2, 64, {"window": 8}), BF16)
    arguments |= {"seq_lens": EAGER.int32(length, 9), "ring": ring}
    if ring and length > 0:
        EAGER.ops.qkv_attention_decode(**arguments)
        return
    with pytest.raises(ValueError, match=r"seq_lens\[0\] must lie in 0..20"):
        EAGER.ops.qkv_attention_decode(**arguments)


@all_dtypes
@pytest.mark.parametrize(
    "case",
    [n for n, case in CASES.items() if case[0] != "paged" and case[2] and 0 not in case[2]],
)
def test_what_a_compiler_is_shown(case, dtype):
    """Of what a compiled step asks for; slots without a key hold 0 there."""
    arguments, *rest = inputs(EAGER, CASES[case], dtype)
    arguments.pop("softcap", None)
    for name in ("k_cache", "v_cache"):
        arguments[name].nan_to_num_(0.0)
    before = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    given = dict(eps=EPS, window=0, ring=False, softcap=0.0, k_scales=None, v_scales=None)
    given |= arguments
    names = opset.OPS["qkv_attention_decode"].names
    out = TRACED["qkv_attention_decode"](*map(given.__getitem__, names))
    assert_decoded(out, arguments, before, *rest, dtype)
