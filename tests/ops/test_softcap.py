import pytest
import torch
from support import float64
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # shape, cap, size of the logits
    "no rows": ((0, 97), 30.0, 20.0),
    "one value": ((1, 1), 30.0, 20.0),
    "scalar": ((), 30.0, 20.0),
    "one dimension": ((97,), 30.0, 20.0),
    "batch": ((2, 3, 97), 30.0, 20.0),
    "ragged": ((3, 1031), 30.0, 60.0),
    "small cap": ((3, 128), 0.5, 1.0),
    "tiny logits": ((3, 128), 30.0, 1e-3),
    "saturated": ((3, 128), 30.0, 1000.0),
}


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_softcap(backend, poisoned_memory, case, dtype):
    shape, cap, size = CASES[case]
    logits = backend.randn(*shape, dtype=dtype, std=size)
    before = logits.clone()
    y = backend.ops.softcap(logits, cap)
    expected = float64.softcap(logits, cap)
    # In fp16 a quotient below the normal range keeps an absolute error, which the cap multiplies.
    info = torch.finfo(dtype)
    rounded = expected + cap * info.smallest_normal * info.eps / 2
    assert_close_to_float64(
        y, expected, dtype, rounded=rounded, roundings=3, magnitude=expected.abs()
    )
    assert torch.equal(logits, before)


@pytest.mark.parametrize("view", ["columns", "transposed"])
def test_strided(backend, view):
    packed = backend.randn(12, 3 * 64, std=20.0)
    logits = packed[:, 64:128] if view == "columns" else packed.T
    y = backend.ops.softcap(logits, 30.0)
    assert_close_to_float64(y, float64.softcap(logits, 30.0), torch.float32, roundings=3)
    assert y.is_contiguous()


def test_caps_once(backend):
    y = backend.ops.softcap(backend.to(torch.tensor([30.0, 60.0, 124.0])), 30.0)
    expected = [22.847825, 28.920827, 29.984588]  # applied twice, 60 would give 22.382040
    assert y.tolist() == pytest.approx(expected, rel=1e-6)


def test_infinities_reach_the_cap(backend):
    logits = backend.to(torch.tensor([float("inf"), float("-inf"), float("nan")]))
    y = backend.ops.softcap(logits, 30.0)
    assert y[:2].tolist() == [30.0, -30.0]
    assert y[2].isnan()


@all_dtypes
def test_gradient(backend, dtype):
    logits = backend.randn(3, 97, dtype=dtype, std=20.0).requires_grad_()
    grad = backend.randn(3, 97, dtype=dtype)
    (actual,) = torch.autograd.grad(backend.ops.softcap(logits, 30.0), logits, grad)
    exact = logits.detach().double().cpu().requires_grad_()
    (expected,) = torch.autograd.grad(float64.softcap(exact, 30.0), exact, grad.double().cpu())
    # 1 - (y / cap)² is made from the rounded output, whose error weighs up to 2 per rounding.
    rounded = expected + 3 * torch.finfo(dtype).eps * grad.double().cpu().abs()
    assert_close_to_float64(actual, expected, dtype, rounded=rounded, magnitude=10.0)


BAD = {
    "integers": ({"logits": lambda x: x.int()}, TypeError, "logits must be a floating.*int32"),
    "cap of zero": ({"cap": lambda c: 0.0}, ValueError, "cap must be positive, got 0"),
    "cap below zero": ({"cap": lambda c: -30.0}, ValueError, "cap must be positive, got -30"),
    "cap not a number": ({"cap": lambda c: c * float("nan")}, ValueError, "cap .* got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = {"logits": backend.randn(3, 8), "cap": 30.0}
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.softcap, arguments, error, sentence)
