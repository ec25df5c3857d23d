import pytest
from support import cases
from support.backends import BF16, FP16, FP32, in_dtypes
from support.gradients import assert_gradients, drawn
from support.marks import all_dtypes

SHAPES = [(1, 256), (7, 37), (2, 3, 96), (40, 104)]  # the last: more rows than blocks
ALL = ("x", "weight", "scale")


@all_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(backend, poisoned_memory, shape, dtype):
    assert_gradients(backend, "moe_norm", cases.moe_norm(backend, *shape, dtype=dtype), ALL)


MIXES = {
    "autocast to bf16": {"x": BF16},
    "fp32 scale": {"x": FP16, "weight": FP16},
    "16-bit weights": {"weight": BF16, "scale": FP16},
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_dtypes(backend, poisoned_memory, mix):
    arguments = in_dtypes(cases.moe_norm(backend, 20, 96), **MIXES[mix])
    assert_gradients(backend, "moe_norm", arguments, ALL)


@pytest.mark.parametrize("scale", [BF16, FP32], ids=str)
def test_wide_rows(backend, poisoned_memory, scale):
    arguments = in_dtypes(cases.moe_norm(backend, 7, 5376, dtype=scale), x=BF16)
    assert_gradients(backend, "moe_norm", arguments, ALL)


@pytest.mark.parametrize("wanted", [(name,) for name in ALL], ids=str)
def test_one_gradient(backend, poisoned_memory, wanted):
    assert_gradients(backend, "moe_norm", cases.moe_norm(backend, 20, 96, dtype=BF16), wanted)


@pytest.mark.parametrize("unused", [0, 1], ids=["y", "router_x"])
def test_one_result_is_not_used(backend, poisoned_memory, unused):
    arguments = cases.moe_norm(backend, 40, 104)
    grads = drawn(backend, "moe_norm", arguments)
    grads[unused] = None
    wanted = ("x", "scale" if unused == 0 else "weight")
    assert_gradients(backend, "moe_norm", arguments, wanted, grads)


def test_strided(backend):
    arguments = cases.moe_norm(backend, 40, 104)
    arguments["x"] = backend.randn(40, 312)[:, 104:208]
    grads = [backend.randn(40, 312 + 8 * i)[:, 1:105] for i in range(2)]
    assert_gradients(backend, "moe_norm", arguments, ALL, grads)
