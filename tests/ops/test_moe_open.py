import pytest
import torch
from support import cases, float64
from support.backends import BF16, FP32, in_dtypes
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # tokens, columns, rows of hidden, experts
    "no tokens": (0, 64, 16, 8),
    "no dense rows": (2, 64, 0, 8),
    "no experts": (2, 64, 16, 0),
    "one token": (1, 256, 48, 8),
    "9 tokens": (9, 136, 40, 24),
    "16 experts": (3, 72, 16, 16),
    "several batches": (2, 2 * 8 * 64 + 8 * 64, 16, 32),
    "more tiles than blocks": (12, 64, 344, 16),
    "router of more tiles than blocks": (3, 64, 16, 136),
    "26B width": (14, 2816, 8, 16),
}
OTHER_WIDTHS = {  # no kernel: the twin
    "17 tokens": (17, 64, 16, 8),
    "odd width": (3, 37, 16, 8),
    "odd rows": (3, 64, 11, 8),
    "odd experts": (3, 64, 16, 5),
    "more than norms": (15, 2816, 8, 8),
}
kernels_alone = pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)


def inputs(backend, case, dtype):
    return cases.moe_open(backend, *{**CASES, **OTHER_WIDTHS}[case], dtype=dtype)


def check(backend, arguments, dtype, eps=1e-6):
    results = backend.ops.moe_open(**arguments, eps=eps)
    wide = torch.promote_types(dtype, arguments["residual"].dtype)
    expected = float64.moe_open(**arguments, eps=eps)
    rounded = float64.moe_open(**arguments, eps=eps, dtype=dtype, wide=wide)
    size = dict(terms=arguments["x"].shape[-1], inner=torch.promote_types(dtype, FP32))
    for i, (result, exact) in enumerate(zip(results, expected, strict=True)):
        assert result.is_contiguous() and result.shape == exact.shape
        if not result.numel():
            continue
        # A product's terms may cancel: what they add up to is no measure of them.
        most = dict(magnitude=exact.abs().amax()) if i < 2 else {}
        made = dtype if i < 2 else wide
        assert_close_to_float64(result, exact, made, rounded=rounded[i], **most, **size)


@all_dtypes
@pytest.mark.parametrize("case", [*CASES, *OTHER_WIDTHS])
def test_moe_open(backend, poisoned_memory, case, dtype):
    check(backend, inputs(backend, case, dtype), dtype)


@pytest.mark.parametrize("names", [("residual",), ("norm_weight", "router_scale")], ids=str)
def test_mixed_dtypes(backend, names):
    arguments = inputs(backend, "9 tokens", BF16)
    check(backend, in_dtypes(arguments, **dict.fromkeys(names, FP32)), BF16)


def test_strided(backend):
    arguments = inputs(backend, "9 tokens", BF16)
    for n, name in enumerate(("x", "residual"), 2):
        arguments[name] = backend.randn(9, n * 136, dtype=BF16)[:, 136:272]
    check(backend, arguments, BF16)


def test_eps_applies_to_all_norms(backend):
    arguments = inputs(backend, "9 tokens", BF16)
    arguments["x"] *= 1e-4
    arguments["residual"] *= 0
    check(backend, arguments, BF16, eps=0.3)


@kernels_alone
def test_the_router_reads_what_moe_norm_makes(backend):
    """To the bit: a choice between two close experts hangs on each of its roundings."""
    arguments = inputs(backend, "26B width", BF16)
    arguments["router"] = backend.to(torch.eye(2816, dtype=BF16)[::64][:40].contiguous())
    _, logits, expert_x, residual = backend.ops.moe_open(**arguments)
    weights = arguments["expert_weight"], arguments["router_scale"]
    expected, router_x = backend.ops.moe_norm(residual, *weights)
    assert torch.equal(logits, router_x[:, ::64][:, :40])
    assert torch.equal(expert_x, expected)


@kernels_alone
@pytest.mark.parametrize("case", ["9 tokens", "more tiles than blocks"])
def test_a_tokens_bits_do_not_depend_on_the_others(backend, case):
    arguments = inputs(backend, case, BF16)
    together = backend.ops.moe_open(**arguments)
    for token in (0, 3, arguments["x"].shape[0] - 1):
        rows = {name: arguments[name][token : token + 1] for name in ("x", "residual")}
        alone = backend.ops.moe_open(**arguments | rows)
        assert all(torch.equal(a[0], b[token]) for a, b in zip(alone, together, strict=True))


def test_inputs_stay_as_they_are(backend):
    arguments = inputs(backend, "9 tokens", BF16)
    before = {name: x.clone() for name, x in arguments.items()}
    backend.ops.moe_open(**arguments)
    assert all(torch.equal(arguments[name], before[name]) for name in before)


BAD = {
    "x": (lambda x: x[None], ValueError, r"x must be \[T, D\], got \[1, 9, 136\]"),
    "residual": (lambda x: x[:2], ValueError, r"residual must have shape \[9, 136\], got \[2, 136"),
    "expert_weight": (
        lambda x: x[:32],
        ValueError,
        r"expert_weight must have shape \[136\], got \[32\]",
    ),
    "router_scale": (lambda x: x.int(), TypeError, "router_scale must be a floating-point tensor"),
    "router": (lambda x: x[:, :32], ValueError, r"router must be \[N, 136\], got \[24, 32\]"),
    "gate_up": (
        lambda x: x[:79],
        ValueError,
        r"gate_up must have an even height, got \[79, 136\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(backend, name):
    change, error, sentence = BAD[name]
    arguments = inputs(backend, "9 tokens", BF16)
    assert_refused(
        backend.ops.moe_open, arguments | {name: change(arguments[name])}, error, sentence
    )
