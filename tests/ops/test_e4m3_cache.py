"""A cache in e4m3: what goes in, what attention makes of it, and that no more of it is read."""

import pytest
import torch
from support import cases, float64
from support.backends import BF16, EAGER, FP16, FP32, in_dtypes
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes, emulated_backend

from gemma4_kernels import opset
from gemma4_kernels.e4m3 import E4M3

HALF = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
CASES = {  # layout, slots of a row or page, seq_lens, new tokens, query heads, KV heads, C, options
    "one key": ("rows", 8, [1], 1, 4, 2, 256, {}),
    "tiles": ("rows", 64, [64, 63, 33, 32], 1, 4, 2, 256, {}),
    "full heads": ("rows", 80, [80, 33, 1], 1, 8, 1, 512, {}),
    "rows left out": ("rows", 16, [0, 9, 0], 1, 4, 2, 256, {}),
    "new tokens": ("rows", 40, [40, 17, 5], 5, 8, 2, 256, {}),
    "tiles of rows": ("rows", 70, [70, 17], 7, 8, 1, 512, {}),
    "more new tokens than keys": ("rows", 16, [2, 1, 0], 4, 4, 2, 256, {}),
    "window": ("rows", 40, [40, 8, 7, 9, 1], 1, 4, 2, 256, dict(window=8)),
    "ring": ("ring", 13, [9, 13, 14, 40, 65], 1, 4, 2, 256, dict(window=8)),
    "ring, new tokens": ("ring", 12, [5, 13, 77], 5, 4, 2, 256, dict(window=8)),
    "pages": ("paged", 4, [9, 4, 1, 0, 16], 1, 4, 2, 512, {}),
    "splits": ("rows", 330, [330, 64, 65, 129], 1, 4, 1, 512, {}),
    "scale": ("rows", 20, [17], 1, 16, 1, 256, dict(scale=0.125)),
}
# Those of the twin alone: other heads, and a softcap.
EAGER_CASES = {
    "small heads": ("rows", 20, [17, 4], 2, 4, 2, 64, {}),
    "softcap": ("rows", 20, [17, 4], 2, 4, 2, 256, dict(softcap=4.0)),
}


def drawn(rows, kv_heads, head_dim, size):
    """Codes of all sizes and scales of unlike keys; their product has about the size."""
    codes = (torch.randn(rows, kv_heads, head_dim) * 60).clamp(-448, 448).to(E4M3)
    return codes, (torch.randn(rows, kv_heads) * 0.7).exp() * size / 60


def inputs(backend, case, dtype):
    """The arguments, and the keys and values of each row in float64."""
    layout, slots, seq_lens, new, heads, kv_heads, head_dim, options = case
    window = options.get("window", 0)
    pages_of = [-(-length // slots) for length in seq_lens]
    rows = sum(pages_of) + 2 if layout == "paged" else len(seq_lens)
    codes = [torch.full((rows, slots, kv_heads, head_dim), torch.nan).to(E4M3) for _ in "kv"]
    scales = [torch.full((rows, slots, kv_heads), torch.nan) for _ in "kv"]
    table = torch.full((len(seq_lens), max(pages_of, default=0) + 1), -(2**20), dtype=torch.int32)
    free = torch.randperm(rows).tolist()
    dense = [], []
    for b, length in enumerate(seq_lens):
        for j in range(pages_of[b] if layout == "paged" else 0):
            table[b, j] = free.pop()
        first = max(0, length - new - window + 1) if window else 0
        for i, size in enumerate((0.5, 1.0)):
            made, scale = drawn(length, kv_heads, head_dim, size)
            for p in range(first, length):
                row = table[b, p // slots] if layout == "paged" else b
                codes[i][row, p % slots], scales[i][row, p % slots] = made[p], scale[p]
            dense[i].append(made.double() * scale.double()[..., None])
    arguments = {
        "q": backend.randn(len(seq_lens), new, heads, head_dim, dtype=dtype, std=0.5),
        "k_cache": backend.to(codes[0]),
        "v_cache": backend.to(codes[1]),
        "k_scales": backend.to(scales[0]),
        "v_scales": backend.to(scales[1]),
        "seq_lens": backend.int32(*seq_lens),
        "block_table": backend.to(table) if layout == "paged" else None,
    }
    return arguments | options | ({"ring": True} if layout == "ring" else {}), *dense


def assert_attended(actual, arguments, keys, values, dtype):
    out, lse = actual
    options = {n: arguments[n] for n in ("scale", "window", "softcap") if n in arguments}
    wide = torch.promote_types(dtype, torch.float32)
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        exact, exact_lse = float64.attention(arguments["q"][b], k, v, **options)
        rounded, _ = float64.attention(arguments["q"][b], k, v, **options, dtype=dtype)
        size = dict(terms=out.shape[-1], magnitude=10.0)
        assert_close_to_float64(out[b], exact, dtype, rounded=rounded, **size)
        if lse is not None:
            assert_close_to_float64(lse[b], exact_lse, wide, **size)


@HALF
@pytest.mark.parametrize("case", CASES)
def test_attention_decode(backend, poisoned_memory, case, dtype):
    """Slots that no new token sees hold NaN, and so do their scales."""
    arguments, *dense = inputs(backend, CASES[case], dtype)
    out, lse = backend.ops.attention_decode(**arguments)
    assert_attended((out, lse), arguments, *dense, dtype)
    again, _ = backend.ops.attention_decode(**arguments, return_lse=False)
    assert torch.equal(again, out)


@all_dtypes
@pytest.mark.parametrize("case", EAGER_CASES)
def test_twin_of_attention_decode(case, dtype):
    arguments, *dense = inputs(EAGER, EAGER_CASES[case], dtype)
    assert_attended(EAGER.ops.attention_decode(**arguments), arguments, *dense, dtype)


def test_what_no_kernel_serves_runs_the_twin():
    backend = emulated_backend()
    for case, heads in (("small heads", r"\[2, 2, 4, 64\]"), ("softcap", "softcap 4.0")):
        arguments, *dense = inputs(backend, EAGER_CASES[case], BF16)
        opset.warn.cache_clear()
        with pytest.warns(
            UserWarning, match=rf"over e4m3 it is for head_dim \(256, 512\).*{heads}"
        ):
            actual = backend.ops.attention_decode(**arguments)
        assert_attended(actual, arguments, *dense, BF16)


# What is written


def held(codes, scales):
    return codes.double().cpu(), scales.double().cpu()


@HALF
@pytest.mark.parametrize("weights", ["alike", "wide"])
@pytest.mark.parametrize(
    "sizes", [(64, True), (128, False), (256, True), (512, True), (512, False)]
)
def test_qkv_norm_rope_cache(backend, poisoned_memory, sizes, weights, dtype):
    """The codes of what the op makes without them; slots that no token names stay as they are."""
    head_dim, with_v = sizes
    slots = [3, -1, 17, 0]
    options = dict(dtype=dtype, with_v=with_v)
    arguments = cases.qkv_norm_rope_cache(backend, slots, (5, 4), 4, 2, head_dim, **options)
    if weights == "wide":
        arguments = in_dtypes(arguments, q_weight=FP32, k_weight=FP32)
    arguments["k"][0] = 0
    expected_q = backend.ops.qkv_norm_rope_cache(**arguments)
    coded = {n: arguments[n].clone() for n in ("k_cache", "v_cache")}
    caches = {n: backend.to(torch.full(x.shape, torch.nan).to(E4M3)) for n, x in coded.items()}
    scales = {n: backend.nan(5, 4, 2) for n in ("k_scales", "v_scales")}
    q = backend.ops.qkv_norm_rope_cache(**arguments | caches | scales)
    assert torch.equal(q, expected_q)
    kept = [slot for slot in slots if slot >= 0]
    for name, dense in coded.items():
        codes, scale = (x.flatten(0, 1) for x in (caches[name], scales[name[0] + "_scales"]))
        expected = float64.e4m3(dense.flatten(0, 1)[kept])
        assert all(map(torch.equal, held(codes[kept], scale[kept]), expected))
        others = torch.ones(20, dtype=torch.bool)
        others[kept] = False
        assert codes[others].double().isnan().all() and scale[others].isnan().all()


def test_of_two_codes_alike_near_the_even_one_is_taken(backend):
    """Values of which the norm leaves what they are, to 16 bits: their mean square is 1."""
    v = torch.ones(256)
    # 7 makes the scale 1/64; then numbers half way between codes, some of them subnormal ones.
    ties = [17, 19, 25, 27, 68, 76, *(n / 512 for n in (2.5, 3.5, 4.5, 5.5))]
    v[0], v[1:11] = 7, torch.tensor(ties) / 64
    v[11:66] = 0.5
    assert abs(v.square().mean() - 1) < 2**-9
    arguments = cases.qkv_norm_rope_cache(backend, [0], (1, 1), 2, 1, 256, dtype=BF16)
    arguments["v"] = backend.to(v.bfloat16()[None, None])
    codes = {n: backend.to(torch.zeros(1, 1, 1, 256).to(E4M3)) for n in ("k_cache", "v_cache")}
    scales = {n: backend.nan(1, 1, 1) for n in ("k_scales", "v_scales")}
    backend.ops.qkv_norm_rope_cache(**arguments | codes | scales)
    assert scales["v_scales"].item() == 1 / 64
    found = codes["v_cache"].flatten()[:11].double().tolist()
    assert found == [448, 16, 20, 24, 28, 64, 80, *(n / 512 for n in (2, 4, 4, 6))]
    expected, _ = float64.e4m3(v.bfloat16())
    assert torch.equal(codes["v_cache"].flatten().double().cpu(), expected)


def test_what_is_not_finite_leaves_a_scale_that_is_not(backend):
    for value in (torch.nan, torch.inf):
        sizes = [0, 1], (1, 2), 4, 2, 256
        arguments = cases.qkv_norm_rope_cache(backend, *sizes, dtype=BF16)
        arguments["k_weight"] = arguments["k_weight"].clone()
        arguments["k_weight"][3] = value
        arguments["v"][1, 1, 5] = value
        codes = {n: backend.to(torch.zeros(1, 2, 2, 256).to(E4M3)) for n in ("k_cache", "v_cache")}
        scales = {n: backend.nan(1, 2, 2) for n in ("k_scales", "v_scales")}
        backend.ops.qkv_norm_rope_cache(**arguments | codes | scales)
        assert not scales["k_scales"].isfinite().any()
        finite = scales["v_scales"][0].isfinite()
        assert finite.tolist() == [[True, True], [True, False]]


# Both at once

QKV_CASES = {  # layout, slots of a row or page, seq_lens, query heads, KV heads, C, options
    "first token": ("rows", 8, [1], 4, 2, 256, {}),
    "tiles": ("rows", 64, [64, 33, 0, 32], 4, 2, 256, {}),
    "V from K": ("rows", 40, [33, 1], 16, 1, 512, dict(with_v=False)),
    "V from K, small": ("rows", 40, [33, 1], 4, 2, 256, dict(with_v=False)),
    "borrowed": ("rows", 40, [33, 1], 4, 2, 512, dict(borrowed=True)),
    "ring": ("ring", 13, [9, 13, 14, 40], 4, 2, 256, dict(window=8)),
    "pages": ("paged", 16, [70, 33, 16], 8, 1, 512, {}),
    "splits": ("rows", 330, [330, 64, 65, 129], 5, 1, 512, {}),
}


def qkv_inputs(backend, case, dtype):
    layout, slots, seq_lens, heads, kv_heads, head_dim, options = case
    cache = (layout, slots, seq_lens, 1, heads, kv_heads, head_dim, {})
    held, *_ = inputs(backend, cache, dtype)
    del held["q"]
    sizes = seq_lens, 1, heads, kv_heads, head_dim
    return cases.qkv_attention_decode(backend, *sizes, dtype=dtype, **options) | held


def place(arguments, b, p):
    slots = arguments["k_cache"].shape[1]
    table = arguments["block_table"]
    return (b if table is None else int(table[b, p // slots])), p % slots


@HALF
@pytest.mark.parametrize("case", QKV_CASES)
def test_qkv_attention_decode(backend, poisoned_memory, case, dtype):
    """The bits of the parts: heads normed and turned, their codes by the formula, attention."""
    arguments = qkv_inputs(backend, QKV_CASES[case], dtype)
    names = ("q", "k", "v", "q_weight", "k_weight", "positions", "inv_freq")
    q, k, v = backend.ops.qkv_norm_rope(*(arguments[n] for n in names))
    stores = ("k_cache", "v_cache", "k_scales", "v_scales")
    expected = {n: arguments[n].clone() for n in stores}
    for b, length in enumerate(arguments["seq_lens"].tolist() if k is not None else ()):
        for name, new in (("k", k), ("v", v)) if length else ():
            codes, scales = float64.e4m3(new[b])
            expected[f"{name}_cache"][place(arguments, b, length - 1)] = codes.to(E4M3)
            expected[f"{name}_scales"][place(arguments, b, length - 1)] = scales.float()
    names = ("seq_lens", "block_table", "scale", "window", "ring")
    options = {n: arguments[n] for n in names if n in arguments}
    attended, _ = backend.ops.attention_decode(q[:, None], **expected, **options, return_lse=False)
    for _ in range(2):  # the counters of the first call serve the second
        out = backend.ops.qkv_attention_decode(**arguments)
        assert torch.equal(out, attended[:, 0])
        assert not arguments["counters"].any()
    for name, x in expected.items():
        assert torch.equal(arguments[name].view(torch.uint8), x.view(torch.uint8)), name


BAD = {
    "one of the scales": ({"v_scales": None}, ValueError, "k_scales and v_scales must come tog"),
    "cache dtype": (
        {"v_cache": lambda c: c.float()},
        TypeError,
        "v_cache must be torch.float8_e4m3fn where it has scales, got torch.float32",
    ),
    "no scales": (
        {"k_scales": None, "v_scales": None},
        TypeError,
        "k_cache must have the dtype of q, torch.bfloat16, got torch.float8_e4m3fn",
    ),
    "scales' dtype": (
        {"k_scales": lambda s: s.half()},
        TypeError,
        "k_scales must be float32, got torch.float16",
    ),
    "scales' shape": (
        {"k_scales": lambda s: s[:, :3]},
        ValueError,
        r"k_scales must have shape \[2, 16, 2\], got \[2, 3, 2\]",
    ),
    "scales' device": (
        {"v_scales": lambda s: s.to("meta")},
        ValueError,
        "v_scales must be on the device of v_cache, c.*, got meta",
    ),
    "strides": (
        {"k_scales": lambda s: s.transpose(0, 1).contiguous().transpose(0, 1)},
        ValueError,
        "k_cache and k_scales must be contiguous",
    ),
}


@pytest.mark.parametrize("op", ["attention_decode", "qkv_attention_decode", "qkv_norm_rope_cache"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, op, case):
    changes, error, sentence = BAD[case]
    cache = ("rows", 16, [16, 9], 4, 2, 256, {})
    if op == "attention_decode":
        arguments, *_ = inputs(backend, (*cache[:3], 1, *cache[3:]), BF16)
    else:
        arguments = qkv_inputs(backend, cache, BF16)
    if op == "qkv_norm_rope_cache":
        arguments["slots"] = backend.int32(3, 4)
        wanted = opset.OPS[op].names
        arguments = {n: x for n, x in arguments.items() if n in wanted}
    arguments |= {n: change and change(arguments[n]) for n, change in changes.items()}
    assert_refused(getattr(backend.ops, op), arguments, error, sentence)
