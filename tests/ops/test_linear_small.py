import pytest
import torch
from support import cases, float64
from support.backends import BF16, FP16, FP32, in_dtypes
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CLOSE = {"residual", "post_weight", "scale"}  # a branch
OPEN = CLOSE | {"norm_weight"}  # and the next one
TWO = OPEN | {"other"}  # branches close
CASES = {  # tokens, width, rows of y, what comes with it
    "no tokens": (0, 64, 16, OPEN),
    "no rows": (2, 64, 0, OPEN),
    "no width": (2, 0, 16, set()),
    "one token": (1, 256, 48, set()),
    "one row of tiles": (3, 64, 8, set()),
    "16 tokens": (16, 640, 24, set()),
    "9 tokens": (9, 136, 40, OPEN),
    "no whole line": (2, 72, 16, OPEN),
    "a line and a bit": (2, 8 * 64 + 8, 24, {"norm_weight"}),
    "several batches": (2, 2 * 8 * 64 + 8 * 64, 16, set()),
    "several batches of several tiles": (2, 3 * 8 * 64, 64, set()),
    "first layer": (3, 384, 32, {"norm_weight"}),
    "closes alone": (3, 384, 32, CLOSE),
    "no scale": (3, 384, 32, OPEN - {"scale"}),
    "two branches": (3, 392, 32, TWO),
    "two branches, closed alone": (9, 136, 8, TWO - {"norm_weight"}),
    "gated": (5, 200, 24, OPEN | {"gated"}),
    "gated, plain": (1, 128, 8, {"gated"}),
    "factor": (4, 320, 256, CLOSE | {"factor"}),
    "factor of many": (2, 64, 720, {"factor"}),
    "more tiles than blocks": (2, 64, 1032, OPEN),
    "gated, more tiles than blocks": (12, 64, 344, {"gated"}),
    "E2B width": (2, 1536, 16, OPEN),
    "26B width": (14, 2816, 8, OPEN),
    "31B width": (7, 5376, 8, OPEN),
    "widest": (1, 6144, 8, TWO),
}
OTHER_WIDTHS = {  # no kernel: the twin
    "17 tokens": (17, 64, 16, OPEN),
    "odd width": (3, 37, 16, OPEN),
    "odd rows": (3, 64, 11, OPEN | {"factor"}),
    "wider than norms": (1, 6152, 8, OPEN),
    "more than norms": (8, 5376, 8, OPEN),
}


kernels_alone = pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)


def inputs(backend, case, dtype):
    tokens, width, rows, parts = {**CASES, **OTHER_WIDTHS}[case]
    return cases.linear_small(backend, tokens, width, rows, *parts, dtype=dtype)


def check(backend, arguments, dtype, eps=1e-6):
    y, residual = backend.ops.linear_small(**arguments, eps=eps)
    names = ("residual", "post_weight", "scale", "norm_weight", "factor")
    names += ("x_weight", "other", "other_weight")
    all_of_them = dict.fromkeys(names) | arguments | {"eps": eps}
    wide = dtype
    if "residual" in arguments:
        wide = torch.promote_types(dtype, arguments["residual"].dtype)
    expected = float64.linear_small(**all_of_them)
    rounded = float64.linear_small(**all_of_them, dtype=dtype, wide=wide)
    inner = torch.promote_types(dtype, FP32)
    size = dict(terms=max(arguments["x"].shape[-1], 1), inner=inner)
    if y.numel():
        # A product's terms may cancel: what they add up to is no measure of them.
        made = float64.linear_small(**all_of_them | {"gated": False, "factor": None})[0]
        most = made.abs().amax() * (4 if arguments["gated"] or "factor" in arguments else 1)
        assert_close_to_float64(y, expected[0], dtype, rounded=rounded[0], magnitude=most, **size)
    assert y.is_contiguous() and y.shape == expected[0].shape
    if "residual" in arguments:
        assert_close_to_float64(residual, expected[1], wide, rounded=rounded[1], **size)
        assert residual.is_contiguous()
    else:
        assert residual is None


@all_dtypes
@pytest.mark.parametrize("case", [*CASES, *OTHER_WIDTHS])
def test_linear_small(backend, poisoned_memory, case, dtype):
    check(backend, inputs(backend, case, dtype), dtype)


MIXES = {
    "fp32 residual": {"residual": FP32},
    "fp32 norms": {"post_weight": FP32, "norm_weight": FP32, "scale": FP32},
    "fp16 residual": {"residual": FP16},
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_dtypes(backend, mix):
    arguments = in_dtypes(inputs(backend, "9 tokens", BF16), **MIXES[mix])
    check(backend, arguments, BF16)


def test_strided(backend):
    arguments = inputs(backend, "factor", BF16)
    arguments["factor"] = backend.randn(4, 5, 256, dtype=BF16)[:, 3]
    for name in ("x", "residual"):
        arguments[name] = backend.randn(4, 3 * 320, dtype=BF16)[:, 320:640]
    check(backend, arguments, BF16)
    arguments["x"] = backend.randn(4, 321, dtype=BF16)[:, 1:]
    check(backend, arguments, BF16)
    arguments = inputs(backend, "two branches", BF16)
    arguments["other"] = backend.randn(3, 2 * 392, dtype=BF16)[:, :392]
    check(backend, arguments, BF16)


def test_eps_applies_to_both_norms(backend):
    arguments = inputs(backend, "9 tokens", BF16)
    arguments["x"] *= 1e-4
    arguments["residual"] *= 0
    check(backend, arguments, BF16)
    check(backend, arguments, BF16, eps=0.3)


@kernels_alone
@pytest.mark.parametrize(
    "case", ["16 tokens", "9 tokens", "two branches", "gated, more tiles than blocks"]
)
def test_a_tokens_bits_do_not_depend_on_the_others(backend, case):
    arguments = inputs(backend, case, BF16)
    together, residuals = backend.ops.linear_small(**arguments)
    for token in (0, 2, arguments["x"].shape[0] - 1):
        names = {"x", "residual", "other"} & arguments.keys()
        rows = {name: arguments[name][token : token + 1] for name in names}
        alone, residual = backend.ops.linear_small(**arguments | rows)
        assert torch.equal(alone[0], together[token])
        assert residual is None or torch.equal(residual[0], residuals[token])


@kernels_alone
def test_a_rows_bits_do_not_depend_on_the_tile(backend):
    """Sixteen rows a tile where there are many, eight where there are few."""
    arguments = inputs(backend, "more tiles than blocks", BF16)
    many, _ = backend.ops.linear_small(**arguments)
    few, _ = backend.ops.linear_small(**arguments | {"weight": arguments["weight"][:64]})
    assert torch.equal(many[:, :64], few)


def test_inputs_stay_as_they_are(backend):
    arguments = inputs(backend, "9 tokens", BF16)
    before = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    backend.ops.linear_small(**arguments)
    assert all(torch.equal(arguments[name], before[name]) for name in before)


def test_fp16_saturates(backend):
    x = backend.to(torch.tensor([[300.0] + [0.0] * 7], dtype=FP16))
    weight = backend.to(torch.eye(16, 8, dtype=FP16))
    weight[8, 0] = -1
    y, _ = backend.ops.linear_small(x, weight, gated=True)
    assert y[0, 0] == -65504
    y, _ = backend.ops.linear_small(x, weight, factor=backend.randn(1, 16, dtype=FP16) * 0 + 300)
    assert y[0, 0] == 65504


BAD = {
    "x of three dimensions": (
        {"x": lambda x: x[None]},
        ValueError,
        r"x must be \[T, D\], got \[1, 9, 136\]",
    ),
    "integer x": ({"x": lambda x: x.int()}, TypeError, "x must be a floating.*got torch.int32"),
    "weight dtype": (
        {"weight": lambda w: w.half()},
        TypeError,
        "weight must have the dtype of x, torch.bfloat16, got torch.float16",
    ),
    "weight width": (
        {"weight": lambda w: w[:, :128]},
        ValueError,
        r"weight must be \[N, 136\], got \[40, 128\]",
    ),
    "residual without its norm": (
        {"post_weight": lambda w: None},
        ValueError,
        "residual and post_weight must come together or not",
    ),
    "scale alone": (
        {"post_weight": lambda w: None, "residual": lambda r: None},
        ValueError,
        "scale must not come without a residual",
    ),
    "other without a residual": (
        {
            "residual": lambda r: None,
            "post_weight": lambda w: None,
            "scale": lambda s: None,
            "other": lambda _: torch.ones(9, 136, dtype=BF16),
        },
        ValueError,
        "x_weight, other and other_weight must come together and with a residual, or not",
    ),
    "other shape": (
        {name: lambda _: torch.ones(136, dtype=BF16) for name in ("x_weight", "other_weight")}
        | {"other": lambda _: torch.ones(8, 136, dtype=BF16)},
        ValueError,
        r"other must have shape \[9, 136\], got \[8, 136\]",
    ),
    "residual shape": (
        {"residual": lambda r: r[:2]},
        ValueError,
        r"residual must have shape \[9, 136\], got \[2, 136\]",
    ),
    "post_weight shape": (
        {"post_weight": lambda w: w[:32]},
        ValueError,
        r"post_weight must have shape \[136\], got \[32\]",
    ),
    "norm_weight shape": (
        {"norm_weight": lambda w: w[:32]},
        ValueError,
        r"norm_weight must have shape \[136\], got \[32\]",
    ),
    "scale shape": (
        {"scale": lambda s: s.expand(2)},
        ValueError,
        r"scale must have shape \[1\], got \[2\]",
    ),
    "factor shape": (
        {"factor": lambda _: torch.ones(9, 8, dtype=BF16)},
        ValueError,
        r"factor must have shape \[9, 40\], got \[9, 8\]",
    ),
    "gated with a factor": (
        {"gated": lambda _: True, "factor": lambda _: torch.ones(9, 20, dtype=BF16)},
        ValueError,
        "factor must not come with gated",
    ),
    "gated and odd": (
        {"gated": lambda _: True, "weight": lambda w: w[:39]},
        ValueError,
        r"a gated weight must have an even height, got \[39, 136\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = inputs(backend, "9 tokens", BF16)
    arguments |= {name: change(arguments.get(name)) for name, change in changes.items()}
    arguments = {n: backend.to(x) if torch.is_tensor(x) else x for n, x in arguments.items()}
    assert_refused(backend.ops.linear_small, arguments, error, sentence)
