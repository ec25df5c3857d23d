"""What holds for all ops alike: names, registration, compilation, gradients."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from support import backward_cases, cases, emulated
from support.backends import EAGER
from support.marks import needs_compiler
from support.samples import NOT_DIFFERENTIABLE, samples
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.library import opcheck

import gemma4_kernels
from gemma4_kernels import ops, opset, reference
from gemma4_kernels.e4m3 import E4M3

NAMES = sorted(
    name
    for name in gemma4_kernels.__all__
    if name not in ("build_info", "dependent_launches") and not name.startswith("flash_attn")
)
REGISTERED = getattr(torch.ops, opset.NAMESPACE)


def in_schemas():
    return set(opset.OPS)


def defined_in(module):
    return {
        name
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and value.__module__.startswith(module.__name__)
    }


def test_one_name_per_op():
    """Schema, public function, eager twin and test file; a backward op has the two inner ones."""
    names = set(NAMES)
    backward = {name for name in in_schemas() if name.endswith("_backward")}
    assert {name.removesuffix("_backward") for name in backward} <= names
    assert in_schemas() - backward == names
    assert set(ops.__all__) == names
    assert defined_in(reference) == names | backward
    files = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert names <= files


@pytest.mark.parametrize("name", [n for n in gemma4_kernels.__all__ if n != "build_info"])
def test_public_function_is_documented(name):
    """With the type, and with a word, of every argument."""
    function = getattr(gemma4_kernels, name)
    signature = inspect.signature(function)
    words = set(re.findall(r"\w+", function.__doc__))
    assert not signature.parameters.keys() - words
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation is not signature.empty


def arguments_of(name, **options):
    """By the name of the case, in the schema's order."""
    return {case: tuple(a.values()) for case, a in samples(name, **options).items()}


CASES = [pytest.param(name, case, id=f"{name}: {case}") for name in NAMES for case in samples(name)]
DIFFERENTIABLE = [name for name in NAMES if name not in NOT_DIFFERENTIABLE]


ALL_UTILS = (
    *("test_schema", "test_autograd_registration", "test_faketensor"),
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_opcheck(name, case, grad):
    """Schema (what is mutated, what aliases), autograd, fake (shapes, strides), AOT dispatch."""
    arguments = arguments_of(name, grad=grad)[case]
    if grad and not any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        grad = False
    # What was written is not looked at in 8-bit floats, which torch cannot compare.
    comparable = not any(isinstance(a, Tensor) and a.dtype == E4M3 for a in arguments)
    utils = ALL_UTILS if comparable else [u for u in ALL_UTILS if u != "test_schema"]
    opcheck(getattr(REGISTERED, name).default, arguments, test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fake_knows_the_dtypes(name, dtype):
    for arguments in arguments_of(name, dtype=dtype).values():
        opcheck(getattr(REGISTERED, name).default, arguments, test_utils="test_faketensor")


BACKWARD_CASES = [
    p
    for p in CASES
    if f"{p.values[0]}_backward" in opset.OPS and p.values[1] not in ("no lse", "no tokens")
]


@pytest.mark.parametrize(("name", "case"), BACKWARD_CASES)
def test_opcheck_of_backward_ops(name, case):
    backward = backward_sample(name, arguments_of(name)[case])
    opcheck(getattr(REGISTERED, f"{name}_backward").default, backward)


def backward_sample(name, arguments):
    if name == "moe_experts":
        dense = arguments[1].is_floating_point()
        return torch.randn_like(arguments[0]), *arguments, True, dense, False, True
    forward = dict(zip(opset.OPS[name].names, arguments, strict=True))
    return tuple(getattr(backward_cases, f"{name}_backward")(EAGER, forward).values())


def flat(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


@pytest.mark.parametrize("name", NAMES)
def test_public_function_is_the_op(name):
    """On the CPU the dispatcher is passed by; the results must not tell."""
    for arguments in arguments_of(name).values():
        twice = [[a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(2)]
        by_op = flat(getattr(REGISTERED, name)(*twice[0]))
        direct = flat(call_public(name, twice[1]))
        # The op has no way to leave a result out; it returns an empty one.
        given = [x for x in by_op if x.numel()] if len(by_op) > len(direct) else by_op
        for a, b in zip(given, direct, strict=True):
            assert a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(*twice, strict=True):
            assert not isinstance(a, Tensor) or torch.equal(a, b)


def call_public(name, arguments):
    """The public function on arguments in the schema's order."""
    given = dict(zip(opset.OPS[name].names, arguments, strict=True))
    return getattr(gemma4_kernels, name)(**cases.public(name, given))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name, training):
    if training and name not in DIFFERENTIABLE:
        training = False
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: call_public(name, a), fullgraph=True, backend="aot_eager")
    for arguments in list(arguments_of(name, grad=training).values())[:3]:
        copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
        fresh = [
            c.requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for a, c in zip(arguments, copies, strict=True)
        ]
        again = [
            c.detach().clone().requires_grad_(c.requires_grad) if isinstance(c, Tensor) else c
            for c in fresh
        ]
        expected, actual = flat(call_public(name, fresh)), flat(compiled(*again))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        for a, e in zip(again, fresh, strict=True):
            assert not isinstance(a, Tensor) or torch.equal(a, e)
        if any(e.requires_grad for e in expected):
            for a, e in zip(
                leaf_gradients(actual, again), leaf_gradients(expected, fresh), strict=True
            ):
                torch.testing.assert_close(a, e)


def leaf_gradients(outputs, arguments):
    torch.manual_seed(1)
    loss = sum((x * torch.randn_like(x)).sum() for x in outputs if x.is_floating_point())
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


def count_graphs(function, calls, **options):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(function, fullgraph=True, backend=backend, **options)
    for arguments in calls:
        compiled(*arguments)
    return len(graphs)


def test_one_graph_for_prompts_of_all_lengths():
    def attend(q, k, v, cu_seqlens, longest):
        return gemma4_kernels.attention_prefill(q, k, v, cu_seqlens, cu_seqlens, longest, longest)

    calls = [
        (*(torch.randn(tokens, h, 8) for h in (4, 2, 2)), EAGER.int32(0, 2, tokens), tokens - 2)
        for tokens in (5, 9, 14)
    ]
    assert count_graphs(attend, calls, dynamic=True) == 1


def test_one_graph_for_all_choices_of_experts():
    calls = [tuple(cases.moe_experts(EAGER, 6, 4, 2, 8, 3).values()) for _ in range(5)]
    assert count_graphs(gemma4_kernels.moe_experts, calls) == 1


def numbers_of(outputs):
    """What a difference quotient can be taken of: no index, no -inf."""
    return [x.where(x.isfinite(), 0) for x in outputs if x.is_floating_point() and x.requires_grad]


@pytest.mark.parametrize("path", ["public function", "registered op"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name, path):
    for case, sample in arguments_of(name, dtype=torch.float64, grad=True).items():
        leaves = [a for a in sample if isinstance(a, Tensor) and a.requires_grad]
        if not leaves or case in ("empty", "no tokens"):
            continue
        leaves = [a.detach().requires_grad_() for a in leaves]

        def call(*values, sample=sample):
            remaining = iter(values)
            arguments = [
                next(remaining) if isinstance(a, Tensor) and a.requires_grad else a for a in sample
            ]
            if path == "public function":
                return tuple(numbers_of(flat(call_public(name, arguments))))
            return tuple(numbers_of(flat(getattr(REGISTERED, name)(*arguments))))

        assert torch.autograd.gradcheck(call, leaves, fast_mode=True, atol=1e-6), case


def test_second_derivatives_are_refused():
    arguments = arguments_of("attention_prefill", grad=True)["usual"]
    out, _ = REGISTERED.attention_prefill(*arguments)
    (first,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_prefill_backward has no backward"):
        first.sum().backward()


def test_gradient_without_lse_is_refused():
    arguments = arguments_of("attention_prefill", grad=True)["usual"]
    out, _ = REGISTERED.attention_prefill(*arguments[:-1], False)
    with pytest.raises(RuntimeError, match="needs return_lse=True to be differentiated"):
        out.sum().backward()


@needs_compiler
@pytest.mark.parametrize("name", emulated.ops_with_kernels())
def test_compiled_ops_take_fake_tensors(name):
    """Outside the compiler too, where the wrappers call them directly."""
    emulated.ops()
    compiled = getattr(getattr(torch.ops, emulated.NAME), name)
    forward = name.removesuffix("_backward")
    given = arguments_of(forward, dtype=torch.bfloat16)
    if forward != name:
        if forward == "attention_prefill":
            given = {n: a for n, a in given.items() if a[-1]}  # with an lse
        given = {n: backward_sample(forward, a) for n, a in given.items()}
    with FakeTensorMode() as mode:
        for arguments in given.values():
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            assert all(isinstance(r, FakeTensor) for r in flat(compiled(*fakes)))
