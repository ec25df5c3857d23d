import pytest
import torch
from support import cases
from support.backends import BF16, FP16, FP32, in_dtypes
from support.gradients import assert_gradients, drawn
from support.marks import all_dtypes

CASES = {  # shape, next_weight, scale
    "one row": ((1, 256), True, True),
    "odd width": ((7, 37), True, True),
    "batch": ((2, 3, 96), True, True),
    "more rows than blocks": ((40, 104), True, True),
    "no scale": ((8, 128), True, False),
    "last norm": ((8, 128), False, True),
    "neither": ((8, 128), False, False),
}
ALL = ("x", "residual", "post_weight", "next_weight")


def inputs(backend, case, dtype=FP32):
    shape, next_weight, scale = CASES[case]
    options = dict(next_weight=next_weight, scale=scale)
    arguments = cases.add_rms_norm(backend, *shape, dtype=dtype, **options)
    return arguments, ALL if next_weight else ALL[:3]


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_gradients(backend, poisoned_memory, case, dtype):
    assert_gradients(backend, "add_rms_norm", *inputs(backend, case, dtype))


MIXES = {
    "autocast to bf16": {"x": BF16},
    "fp32 weights": {"x": FP16, "residual": FP16},
    "16-bit residual": {"residual": BF16},
    "two of 16 bits": {"x": BF16, "residual": FP16},
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_dtypes(backend, poisoned_memory, mix):
    arguments, wanted = inputs(backend, "batch")
    assert_gradients(backend, "add_rms_norm", in_dtypes(arguments, **MIXES[mix]), wanted)


@pytest.mark.parametrize(
    ("width", "dtype", "residual"),
    [(3840, BF16, BF16), (5376, BF16, BF16), (5376, FP16, FP32), (5376, FP32, FP32)],
    ids=str,
)
def test_wide_rows(backend, poisoned_memory, width, dtype, residual):
    arguments = in_dtypes(cases.add_rms_norm(backend, 7, width, dtype=residual), x=dtype)
    assert_gradients(backend, "add_rms_norm", arguments, ALL)


@pytest.mark.parametrize("wanted", [*((name,) for name in ALL), ("x", "residual")], ids=str)
def test_some_gradients(backend, poisoned_memory, wanted):
    arguments, _ = inputs(backend, "more rows than blocks", BF16)
    assert_gradients(backend, "add_rms_norm", arguments, wanted)


@pytest.mark.parametrize("unused", [0, 1], ids=["residual", "y"])
def test_one_result_is_not_used(backend, poisoned_memory, unused):
    arguments, _ = inputs(backend, "more rows than blocks")
    grads = drawn(backend, "add_rms_norm", arguments)
    grads[unused] = None
    wanted = ALL if unused == 0 else ALL[:3]
    assert_gradients(backend, "add_rms_norm", arguments, wanted, grads)


@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_the_scale_has_a_gradient(backend, scale):
    """At 0 too, where what comes out tells nothing of it."""
    arguments, _ = inputs(backend, "batch")
    arguments["scale"] = backend.to(torch.tensor([scale]))
    if scale == 0:  # the norm of zeros has an infinite slope but for eps
        arguments["next_weight"] = None
    assert_gradients(backend, "add_rms_norm", arguments, ("x", "residual", "scale"))


@pytest.mark.parametrize("view", ["columns", "odd address"])
def test_strided(backend, view):
    arguments, wanted = inputs(backend, "more rows than blocks", BF16)
    begin = 104 if view == "columns" else 1
    for name in ("x", "residual"):
        arguments[name] = backend.randn(40, 312, dtype=BF16)[:, begin : begin + 104]
    grads = [backend.randn(40, 312, dtype=BF16)[:, begin : begin + 104] for _ in range(2)]
    assert_gradients(backend, "add_rms_norm", arguments, wanted, grads)


def test_the_output_is_kept_and_not_the_residual(backend):
    """What is alive for the backward is what other ops keep anyway."""
    arguments, _ = inputs(backend, "batch")
    arguments = {name: x.requires_grad_(name != "scale") for name, x in arguments.items()}
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks:
        residual, _ = torch.ops.gemma4_kernels.add_rms_norm(*arguments.values(), 1e-6)
    addresses = {x.data_ptr() for x in kept}
    assert residual.data_ptr() in addresses
    assert arguments["residual"].data_ptr() not in addresses
