import pytest
import torch
from support import cases, float64
from support.backends import BF16, FP16, FP32, FP64, in_dtypes
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # T, L, P, layer
    "no tokens": (0, 3, 8, 1),
    "one token": (1, 1, 8, 0),
    "odd width": (5, 3, 7, 2),
    "first layer": (5, 4, 64, 0),
    "last layer": (5, 4, 64, 3),
    "E2B": (3, 35, 256, 17),
    "long": (130, 3, 24, 1),
}


def inputs(backend, case, dtype):
    """Only the slice of the layer is filled; the others must not be read."""
    tokens, layers, width, layer = CASES[case]
    arguments = cases.ple_gate(backend, tokens, layers, width, layer, dtype=dtype)
    arguments["ple"][:, [other for other in range(layers) if other != layer]] = float("nan")
    return arguments


def check(backend, arguments, dtype):
    y = backend.ops.ple_gate(**arguments)
    gate, ple = (arguments[name].double().cpu() for name in ("gate", "ple"))
    # 1 + tanh cancels where the gate is far below 0, hence an error of the size of the factors.
    size = (gate * ple[:, arguments["layer"]]).abs()
    expected = float64.ple_gate(**arguments)
    wide = torch.promote_types(dtype, arguments["ple"].dtype)
    rounded = None
    if wide != dtype:
        rounded = float64.ple_gate(**arguments, dtype=dtype, wide=wide)
    inner = torch.promote_types(dtype, FP32)
    assert_close_to_float64(
        y, expected, wide, rounded=rounded, roundings=2, magnitude=size, inner=inner
    )
    assert y.is_contiguous()


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_ple_gate(backend, poisoned_memory, case, dtype):
    check(backend, inputs(backend, case, dtype), dtype)


@pytest.mark.parametrize(
    ("gate", "ple"),
    [(BF16, FP32), (FP16, FP32), (FP32, BF16), (BF16, FP16), (FP16, FP64)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_mixed_dtypes(backend, poisoned_memory, case, gate, ple):
    arguments = in_dtypes(inputs(backend, case, torch.float32), gate=gate, ple=ple)
    check(backend, arguments, gate)


def test_strided(backend):
    arguments = inputs(backend, "first layer", torch.float32)
    arguments["gate"] = backend.randn(5, 3 * 64)[:, 64:128]
    arguments["ple"] = backend.randn(4, 5, 64).transpose(0, 1)
    check(backend, arguments, torch.float32)
    arguments["gate"] = backend.randn(64, 5).T
    check(backend, arguments, torch.float32)


def test_layers_that_start_anywhere(backend):
    arguments = inputs(backend, "first layer", torch.bfloat16)
    arguments["ple"] = backend.randn(5, 4, 65, dtype=torch.bfloat16)[..., :64]
    for layer in range(4):
        check(backend, arguments | {"layer": layer}, torch.bfloat16)


def test_gelu_is_the_tanh_form(backend):
    two, one = backend.to(torch.tensor([[2.0]])), backend.to(torch.ones(1, 1, 1))
    assert backend.ops.ple_gate(two, one, 0).item() == pytest.approx(1.954598, abs=1e-6)


def test_fp16_saturates(backend):
    """Where the exact product is past fp16's largest value, that value comes; NaN stays."""
    gate = torch.full((1, 3), 300.0, dtype=torch.float16)
    ple = torch.tensor([[[300.0, -300.0, float("nan")]]], dtype=torch.float16)
    y = backend.ops.ple_gate(backend.to(gate), backend.to(ple), 0)[0].cpu()
    assert y[:2].tolist() == [65504.0, -65504.0] and y[2].isnan()


def gradients(ple_gate, arguments, grad):
    """Of gate and of the layer's slice of ple; of the other slices there is none."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("gate", "ple")}
    d_gate, d_ple = torch.autograd.grad(
        ple_gate(**(arguments | leaves)), list(leaves.values()), grad
    )
    others = [i for i in range(d_ple.shape[1]) if i != arguments["layer"]]
    assert (d_ple[:, others] == 0).all()
    return d_gate, d_ple[:, arguments["layer"]]


def check_gradients(backend, arguments):
    gate, ple, layer = (arguments[name] for name in ("gate", "ple", "layer"))
    grad = backend.randn(*gate.shape, dtype=torch.promote_types(gate.dtype, ple.dtype))
    actual = gradients(backend.ops.ple_gate, arguments, grad)
    exact = {
        n: x.double().cpu() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()
    }
    expected = gradients(float64.ple_gate, exact, grad.double().cpu())
    size = exact["gate"].abs()
    # The slope has the exponent's error times its own slope.
    sizes = (1 + size) ** 2 * exact["ple"][:, layer].abs(), size
    roundings = 3 if backend.name == "eager" else 1
    for a, e, of, like in zip(actual, expected, sizes, (gate, ple), strict=True):
        of = roundings * of * grad.double().cpu().abs()
        # The twin keeps what it makes of the gate in its dtype.
        inner = torch.promote_types(gate.dtype, FP32) if backend.name != "eager" else gate.dtype
        assert_close_to_float64(
            a, e, like.dtype, roundings=roundings, terms=4, magnitude=of, inner=inner
        )


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_gradient(backend, poisoned_memory, case, dtype):
    check_gradients(backend, inputs(backend, case, dtype))


@pytest.mark.parametrize(("gate", "ple"), [(BF16, FP32), (FP16, FP32), (FP32, BF16)], ids=str)
def test_gradient_of_mixed_dtypes(backend, poisoned_memory, gate, ple):
    arguments = inputs(backend, "last layer", torch.float32)
    check_gradients(backend, in_dtypes(arguments, gate=gate, ple=ple))


@pytest.mark.parametrize("wanted", ["gate", "ple"])
def test_gradient_of_one_input(backend, poisoned_memory, wanted):
    arguments = inputs(backend, "odd width", torch.float32)
    both = gradients(backend.ops.ple_gate, arguments, grad := backend.randn(5, 7))
    leaf = arguments[wanted] = arguments[wanted].detach().requires_grad_()
    (found,) = torch.autograd.grad(backend.ops.ple_gate(**arguments), leaf, grad)
    found = found if wanted == "gate" else found[:, arguments["layer"]]
    assert torch.equal(found, both[("gate", "ple").index(wanted)])


def test_what_is_held_back_passes_nothing(backend):
    gate = torch.tensor([[300.0, 300.0, 250.0]], dtype=torch.float16)
    ple = torch.tensor([[[300.0, -300.0, 250.0]]], dtype=torch.float16)
    arguments = {"gate": backend.to(gate), "ple": backend.to(ple), "layer": 0}
    found = gradients(backend.ops.ple_gate, arguments, backend.to(torch.ones_like(gate)))
    assert [x[0].tolist() for x in found] == [[0, 0, 250]] * 2


BAD = {
    "integer gate": (
        {"gate": lambda g: g.int()},
        TypeError,
        "gate must be a floating.*got torch.int32",
    ),
    "gate of three dimensions": (
        {"gate": lambda g: g[None]},
        ValueError,
        r"gate must be \[T, P\], got \[1, 5, 64\]",
    ),
    "integer ple": (
        {"ple": lambda t: t.int()},
        TypeError,
        "ple must be a floating-point tensor, got torch.int32",
    ),
    "ple device": (
        {"ple": lambda p: p.to("meta")},
        ValueError,
        "ple must be on the device of gate, c.*, got meta",
    ),
    "ple tokens": (
        {"ple": lambda p: p[:4]},
        ValueError,
        r"ple must be \[5, L, 64\], got \[4, 4, 64\]",
    ),
    "ple width": (
        {"ple": lambda p: p[..., :32]},
        ValueError,
        r"ple must be \[5, L, 64\], got \[5, 4, 32\]",
    ),
    "flat ple": (
        {"ple": lambda p: p.flatten(1)},
        ValueError,
        r"ple must be \[5, L, 64\], got \[5, 256\]",
    ),
    "layer too large": ({"layer": lambda n: 4}, ValueError, "layer must lie in .* 3, got 4"),
    "layer below zero": ({"layer": lambda n: -1}, ValueError, "layer must lie in .*, got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = inputs(backend, "first layer", torch.float32)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.ple_gate, arguments, error, sentence)
