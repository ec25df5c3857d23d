"""Every op on the dtypes that meet under autocast, and while autocast is on."""

import contextlib

import pytest
import torch
from support import emulated, float64
from support.backends import BF16, FP16, FP32, FP64
from support.cases import BRANCHES, public, under_autocast
from support.expect import assert_close_to_float64
from support.marks import needs_compiler
from support.samples import samples
from test_ops import DIFFERENTIABLE, NAMES, REGISTERED, flat
from torch import Tensor
from torch.library import opcheck

import gemma4_kernels
from gemma4_kernels import opset

PRODUCTS = ("attention_prefill", "attention_decode", "moe_experts", "linear_small")
PRODUCTS += ("linear_packed", "moe_open", "moe_experts_small")


def mixed(name, dtype=BF16, grad=False, case="usual"):
    """Arguments of the op by their names, the branches in 16 bits."""
    arguments = samples(name)[case]
    if name in BRANCHES:
        arguments = under_autocast(name, arguments, dtype)
    return {key: leaf(value, grad) for key, value in arguments.items()}


def leaf(value, grad):
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(grad and value.is_floating_point())


def autocast(device="cpu", dtype=BF16):
    return torch.autocast(device, dtype)


def on(backend, arguments):
    return {k: backend.to(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def assert_same(actual, expected):
    for a, e in zip(flat(actual), flat(expected), strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


@pytest.mark.parametrize("name", BRANCHES)
def test_opcheck(name):
    grad = name in DIFFERENTIABLE
    for case in list(samples(name))[:2]:
        arguments = mixed(name, grad=grad, case=case)
        opcheck(getattr(REGISTERED, name).default, tuple(arguments.values()))


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", BRANCHES)
def test_kernels_serve_the_mix(name, dtype):
    """No twin stands in: the compiled op itself takes the arguments, or says what it is not for."""
    emulated.ops()
    arguments = mixed(name, dtype)
    if name == "moe_experts":
        arguments["x"] = torch.randn(3, 16).to(dtype)
        arguments["gate_up"], arguments["down"] = torch.randn(5, 16, 16), torch.randn(5, 16, 8)
    assert opset.OPS[name].why_eager(tuple(arguments.values())) is None
    compiled = getattr(getattr(torch.ops, emulated.NAME), name)
    twin = getattr(REGISTERED, name)
    actual, expected = compiled(*arguments.values()), twin(*arguments.values())
    assert [x.dtype for x in flat(actual)] == [x.dtype for x in flat(expected)]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("active", [False, True], ids=["mixed", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(device_backend, name, active, training):
    training = training and name in DIFFERENTIABLE
    function, device = getattr(device_backend.ops, name), device_backend.device

    def call(arguments):
        with autocast(device) if active else contextlib.nullcontext():
            return function(**public(name, arguments))

    torch.compiler.reset()
    torch.manual_seed(1)
    arguments = on(device_backend, mixed(name, grad=training))
    again = {key: leaf(value, training) for key, value in arguments.items()}
    actual = torch.compile(call, fullgraph=True, backend="aot_eager")(again)
    expected = call(arguments)
    assert_same(actual, expected)
    if training:
        # A compiler takes the op's own gradient, eager torch may take autograd's of the twin, which
        # rounds to 16 bits on its way.
        pairs = zip(gradients(actual, again), gradients(expected, arguments), strict=True)
        for a, e in pairs:
            torch.testing.assert_close(a, e, rtol=0.02, atol=0.02)


def gradients(outputs, arguments):
    torch.manual_seed(2)
    outputs = [x for x in flat(outputs) if x.requires_grad]
    grads = [torch.randn_like(x) for x in outputs]
    leaves = [a for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PRODUCTS])
def test_arithmetic_stays_the_ops_own(backend, name):
    """Sums, powers and norms that autocast would cast, and their gradients inside and outside."""
    function, grad = getattr(backend.ops, name), name in DIFFERENTIABLE
    given = [on(backend, mixed(name, dtype, grad=grad)) for dtype in (BF16, FP32)]
    for arguments in given:
        copies = [{key: leaf(v, grad) for key, v in arguments.items()} for _ in range(2)]
        expected = function(**arguments)
        with autocast(backend.device):
            actual = function(**copies[0])
            within = gradients(actual, copies[0]) if grad else ()
        assert_same(actual, expected)
        if grad:
            after = gradients(function(**copies[1]), copies[1])
            expected_gradients = gradients(expected, arguments)
            assert_same(within, expected_gradients)
            assert_same(after, expected_gradients)


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if n in BRANCHES])
def test_gradients_have_the_dtypes_of_the_inputs(backend, name):
    arguments = on(backend, mixed(name, grad=True))
    if name == "moe_route":  # every expert is chosen, so no choice hangs on a rounding
        arguments["k"] = arguments["logits"].shape[1]
    outputs = getattr(backend.ops, name)(**public(name, arguments))
    actual = gradients(outputs, arguments)
    exact = {
        key: value.detach().double().cpu().requires_grad_() if is_leaf(value) else value
        for key, value in arguments.items()
    }
    torch.manual_seed(2)
    numbers = [x for x in flat(outputs) if x.requires_grad]
    grads = [torch.randn_like(x).double().cpu() for x in numbers]
    formula = flat(getattr(float64, name)(**public(name, exact)))
    leaves = [value for value in exact.values() if is_leaf(value)]
    wanted = [x for x in formula if x.requires_grad]
    expected = torch.autograd.grad(wanted, leaves, grads, materialize_grads=True)
    given = [value for value in arguments.values() if is_leaf(value)]
    for a, e, value in zip(actual, expected, given, strict=True):
        # A chain of a few roundings to 16 bits, each to the size of the larger values.
        size = e.abs().max()
        rounded = e + 3 * torch.finfo(BF16).eps * size
        assert_close_to_float64(a, e, value.dtype, rounded=rounded, magnitude=size, inner=FP32)


def is_leaf(value):
    return isinstance(value, Tensor) and value.requires_grad


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_gradients_of_fp32_weights_add_up_in_fp32(backend, name):
    """In bf16 a sum of ones stays at 256."""
    weight = backend.to(torch.ones(8)).requires_grad_()
    x = backend.to(torch.ones(5000, 8, dtype=BF16))
    if name == "rms_norm":
        y = backend.ops.rms_norm(x, weight)
    else:
        y, _ = backend.ops.add_rms_norm(x, x.float(), weight)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 5000.0))


def attention_arguments(name, *dtypes):
    arguments = mixed(name)
    keys = [key for key in ("q", "k", "v", "k_cache", "v_cache") if key in arguments]
    for key, dtype in zip(keys, dtypes, strict=True):
        arguments[key] = arguments[key].to(dtype)
    return arguments, keys


@pytest.mark.parametrize("dtypes", [(BF16, FP32, FP32), (FP32, BF16, BF16), (FP32, FP32, FP32)])
@pytest.mark.parametrize("name", ["attention_prefill", "attention_decode"])
@pytest.mark.parametrize("to", [BF16, FP16], ids=["bf16", "fp16"])
def test_attention_multiplies_in_autocasts_dtype(backend, name, dtypes, to):
    arguments, keys = attention_arguments(name, *dtypes)
    arguments = on(backend, arguments)
    with autocast(backend.device, to):
        actual = getattr(backend.ops, name)(**arguments)
    cast = arguments | {key: arguments[key].to(to) for key in keys}
    expected = getattr(backend.ops, name)(**cast)
    assert_same(actual, expected)
    assert actual[0].dtype == to


@pytest.mark.parametrize("name", ["attention_prefill", "attention_decode"])
def test_fp64_is_not_cast(backend, name):
    arguments, _ = attention_arguments(name, FP64, FP64, FP64)
    arguments = on(backend, arguments)
    with autocast(backend.device):
        actual = getattr(backend.ops, name)(**arguments)
    assert_same(actual, getattr(backend.ops, name)(**arguments))
    assert actual[0].dtype == FP64


def test_mixed_attention_is_refused_outside(backend):
    for name, key in (("attention_prefill", "k"), ("attention_decode", "k_cache")):
        arguments, _ = attention_arguments(name, BF16, FP32, FP32)
        sentence = f"{key} must have the dtype of q, torch.bfloat16, got torch.float32"
        with pytest.raises(TypeError, match=sentence):
            getattr(backend.ops, name)(**on(backend, arguments))


def test_gradients_through_the_casts_of_attention(backend):
    arguments, keys = attention_arguments("attention_prefill", BF16, FP32, FP32)
    arguments = on(backend, arguments)
    leaves = {key: arguments[key].requires_grad_() for key in keys}
    with autocast(backend.device):
        out, _ = backend.ops.attention_prefill(**arguments)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, list(leaves.values()), grad)
    assert [g.dtype for g in actual] == [BF16, FP32, FP32]
    cast = {key: value.detach().bfloat16().requires_grad_() for key, value in leaves.items()}
    out, _ = backend.ops.attention_prefill(**(arguments | cast))
    expected = torch.autograd.grad(out, list(cast.values()), grad)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e.to(a.dtype))


@pytest.mark.parametrize("weights", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("x", [FP32, FP16, BF16], ids=str)
def test_experts_multiply_in_autocasts_dtype(backend, x, weights):
    arguments = public("moe_experts", on(backend, mixed("moe_experts", x)))
    arguments |= {key: arguments[key].to(weights) for key in ("gate_up", "down")}
    with autocast(backend.device):
        actual = backend.ops.moe_experts(**arguments)
    cast = {key: arguments[key].to(BF16) for key in ("x", "gate_up", "down")}
    expected = backend.ops.moe_experts(**(arguments | cast))
    assert actual.dtype == x
    assert torch.equal(actual, expected.to(x))


def test_gradients_of_fp32_experts(backend):
    """They come in fp32, and the fp32 x of the autocast region gets its own."""
    arguments = public("moe_experts", on(backend, mixed("moe_experts", FP32, grad=True)))
    with autocast(backend.device):
        y = backend.ops.moe_experts(**arguments)
    grad = torch.randn_like(y)
    keys = ("x", "gate_up", "down", "weights")
    actual = torch.autograd.grad(y, [arguments[key] for key in keys], grad)
    assert all(g.dtype == FP32 for g in actual)
    exact = {key: arguments[key].detach().double().cpu().requires_grad_() for key in keys}
    y = float64.moe_experts(**exact, experts=arguments["experts"])
    expected = torch.autograd.grad(y, list(exact.values()), grad.double().cpu())
    for a, e in zip(actual, expected, strict=True):
        size = e.abs().max()
        rounded = e + 3 * torch.finfo(BF16).eps * size
        assert_close_to_float64(a, e, FP32, rounded=rounded, magnitude=size)


@pytest.mark.parametrize("name", NAMES)
def test_fakes_inside_autocast(name):
    """On the meta device, which autocast does not know."""
    arguments, function = mixed(name), getattr(gemma4_kernels, name)
    on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with autocast():
        fakes = function(**public(name, on_meta))
    expected = function(**public(name, arguments))
    for fake, e in zip(flat(fakes), flat(expected), strict=True):
        assert fake.is_meta and fake.shape == e.shape and fake.dtype == e.dtype
