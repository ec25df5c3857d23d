import pytest
import torch
from support import cases, float64
from support.backends import BF16, FP16, FP32, FP64, in_dtypes
from support.expect import assert_close_to_float64, assert_refused
from support.marks import DTYPES, all_dtypes

CASES = {  # tokens, query heads, KV heads (None: borrows keys), C, live pairs, V given
    "no tokens": (0, 4, 2, 64, 32, True),
    "one token": (1, 4, 2, 64, 32, True),
    "smallest head": (3, 2, 1, 2, 1, True),
    "odd half": (5, 3, 1, 6, 2, True),
    "generic 128": (5, 8, 4, 128, 64, True),
    "sliding": (7, 8, 4, 256, 128, True),
    "sliding, borrowed keys": (5, 8, None, 256, 128, False),
    "full": (5, 4, 1, 512, 64, True),
    "full, V from K": (5, 4, 2, 512, 64, False),
    "full, borrowed keys": (3, 8, None, 512, 64, False),
}


def inputs(backend, case, dtype, positions=None):
    tokens, heads, kv_heads, head_dim, live, with_v = CASES[case]
    if positions is None:
        positions = torch.randperm(1000)[:tokens]
    options = dict(with_v=with_v, live=live, positions=positions)
    return cases.qkv_norm_rope(backend, tokens, heads, kv_heads, head_dim, dtype=dtype, **options)


def check(backend, arguments, dtype, eps=1e-6):
    actual = backend.ops.qkv_norm_rope(**arguments, eps=eps)
    exact = float64.qkv_norm_rope(**arguments, eps=eps)
    rounded = float64.qkv_norm_rope(**arguments, eps=eps, dtype=dtype)
    for a, e, r in zip(actual, exact, rounded, strict=True):
        if e is None:
            assert a is None
        else:
            assert a.is_contiguous()
            # Angles, cos and sin are fp32 in every dtype.
            inner = torch.float32
            assert_close_to_float64(a, e, dtype, rounded=r, terms=a.shape[-1], inner=inner)


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_qkv_norm_rope(backend, poisoned_memory, case, dtype):
    check(backend, inputs(backend, case, dtype), dtype)


MIXES = {
    "autocast to bf16": (BF16, {"q_weight": FP32, "k_weight": FP32}),
    "autocast to fp16": (FP16, {"q_weight": FP32, "k_weight": FP32}),
    "one fp32 weight": (BF16, {"q_weight": FP32}),
    "two of 16 bits": (FP16, {"q_weight": BF16, "k_weight": BF16}),
    "16-bit weights": (FP32, {"q_weight": BF16, "k_weight": FP16}),
    "fp64 weights": (FP16, {"q_weight": FP64, "k_weight": FP64}),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", [name for name in CASES if name != "one token"])
def test_weights_of_another_dtype(backend, poisoned_memory, case, mix):
    """Rounded once, at the end; angles, cos and sin are fp32."""
    dtype, dtypes = MIXES[mix]
    arguments = in_dtypes(inputs(backend, case, dtype), **dtypes)
    actual = backend.ops.qkv_norm_rope(**arguments)
    exact = float64.qkv_norm_rope(**arguments, eps=1e-6)
    rounded = float64.qkv_norm_rope(**arguments, eps=1e-6, dtype=FP32)
    for a, e, r in zip(actual, exact, rounded, strict=True):
        if e is None:
            assert a is None
        else:
            assert_close_to_float64(a, e, dtype, rounded=r, terms=a.shape[-1])


@pytest.mark.parametrize("index", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_positions_of_any_width(backend, index):
    positions = torch.tensor([0, 5, 3, 3, 100], dtype=index)
    check(backend, inputs(backend, "generic 128", torch.float32, positions), torch.float32)


@pytest.mark.parametrize("frequency", [1.0, 0.37, 1e-3])
def test_cos_and_sin_to_the_last_bits(backend, frequency):
    """Of the head (1, 0), whose norm is (√2, 0), the rotation is √2 (cos, sin): nothing else is
    rounded, so the bound is three ulps of √2, in all quadrants and up to 2^20 radians."""
    positions = torch.cat([torch.arange(3000), torch.randint(0, 2**20, (3000,))])
    head = backend.to(torch.tensor([1.0, 0.0]))
    inv_freq = torch.tensor([frequency])
    q, _, _ = backend.ops.qkv_norm_rope(
        head.expand(len(positions), 1, 2),
        None,
        None,
        torch.ones_like(head),
        None,
        backend.to(positions),
        backend.to(inv_freq),
        eps=0.0,
    )
    angle = (positions * inv_freq).double()
    exact = 2**0.5 * torch.stack([angle.cos(), angle.sin()], -1)
    assert (q[:, 0].cpu().double() - exact).abs().max() <= 3 * 2**-23


def test_eps(backend):
    arguments = inputs(backend, "sliding", torch.float32)
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name] * 1e-3
    check(backend, arguments, torch.float32)
    check(backend, arguments, torch.float32, eps=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_outermost(backend, dtype):
    """[H, T, C] memory seen as [T, H, C]: no stride is what a packed projection has."""
    arguments = inputs(backend, "generic 128", dtype)
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    check(backend, arguments, dtype)


def test_v_is_the_norm_of_the_raw_k(backend):
    arguments = inputs(backend, "full, V from K", torch.float32)
    _, k, v = backend.ops.qkv_norm_rope(**arguments)
    expected = float64.rms_norm(arguments["k"], None, 1e-6)
    assert_close_to_float64(v, expected, torch.float32, terms=512)
    arguments["k_weight"] = arguments["k_weight"] * 3
    arguments["positions"] = arguments["positions"] + 7
    _, other_k, other_v = backend.ops.qkv_norm_rope(**arguments)
    assert torch.equal(other_v, v)
    assert not torch.equal(other_k, k)


def test_full_layers_turn_64_of_256_pairs(backend):
    inv_freq = cases.frequencies(512, 64)
    assert inv_freq.shape == (256,) and inv_freq.count_nonzero() == 64
    q = torch.zeros(3, 1, 512)
    for token, channel in enumerate((3, 63, 64)):
        q[token, 0, channel] = 1.0
    q, _, _ = backend.ops.qkv_norm_rope(
        backend.to(q),
        None,
        None,
        backend.weight(512),
        None,
        backend.to(torch.tensor([11, 11, 11])),
        backend.to(inv_freq),
    )
    changed = [row.nonzero().flatten().tolist() for row in q[:, 0].cpu()]
    assert changed == [[3, 259], [63, 319], [64]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_angles_stay_in_fp32(backend, dtype):
    """cos at position 131,071; a table in half precision is off by many radians."""
    positions = torch.tensor([131_071, 131_070, 100_001, 65_537, 8_191])
    arguments = inputs(backend, "sliding, borrowed keys", dtype, positions)
    q = torch.zeros(5, 8, 256, dtype=dtype)
    q[:, :, :128] = 1.0
    arguments["q"] = backend.to(q)
    arguments["q_weight"] = backend.to(torch.full((256,), 0.5**0.5, dtype=dtype))
    actual = backend.ops.qkv_norm_rope(**arguments)[0].double().cpu()
    angle = positions.double()[:, None, None] * cases.frequencies(256, 128).double()
    expected = torch.cat([angle.cos(), angle.sin()], -1).expand(-1, 8, -1)
    assert (actual - expected).abs().max() < 0.05
    check(backend, arguments, dtype)


def test_v_has_no_weight(backend):
    arguments = inputs(backend, "sliding", torch.float32)
    zero = torch.zeros_like(arguments["q_weight"])
    q, k, v = backend.ops.qkv_norm_rope(**(arguments | {"q_weight": zero, "k_weight": zero}))
    assert (q == 0).all() and (k == 0).all()
    assert torch.equal(v, backend.ops.qkv_norm_rope(**arguments)[2])
    assert_close_to_float64(v.square().mean(-1), torch.ones(7, 4).double(), v.dtype, terms=256)


def test_inputs_stay_as_they_are(backend):
    arguments = inputs(backend, "full, V from K", torch.float32)
    before = {name: x.clone() for name, x in arguments.items() if x is not None}
    backend.ops.qkv_norm_rope(**arguments)
    assert all(torch.equal(arguments[name], before[name]) for name in before)


BAD = {
    "integer q": ({"q": lambda q: q.int()}, TypeError, "q must be a floating.*got torch.int32"),
    "flat q": (
        {"q": lambda q: q.flatten(1)},
        ValueError,
        r"q must be \[T, H, C\], got \[5, 1024\]",
    ),
    "odd head": ({"q": lambda q: q[..., :127]}, ValueError, "q .* even head_dim, got 127"),
    "q_weight shape": (
        {"q_weight": lambda w: w[:64]},
        ValueError,
        r"q_weight must have shape \[128\], got \[64\]",
    ),
    "integer q_weight": (
        {"q_weight": lambda t: t.int()},
        TypeError,
        "q_weight must be a floating-point tensor, got torch.int32",
    ),
    "k without its weight": (
        {"k_weight": lambda w: None},
        ValueError,
        "k and k_weight must come together",
    ),
    "v without k": (
        {"k": lambda k: None, "k_weight": lambda w: None},
        ValueError,
        "v must not come without k",
    ),
    "k tokens": (
        {"k": lambda k: k[:4]},
        ValueError,
        r"k must be \[5, G, 128\], got \[4, 4, 128\]",
    ),
    "k head": (
        {"k": lambda k: k[..., :64]},
        ValueError,
        r"k must be \[5, G, 128\], got \[5, 4, 64\]",
    ),
    "k dtype": (
        {"k": lambda k: k.double()},
        TypeError,
        "k must have the dtype of q, torch.float32, got torch.float64",
    ),
    "k device": (
        {"k": lambda k: k.to("meta")},
        ValueError,
        "k must be on the device of q, c.*, got meta",
    ),
    "k_weight shape": (
        {"k_weight": lambda w: w[:64]},
        ValueError,
        r"k_weight must have shape \[128\], got \[64\]",
    ),
    "v heads": (
        {"v": lambda v: v[:, :2]},
        ValueError,
        r"v must have shape \[5, 4, 128\], got \[5, 2, 128\]",
    ),
    "v dtype": (
        {"v": lambda v: v.bfloat16()},
        TypeError,
        "v must have the dtype of q, torch.float32, got torch.bfloat16",
    ),
    "float positions": (
        {"positions": lambda p: p.float()},
        TypeError,
        "positions must hold integers, got torch.float32",
    ),
    "positions length": (
        {"positions": lambda p: p[:3]},
        ValueError,
        r"positions must have shape \[5\], got \[3\]",
    ),
    "positions device": (
        {"positions": lambda p: p.to("meta")},
        ValueError,
        "positions must be on the device of q, c.*, got meta",
    ),
    "half table": (
        {"inv_freq": lambda f: f.bfloat16()},
        TypeError,
        "inv_freq must be torch.float32 .*, got torch.bfloat16",
    ),
    "short table": (
        {"inv_freq": lambda f: f[:32]},
        ValueError,
        r"inv_freq must have shape \[64\], got \[32\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = inputs(backend, "generic 128", torch.float32)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.qkv_norm_rope, arguments, error, sentence)
