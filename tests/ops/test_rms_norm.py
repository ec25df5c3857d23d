import pytest
import torch
from support import float64
from support.backends import BF16, FP16, FP32, FP64
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # shape, eps, size of the values
    "no rows": ((0, 64), 1e-6, 1.0),
    "one row": ((1, 256), 1e-6, 1.0),
    "one dimension": ((640,), 1e-6, 1.0),
    "one channel": ((5, 1), 1e-6, 1.0),
    "odd width": ((7, 37), 1e-6, 1.0),
    "heads": ((3, 5, 128), 1e-6, 1.0),
    "E2B width": ((3, 1536), 1e-6, 3.0),
    "31B width": ((2, 5376), 1e-6, 20.0),
    "eps decides": ((4, 96), 1e-6, 1e-3),
    "large eps": ((4, 96), 0.5, 1.0),
}


@all_dtypes
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("case", CASES)
def test_rms_norm(backend, poisoned_memory, case, weighted, dtype):
    shape, eps, size = CASES[case]
    x = backend.randn(*shape, dtype=dtype, std=size)
    weight = backend.weight(shape[-1], dtype=dtype) if weighted else None
    y = backend.ops.rms_norm(x, weight, eps)
    expected = float64.rms_norm(x, weight, eps)
    assert_close_to_float64(y, expected, dtype, terms=shape[-1], magnitude=expected.abs())


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(BF16, FP32), (FP16, FP32), (FP32, BF16), (FP16, BF16), (BF16, FP64)],
    ids=str,
)
@pytest.mark.parametrize("case", ["no rows", "odd width", "heads", "31B width"])
def test_weight_of_another_dtype(backend, poisoned_memory, case, dtype, weight_dtype):
    """Rounded once, whatever the weight."""
    shape, eps, size = CASES[case]
    x = backend.randn(*shape, dtype=dtype, std=size)
    weight = backend.weight(shape[-1], dtype=weight_dtype)
    y = backend.ops.rms_norm(x, weight, eps)
    expected = float64.rms_norm(x, weight, eps)
    assert_close_to_float64(y, expected, dtype, terms=shape[-1], magnitude=expected.abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_start_anywhere(backend, dtype):
    """Every second row is on no multiple of 16 bytes, though the first row and the width are."""
    x, weight = backend.randn(6, 100, dtype=dtype)[:, :64], backend.weight(64, dtype=dtype)
    y = backend.ops.rms_norm(x, weight)
    expected = float64.rms_norm(x, weight, 1e-6)
    assert_close_to_float64(y, expected, dtype, terms=64, magnitude=expected.abs())


@pytest.mark.parametrize("view", ["columns", "every other row", "transposed"])
def test_strided(backend, view):
    packed = backend.randn(12, 3 * 64)
    x = {
        "columns": packed[:, 64:128],
        "every other row": packed[::2],
        "transposed": packed.T,
    }[view]
    weight = backend.weight(x.shape[-1])
    y = backend.ops.rms_norm(x, weight)
    assert y.is_contiguous()
    assert_close_to_float64(y, float64.rms_norm(x, weight, 1e-6), torch.float32, terms=192)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(backend, dtype):
    """The weight is multiplied in fp32; a cast before it moves a third of all values."""
    x, weight = backend.randn(64, 512, dtype=dtype), backend.weight(512, dtype=dtype)
    y = backend.ops.rms_norm(x, weight)
    correct = float64.rms_norm(x, weight, 1e-6).to(dtype)
    assert (y.cpu() == correct).double().mean() > 0.99


def test_squares_do_not_overflow_fp16(backend):
    x = backend.randn(3, 512, dtype=torch.float16, std=9000.0)
    y = backend.ops.rms_norm(x)
    assert_close_to_float64(y, float64.rms_norm(x, None, 1e-6), torch.float16, terms=512)


def test_zero_row_gives_zero(backend):
    assert (backend.ops.rms_norm(backend.to(torch.zeros(2, 64))) == 0).all()


def test_zero_weight_gives_zero(backend):
    y = backend.ops.rms_norm(backend.randn(3, 64), backend.to(torch.zeros(64)))
    assert (y == 0).all()


BAD = {
    "integer x": ({"x": lambda x: x.int()}, TypeError, "x must be a floating.*got torch.int32"),
    "scalar x": ({"x": lambda x: x[0, 0]}, ValueError, "x must have at least one dim.*scalar"),
    "integer weight": (
        {"weight": lambda t: t.int()},
        TypeError,
        "weight must be a floating-point tensor, got torch.int32",
    ),
    "weight shape": (
        {"weight": lambda w: w[:63]},
        ValueError,
        r"weight must have shape \[64\], got \[63\]",
    ),
    "weight device": (
        {"weight": lambda w: w.to("meta")},
        ValueError,
        "weight must be on the device of x, c.*, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = {"x": backend.randn(3, 64), "weight": backend.weight(64)}
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.rms_norm, arguments, error, sentence)
