"""What holds for all ops alike: names, registration, compilation, gradients.

Longer than 400 lines because one table of arguments of every op serves all of these tests.
"""

import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support import emulated
from support.marks import needs_compiler
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.library import opcheck

import gemma4_kernels
from gemma4_kernels import ops, opset, reference

NAMES = sorted(
    name
    for name in gemma4_kernels.__all__
    if name != "build_info" and not name.startswith("flash_attn")
)
REGISTERED = getattr(torch.ops, opset.NAMESPACE)
PARAMETERS = {
    name: [a.name for a in getattr(REGISTERED, name).default._schema.arguments] for name in NAMES
}


def in_schemas():
    return set(opset.OPS)


def defined_in(module):
    return {
        name
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and value.__module__ == module.__name__
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


def randn(*shape, dtype=torch.float32, grad=False, std=1.0):
    return (torch.randn(shape, dtype=torch.float64) * std).to(dtype).requires_grad_(grad)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def attention(q, k, v, queries, keys, *, causal=True, window=0, right=-1, cap=0.0, lse=True):
    """Arguments of the op behind `attention_prefill`, in the order of its schema."""
    longest = [max(b - a for a, b in pairwise(c)) for c in (queries, keys)]
    rest = (0.5, causal, window, right, cap, None, lse)
    return (q, k, v, int32(*queries), int32(*keys), *longest, *rest)


def samples(name, dtype=torch.float32, grad=False):
    """Arguments of the op `name` by the name of the case: usual, optional, strided, odd, empty."""

    def r(*shape, std=1.0):
        return randn(*shape, dtype=dtype, grad=grad, std=std)

    # Views of leaves, as a packed projection gives them.
    def columns(rows, width):
        return r(rows, 3 * width)[:, width : 2 * width]

    def turned(*shape):
        return r(*shape[::-1]).permute(*range(len(shape))[::-1])

    positions, chosen = torch.tensor([3, 0, 70]), torch.tensor([[0, 1], [1, 4], [3, 1]])

    def rope(tokens=3, head_dim=8, has_k=True, has_v=True, packed=False):
        q, k, v = r(tokens, 8, head_dim).split([4, 2, 2], 1)
        if not packed:
            q, k, v = (r(*x.shape) for x in (q, k, v))
        k_weight = r(head_dim) if has_k else None
        q_weight = r(head_dim)
        inv_freq = torch.rand(head_dim // 2)
        v = v if has_k and has_v else None
        return q, k if has_k else None, v, q_weight, k_weight, positions[:tokens], inv_freq, 1e-6

    def cached(**options):
        with torch.no_grad():
            caches = [randn(2, 4, 2, 8, dtype=dtype) for _ in range(2)]
            return *(x.detach() if isinstance(x, Tensor) else x for x in rope(**options)), *caches

    def decode(
        q, k_cache, v_cache, seq_lens, *, table=None, window=0, ring=False, cap=0.0, lse=True
    ):
        caches = k_cache.detach(), v_cache.detach()
        return q.detach(), *caches, int32(*seq_lens), table, 0.5, window, ring, cap, lse

    packed, two, three = r(7, 8, 8).split([4, 2, 2], 1), (0, 3, 7), (0, 2, 2, 5)
    pages = torch.tensor([[3, 1, 0], [2, 4, 0]], dtype=torch.int32)
    cases = {
        "rms_norm": {
            "usual": (r(3, 8), r(8), 1e-6),
            "no weight": (r(3, 8), None, 1e-6),
            "odd": (r(2, 3, 7), r(7), 1e-6),
            "columns": (columns(3, 8), r(8), 1e-6),
            "transposed": (turned(4, 8), r(8), 1e-6),
            "empty": (r(0, 8), r(8), 1e-6),
        },
        "add_rms_norm": {
            "usual": (r(3, 8), r(3, 8), r(8), r(8), r(1), 1e-6),
            "neither": (r(3, 8), r(3, 8), r(8), None, None, 1e-6),
            "odd": (r(2, 3, 7), r(2, 3, 7), r(7), r(7), None, 1e-6),
            "columns": (columns(3, 8), columns(3, 8), r(8), r(8), r(1), 1e-6),
            "transposed": (turned(4, 8), turned(4, 8), r(8), r(8), r(1), 1e-6),
            "empty": (r(0, 8), r(0, 8), r(8), r(8), r(1), 1e-6),
        },
        "moe_norm": {
            "usual": (r(3, 8), r(8), r(8), 1e-6),
            "odd": (r(2, 3, 7), r(7), r(7), 1e-6),
            "columns": (columns(3, 8), r(8), r(8), 1e-6),
            "transposed": (turned(4, 8), r(8), r(8), 1e-6),
            "empty": (r(0, 8), r(8), r(8), 1e-6),
        },
        "qkv_norm_rope": {
            "usual": rope(),
            "no v": rope(has_v=False),
            "no k": rope(has_k=False),
            "odd half": rope(head_dim=6),
            "packed": rope(packed=True),
            "empty": rope(tokens=0),
        },
        "qkv_norm_rope_cache": {
            "usual": (*cached(), torch.tensor([1, -1, 5])),
            "no v": (*cached(has_v=False), torch.tensor([1, 2, 5])),
            "packed": (*cached(packed=True), torch.tensor([1, 2, 5])),
            "empty": (*cached(tokens=0), torch.tensor([], dtype=torch.int64)),
        },
        "geglu": {
            "usual": (r(3, 8),),
            "odd half": (r(2, 3, 14),),
            "columns": (columns(3, 8),),
            "transposed": (turned(3, 8),),
            "empty": (r(0, 8),),
        },
        "attention_prefill": {
            "usual": attention(r(7, 4, 8), r(7, 2, 8), r(7, 2, 8), two, two),
            "no lse": attention(
                *(x.detach() for x in (r(7, 4, 8), r(7, 2, 8), r(7, 2, 8))), two, two, lse=False
            ),
            "tail, window, cap": attention(
                r(5, 4, 8), r(7, 2, 8), r(7, 2, 8), (0, 2, 5), two, window=2, cap=3.0
            ),
            "both sides": attention(
                r(7, 4, 8), r(7, 2, 8), r(7, 2, 8), two, two, causal=False, window=3, right=1
            ),
            "packed": attention(*packed, two, two, window=2),
            "heads outermost": attention(
                *(r(h, 7, 8).transpose(0, 1) for h in (4, 2, 2)), two, two
            ),
            "empty sequences": attention(r(5, 4, 8), r(4, 2, 8), r(4, 2, 8), three, (0, 0, 2, 4)),
            "no tokens": attention(r(0, 4, 8), r(0, 2, 8), r(0, 2, 8), (0, 0), (0, 0)),
        },
        "attention_decode": {
            "usual": decode(r(2, 1, 4, 8), r(2, 9, 2, 8), r(2, 9, 2, 8), (3, 7)),
            "no lse": decode(r(2, 1, 4, 8), r(2, 9, 2, 8), r(2, 9, 2, 8), (3, 7), lse=False),
            "ring": decode(
                r(2, 2, 4, 8), r(2, 9, 2, 8), r(2, 9, 2, 8), (3, 70), window=4, ring=True, cap=3.0
            ),
            "pages": decode(
                r(2, 2, 4, 8), r(5, 4, 2, 8), r(5, 4, 2, 8), (5, 7), table=pages, window=3
            ),
            "strided": decode(
                r(2, 8, 3, 8).transpose(1, 2)[:, :, :4], *r(2, 9, 2, 2, 8).unbind(2), (3, 0)
            ),
            "no rows": decode(r(0, 1, 4, 8), r(0, 9, 2, 8), r(0, 9, 2, 8), ()),
        },
        "moe_route": {
            "usual": (r(3, 6), r(6), 2),
            "odd": (r(3, 7), r(7), 7),
            "transposed": (turned(4, 6), r(6), 2),
            "empty": (r(0, 6), r(6), 2),
        },
        "moe_experts": {
            "usual": (r(3, 8), r(4, 6, 8), r(4, 8, 3), chosen, r(3, 2)),
            "int32": (r(3, 8), r(4, 6, 8), r(4, 8, 3), chosen.int(), r(3, 2)),
            "transposed": (
                turned(3, 8),
                turned(4, 6, 8),
                turned(4, 8, 3),
                chosen.T.contiguous().T,
                turned(3, 2),
            ),
            "empty": (r(0, 8), r(4, 6, 8), r(4, 8, 3), chosen[:0], r(0, 2)),
        },
        "ple_embed": {
            "usual": (torch.tensor([1, 9, 0]), r(5, 12), r(3, 12), r(4), 1e-6),
            "odd": (torch.tensor([1, -1, 0]), r(5, 9), r(3, 9), r(3), 1e-6),
            "strided": (torch.tensor([1, 1, 0]), columns(5, 12), columns(3, 12), r(4), 1e-6),
            "transposed": (torch.tensor([1, 1, 0]), turned(5, 12), turned(3, 12), r(4), 1e-6),
            "empty": (torch.tensor([], dtype=torch.int64), r(5, 12), r(0, 12), r(4), 1e-6),
        },
        "ple_gate": {
            "usual": (r(3, 4), r(3, 5, 4), 2),
            "odd": (r(3, 7), r(3, 1, 7), 0),
            "transposed": (turned(3, 4), turned(3, 5, 4), 4),
            "empty": (r(0, 4), r(0, 5, 4), 2),
        },
        "softcap": {
            "usual": (r(3, 4, std=20.0), 30.0),
            "odd": (r(2, 3, 7, std=20.0), 30.0),
            "columns": (columns(3, 8), 0.5),
            "transposed": (turned(3, 8), 0.5),
            "empty": (r(0, 4), 30.0),
        },
        "softcap_argmax": {
            "usual": (r(3, 4).detach(), 30.0),
            "odd": (r(2, 3, 7).detach(), 30.0),
            "transposed": (turned(3, 8).detach(), 30.0),
            "empty": (r(0, 4).detach(), 30.0),
        },
    }
    return cases[name]


CASES = [pytest.param(name, case, id=f"{name}: {case}") for name in NAMES for case in samples(name)]
DIFFERENTIABLE = [
    name
    for name in NAMES
    if name not in ("qkv_norm_rope_cache", "attention_decode", "softcap_argmax")
]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_opcheck(name, case, grad):
    """Schema (what is mutated, what aliases), autograd, fake (shapes, strides), AOT dispatch."""
    arguments = samples(name, grad=grad)[case]
    if grad and not any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        grad = False
    opcheck(getattr(REGISTERED, name).default, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fake_knows_the_dtypes(name, dtype):
    for arguments in samples(name, dtype).values():
        opcheck(getattr(REGISTERED, name).default, arguments, test_utils="test_faketensor")


BACKWARD_CASES = [
    p for p in CASES if p.values[0] in ("attention_prefill", "moe_experts") and "no" not in p.id
]


@pytest.mark.parametrize(("name", "case"), BACKWARD_CASES)
def test_opcheck_of_backward_ops(name, case):
    backward = backward_sample(name, samples(name)[case])
    opcheck(getattr(REGISTERED, f"{name}_backward").default, backward)


def backward_sample(name, arguments):
    if name == "moe_experts":
        return torch.randn_like(arguments[0]), *arguments
    out, lse = getattr(REGISTERED, name)(*arguments)
    q, k, v, *options, _, _ = arguments
    return torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *options


def flat(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


@pytest.mark.parametrize("name", NAMES)
def test_public_function_is_the_op(name):
    """On the CPU the dispatcher is passed by; the results must not tell."""
    for arguments in samples(name).values():
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
    return getattr(gemma4_kernels, name)(**dict(zip(PARAMETERS[name], arguments, strict=True)))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name, training):
    if training and name not in DIFFERENTIABLE:
        training = False
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: call_public(name, a), fullgraph=True, backend="aot_eager")
    for arguments in list(samples(name, grad=training).values())[:3]:
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
        (*(torch.randn(tokens, h, 8) for h in (4, 2, 2)), int32(0, 2, tokens), tokens - 2)
        for tokens in (5, 9, 14)
    ]
    assert count_graphs(attend, calls, dynamic=True) == 1


def test_one_graph_for_all_choices_of_experts():
    def call():
        chosen = torch.rand(6, 4).argsort(-1)[:, :2]
        return randn(6, 8), randn(4, 6, 8), randn(4, 8, 3), chosen, torch.rand(6, 2)

    assert count_graphs(gemma4_kernels.moe_experts, [call() for _ in range(5)]) == 1


def numbers_of(outputs):
    """What a difference quotient can be taken of: no index, no -inf."""
    return [x.where(x.isfinite(), 0) for x in outputs if x.is_floating_point() and x.requires_grad]


@pytest.mark.parametrize("path", ["public function", "registered op"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name, path):
    for case, sample in samples(name, torch.float64, grad=True).items():
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
    arguments = samples("attention_prefill", grad=True)["usual"]
    out, _ = REGISTERED.attention_prefill(*arguments)
    (first,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_prefill_backward has no backward"):
        first.sum().backward()


def test_gradient_without_lse_is_refused():
    arguments = samples("attention_prefill", grad=True)["usual"]
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
    given = samples(forward, torch.bfloat16)
    if forward != name:
        given = {n: backward_sample(forward, a) for n, a in given.items() if a[-1]}  # with an lse
    with FakeTensorMode() as mode:
        for arguments in given.values():
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            results = compiled(*fakes)
            results = results if isinstance(results, tuple) else (results,)
            assert all(isinstance(r, FakeTensor) for r in results)
