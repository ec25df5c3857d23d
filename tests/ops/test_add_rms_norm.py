import pytest
import torch
from support import cases, float64
from support.backends import BF16, FP16, FP32, FP64, in_dtypes
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # shape, next_weight, scale, eps
    "no rows": ((0, 64), True, True, 1e-6),
    "one row": ((1, 256), True, True, 1e-6),
    "one dimension": ((640,), True, True, 1e-6),
    "odd width": ((7, 37), True, True, 1e-6),
    "batch": ((2, 3, 96), True, True, 1e-6),
    "E2B width": ((3, 1536), True, True, 1e-6),
    "12B width": ((3, 3840), True, True, 1e-6),
    "31B width": ((2, 5376), True, True, 1e-6),
    "no scale": ((3, 128), True, False, 1e-6),
    "last norm": ((3, 128), False, True, 1e-6),
    "neither": ((3, 128), False, False, 1e-6),
    "large eps": ((3, 128), True, True, 0.3),
}


def inputs(backend, shape, next_weight, scale, dtype):
    options = dict(next_weight=next_weight, scale=scale)
    return cases.add_rms_norm(backend, *shape, dtype=dtype, **options)


def check(backend, arguments, eps, dtype):
    residual, y = backend.ops.add_rms_norm(**arguments, eps=eps)
    wide = torch.promote_types(dtype, arguments["residual"].dtype)
    expected = float64.add_rms_norm(**arguments, eps=eps)
    rounded = float64.add_rms_norm(**arguments, eps=eps, dtype=dtype, wide=wide)
    # Sums, fp64's too, that are rounded to fp32 on the way cost what they cost there.
    size = dict(terms=arguments["x"].shape[-1], inner=torch.promote_types(dtype, FP32))
    assert_close_to_float64(residual, expected[0], wide, rounded=rounded[0], **size)
    if arguments["next_weight"] is None:
        assert y is None
    else:
        assert_close_to_float64(y, expected[1], wide, rounded=rounded[1], **size)
    assert residual.is_contiguous() and (y is None or y.is_contiguous())


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_add_rms_norm(backend, poisoned_memory, case, dtype):
    shape, next_weight, scale, eps = CASES[case]
    check(backend, inputs(backend, shape, next_weight, scale, dtype), eps, dtype)


MIXES = {
    "autocast to bf16": {"x": BF16},
    "autocast to fp16": {"x": FP16},
    "16-bit weights": {"x": BF16, "post_weight": BF16, "next_weight": BF16, "scale": BF16},
    "fp32 weights": {"x": BF16, "residual": BF16},
    "fp32 scale": {"x": FP16, "residual": FP16, "post_weight": FP16, "next_weight": FP16},
    "one fp32 weight": {"x": FP16, "residual": FP16, "post_weight": FP16, "scale": BF16},
    "16-bit residual": {"residual": BF16},
    "two of 16 bits": {"x": BF16, "residual": FP16},
    "fp64 residual": {"x": BF16, "residual": FP64},
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", ["no rows", "odd width", "12B width", "31B width", "neither"])
def test_mixed_dtypes(backend, poisoned_memory, case, mix):
    """The branch is rounded to x's dtype at most, the residual never to less than its own."""
    shape, next_weight, scale, eps = CASES[case]
    arguments = inputs(backend, shape, next_weight, scale, torch.float32)
    arguments = in_dtypes(arguments, **MIXES[mix])
    check(backend, arguments, eps, arguments["x"].dtype)


def test_mixed_rows_that_start_anywhere(backend):
    """Of two dtypes each has its own idea of where 16 bytes begin."""
    arguments = in_dtypes(inputs(backend, (5, 64), True, True, torch.float32), x=BF16)
    for name, dtype, width in (("x", BF16, 68), ("x", BF16, 65), ("residual", FP32, 68)):
        moved = {name: backend.randn(5, width, dtype=dtype)[:, 1:65]}
        check(backend, arguments | moved, 1e-6, BF16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["columns", "transposed"])
def test_strided(backend, view, dtype):
    arguments = inputs(backend, (64, 64), True, True, dtype)
    for name in ("x", "residual"):
        packed = backend.randn(64, 3 * 64, dtype=dtype)[:, 64:128]
        arguments[name] = packed if view == "columns" else packed.T
    check(backend, arguments, 1e-6, dtype)


@pytest.mark.parametrize("width", [64, 37])
def test_x_and_residual_have_strides_of_their_own(backend, width):
    arguments = inputs(backend, (5, width), True, True, torch.float32)
    arguments["x"] = backend.randn(5, 3 * width)[:, width : 2 * width]
    check(backend, arguments, 1e-6, torch.float32)
    check(backend, arguments | {"next_weight": None}, 1e-6, torch.float32)


def test_y_is_the_norm_of_the_residual_that_is_returned(backend):
    """In bf16 the next branch must see the stored residual, not a more exact one."""
    arguments = inputs(backend, (64, 512), True, True, torch.bfloat16)
    residual, y = backend.ops.add_rms_norm(**arguments)
    correct = float64.rms_norm(residual, arguments["next_weight"], 1e-6).to(y.dtype)
    assert (y.cpu() == correct).double().mean() > 0.99


def test_eps_applies_to_both_norms(backend):
    arguments = inputs(backend, (4, 96), True, False, torch.float32)
    arguments["x"] *= 1e-4
    arguments["residual"] *= 0
    check(backend, arguments, 1e-6, torch.float32)


def test_inputs_stay_as_they_are(backend):
    arguments = inputs(backend, (4, 96), True, True, torch.float32)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    backend.ops.add_rms_norm(**arguments)
    assert all(torch.equal(arguments[name], before[name]) for name in before)


BAD = {
    "integer x": ({"x": lambda x: x.long()}, TypeError, "x must be a floating.*got torch.int64"),
    "integer residual": (
        {"residual": lambda t: t.int()},
        TypeError,
        "residual must be a floating-point tensor, got torch.int32",
    ),
    "residual shape": (
        {"residual": lambda r: r[:2]},
        ValueError,
        r"residual must have shape \[3, 64\], got \[2, 64\]",
    ),
    "residual device": (
        {"residual": lambda r: r.to("meta")},
        ValueError,
        "residual must be on the device of x, c.*, got meta",
    ),
    "integer post_weight": (
        {"post_weight": lambda t: t.int()},
        TypeError,
        "post_weight must be a floating-point tensor, got torch.int32",
    ),
    "post_weight shape": (
        {"post_weight": lambda w: w[:32]},
        ValueError,
        r"post_weight must have shape \[64\], got \[32\]",
    ),
    "integer next_weight": (
        {"next_weight": lambda t: t.int()},
        TypeError,
        "next_weight must be a floating-point tensor, got torch.int32",
    ),
    "next_weight shape": (
        {"next_weight": lambda w: w[:32]},
        ValueError,
        r"next_weight must have shape \[64\], got \[32\]",
    ),
    "integer scale": (
        {"scale": lambda t: t.int()},
        TypeError,
        "scale must be a floating-point tensor, got torch.int32",
    ),
    "scale of no dimension": (
        {"scale": lambda s: s[0]},
        ValueError,
        r"scale must have shape \[1\], got \[\]",
    ),
    "scale per channel": (
        {"scale": lambda s: s.expand(64)},
        ValueError,
        r"scale must have shape \[1\], got \[64\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = inputs(backend, (3, 64), True, True, torch.float32)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.add_rms_norm, arguments, error, sentence)
