import pytest
import torch
from support import cases
from support.backends import BF16, FP16, FP32, in_dtypes
from support.expect import NoHostReads
from support.gradients import assert_gradients
from support.marks import all_dtypes

CASES = {  # shape, size of the values
    "one row": ((1, 256), 1.0),
    "one dimension": ((640,), 1.0),
    "odd width": ((7, 37), 1.0),
    "heads": ((3, 5, 128), 1.0),
    "more rows than blocks": ((40, 104), 1.0),
    "beyond what kernels take": ((2, 6152), 1.0),
    "eps decides": ((8, 96), 1e-3),
}
BOTH = ("x", "weight")


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_gradients(backend, poisoned_memory, case, dtype):
    shape, size = CASES[case]
    assert_gradients(
        backend, "rms_norm", cases.rms_norm(backend, *shape, dtype=dtype, std=size), BOTH
    )


@pytest.mark.parametrize(
    ("width", "dtype"), [(3840, BF16), (5376, BF16), (5376, FP16), (5376, FP32)], ids=str
)
def test_wide_rows(backend, poisoned_memory, width, dtype):
    arguments = cases.rms_norm(backend, 7, width, dtype=dtype, std=20.0)
    assert_gradients(backend, "rms_norm", arguments, BOTH)


@pytest.mark.parametrize(
    ("dtype", "weight"), [(BF16, FP32), (FP16, FP32), (FP32, BF16), (BF16, FP16)], ids=str
)
def test_weight_of_another_dtype(backend, poisoned_memory, dtype, weight):
    arguments = cases.rms_norm(backend, 3, 5, 128, dtype=dtype)
    assert_gradients(backend, "rms_norm", in_dtypes(arguments, weight=weight), BOTH)


@pytest.mark.parametrize("wanted", [("x",), ("weight",)], ids=str)
def test_one_gradient(backend, poisoned_memory, wanted):
    arguments = cases.rms_norm(backend, 20, 512, dtype=BF16)
    assert_gradients(backend, "rms_norm", arguments, wanted)


def test_without_a_weight(backend, poisoned_memory):
    arguments = cases.rms_norm(backend, 20, 512, dtype=BF16, weighted=False)
    assert_gradients(backend, "rms_norm", arguments, ("x",))


@pytest.mark.parametrize("view", ["columns", "odd address", "transposed"])
def test_strided(backend, view):
    arguments = cases.rms_norm(backend, 64, 64, dtype=BF16)
    packed = backend.randn(64, 3 * 64, dtype=BF16)
    views = {"columns": packed[:, 64:128], "odd address": packed[:, 1:65]}
    arguments["x"] = views.get(view, packed[:, :64].T)
    assert_gradients(backend, "rms_norm", arguments, BOTH)


@pytest.mark.parametrize("view", ["one number", "one row", "transposed", "odd address"])
def test_gradients_that_come_as_they_like(backend, view):
    arguments = cases.rms_norm(backend, 64, 64)
    many = backend.randn(64, 65)
    grad = {
        "one number": many[0, 0].expand(64, 64),
        "one row": many[:1, :64].expand(64, 64),
        "transposed": many[:, :64].T,
        "odd address": many[:, 1:],
    }[view]
    assert_gradients(backend, "rms_norm", arguments, BOTH, [grad])


def test_no_rows(backend, poisoned_memory):
    arguments = cases.rms_norm(backend, 0, 64)
    arguments = {name: x.requires_grad_() for name, x in arguments.items()}
    backend.ops.rms_norm(**arguments).sum().backward()
    assert arguments["x"].grad.shape == (0, 64) and (arguments["weight"].grad == 0).all()


def test_the_host_reads_nothing(backend):
    arguments = cases.rms_norm(backend, 20, 64)
    leaves = [x.requires_grad_() for x in arguments.values()]
    y = backend.ops.rms_norm(**arguments)
    with NoHostReads():
        torch.autograd.grad(y, leaves, torch.ones_like(y))
