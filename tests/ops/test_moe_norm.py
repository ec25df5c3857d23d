import pytest
import torch
from support import cases, float64
from support.backends import BF16, FP16, FP32, in_dtypes
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # shape, eps
    "no rows": ((0, 64), 1e-6),
    "no width": ((3, 0), 1e-6),
    "one row": ((1, 256), 1e-6),
    "one dimension": ((640,), 1e-6),
    "odd width": ((7, 37), 1e-6),
    "batch": ((2, 3, 96), 1e-6),
    "26B-A4B width": ((3, 2816), 1e-6),
    "wide": ((2, 5376), 1e-6),
    "beyond 16 KB a row": ((2, 8448), 1e-6),
    "large eps": ((3, 128), 0.3),
}


def check(backend, arguments, eps, dtype):
    results = backend.ops.moe_norm(**arguments, eps=eps)
    exact = float64.moe_norm(**arguments, eps=eps)
    wide = torch.promote_types(dtype, arguments["scale"].dtype)
    rounded = float64.moe_norm(**arguments, eps=eps, dtype=dtype, wide=wide)
    size = dict(terms=arguments["x"].shape[-1], inner=torch.promote_types(dtype, FP32))
    for result, e, r, kind in zip(results, exact, rounded, (dtype, wide), strict=True):
        assert result.is_contiguous()
        assert_close_to_float64(result, e, kind, rounded=r, **size)


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_moe_norm(backend, poisoned_memory, case, dtype):
    shape, eps = CASES[case]
    check(backend, cases.moe_norm(backend, *shape, dtype=dtype), eps, dtype)


MIXES = {
    "fp32 weights": {"x": BF16},
    "fp32 weights beside fp16": {"x": FP16},
    "fp32 scale": {"x": BF16, "weight": BF16},
    "fp32 weight": {"x": FP16, "scale": FP16},
    "16-bit weights": {"weight": BF16, "scale": FP16},
    "three of 16 bits": {"x": BF16, "weight": FP16, "scale": FP16},
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", ["no rows", "odd width", "26B-A4B width", "wide"])
def test_mixed_dtypes(backend, poisoned_memory, case, mix):
    shape, eps = CASES[case]
    arguments = in_dtypes(cases.moe_norm(backend, *shape), **MIXES[mix])
    check(backend, arguments, eps, arguments["x"].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["columns", "transposed", "rows apart"])
def test_strided(backend, view, dtype):
    arguments = cases.moe_norm(backend, 64, 64, dtype=dtype)
    packed = backend.randn(64, 3 * 64, dtype=dtype)
    views = {"columns": packed[:, 64:128], "transposed": packed[:, :64].T}
    arguments["x"] = views.get(view, packed.view(3 * 64, 64)[::3])
    check(backend, arguments, 1e-6, dtype)


@pytest.mark.parametrize("shape", [(3, 128), (3, 129)])
def test_weights_may_be_strided(backend, shape):
    arguments = cases.moe_norm(backend, *shape)
    for name in ("weight", "scale"):
        arguments[name] = backend.weight(2 * shape[1])[::2]
    check(backend, arguments, 1e-6, torch.float32)


@pytest.mark.parametrize("name", ["x", "weight", "scale"])
def test_memory_that_16_byte_loads_cannot_read(backend, name):
    arguments = cases.moe_norm(backend, 3, 128)
    arguments[name] = backend.weight(1 + arguments[name].numel())[1:].view_as(arguments[name])
    check(backend, arguments, 1e-6, torch.float32)


@pytest.mark.parametrize("width", [512, 511])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(BF16, BF16), (FP16, FP16), (BF16, FP32)], ids=["bf16", "fp16", "mixed"]
)
def test_router_x_is_rounded_after_each_product(backend, width, dtype, scale):
    """The reference's bits, but where the norm's own last place differs."""
    arguments = in_dtypes(cases.moe_norm(backend, 64, width, dtype=dtype), scale=scale)
    _, router_x = backend.ops.moe_norm(**arguments)
    norm = float64.rms_norm(arguments["x"], None, 1e-6).to(dtype)
    expected = norm * arguments["scale"].cpu() * width**-0.5
    assert (router_x.cpu() == expected).double().mean() > 0.99


def test_inputs_stay_as_they_are(backend):
    arguments = cases.moe_norm(backend, 4, 96)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    backend.ops.moe_norm(**arguments)
    assert all(torch.equal(arguments[name], before[name]) for name in before)


BAD = {
    "integer x": ({"x": lambda x: x.long()}, TypeError, "x must be a floating.*got torch.int64"),
    "scalar x": ({"x": lambda x: x[0, 0]}, ValueError, "x must have at least one dimension"),
    "integer weight": (
        {"weight": lambda t: t.int()},
        TypeError,
        "weight must be a floating-point tensor, got torch.int32",
    ),
    "weight shape": (
        {"weight": lambda w: w[:32]},
        ValueError,
        r"weight must have shape \[64\], got \[32\]",
    ),
    "integer scale": (
        {"scale": lambda t: t.int()},
        TypeError,
        "scale must be a floating-point tensor, got torch.int32",
    ),
    "scale shape": (
        {"scale": lambda s: s[:1]},
        ValueError,
        r"scale must have shape \[64\], got \[1\]",
    ),
    "scale device": (
        {"scale": lambda s: s.to("meta")},
        ValueError,
        "scale must be on the device of x, c.*, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = cases.moe_norm(backend, 3, 64)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.moe_norm, arguments, error, sentence)
