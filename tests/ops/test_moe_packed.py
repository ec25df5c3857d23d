"""Experts whose weights are packed, in every form, from one token to tiles of them; what opens such
a layer; and the dense branch beside its experts."""

import warnings

import pytest
import torch
from support import cases, float64
from support.backends import BF16, EAGER, FP16, FP32
from support.expect import assert_close_to_float64, assert_refused
from support.packed import E4M3, FORMS

from gemma4_kernels import opset
from gemma4_kernels.packed import PackedWeight
from gemma4_kernels.reference import moe as reference

kernels_alone = pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)
TOKENS = (1, 2, 8, 9, 17, 64, 129)
INT4 = FORMS[0]


def form(kind, row_scales=False):
    return {"codes": kind[0], "scales": kind[1], "row_scales": row_scales}


CASES = {  # T, E, K, D, F, forms of gate_up and down
    **{
        f"{tokens} tokens": (tokens, 6, 2, 128, 64, form(INT4, tokens % 2 == 0), None)
        for tokens in TOKENS
    },
    **{
        f"{str(kind[0])[6:]}, {str(kind[1])[6:]}, {tokens} tokens": (
            *(tokens, 3, 2, 192, 64),
            *(form(kind, i % 2 == 1), form(FORMS[i - 1], i % 3 == 1)),
        )
        for i, kind in enumerate(FORMS)
        for tokens in (3 + 7 * (i % 2), 70)
    },
    "26B-A4B, a part": (1, 9, 8, 704, 64, form(INT4), None),
    "as wide": (2, 2, 1, 2816, 64, form(INT4), None),
    "as wide inside": (9, 2, 1, 64, 704, form(INT4), form((torch.int8, BF16))),
    "no tokens": (0, 4, 2, 64, 64, form(INT4), None),
    "no choices": (5, 4, 0, 64, 64, form(INT4), None),
}


def poison(weight, idle):
    """Nobody reads the idle experts' numbers."""
    part = weight.scales if weight.row_scales is None else weight.row_scales
    if part.dtype == E4M3:
        part.view(torch.uint8)[idle] = 0x7F
    else:
        part[idle] = float("nan")


def experts(backend, tokens, num_experts, *sizes, dtype):
    *sizes, form, down_form = sizes
    arguments = cases.moe_experts(
        backend, tokens, num_experts, *sizes, dtype=dtype, form=form, down_form=down_form
    )
    idle = [e for e in range(num_experts) if e not in arguments["experts"]]
    poison(arguments["gate_up"], idle)
    poison(arguments["down"], idle)
    return arguments


def check(y, arguments, dtype):
    exact, rounded = (float64.moe_experts(**arguments, dtype=to) for to in (None, dtype))
    assert y.is_contiguous()
    terms = sum(arguments["down"].shape[1:])
    assert_close_to_float64(y, exact, dtype, rounded=rounded, terms=terms)


@pytest.mark.parametrize("case", CASES)
def test_moe_experts(backend, poisoned_memory, case):
    dtype = FP16 if "float16" in case and "bfloat16" not in case else BF16
    arguments = experts(backend, *CASES[case], dtype=dtype)
    check(backend.ops.moe_experts(**arguments), arguments, dtype)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("case", ["2 tokens", "64 tokens"])
def test_dtypes(backend, case, dtype):
    arguments = experts(backend, *CASES[case], dtype=dtype)
    check(backend.ops.moe_experts(**arguments), arguments, dtype)


@kernels_alone
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_no_further_from_float64_than_the_twin(backend, tokens):
    """On average; the twin rounds what it multiplies."""
    for i, kind in enumerate(FORMS[::3]):
        sizes = tokens, 3, 2, 192, 64, form(kind, i % 2 == 1), None
        arguments = experts(backend, *sizes, dtype=BF16)
        given = cases.complete("moe_experts", arguments).values()
        twin = [x if x is None else x.cpu() for x in given]
        exact = float64.moe_experts(**arguments)
        ours, theirs = (
            (y.double().cpu() - exact).abs().mean()
            for y in (backend.ops.moe_experts(**arguments), reference.moe_experts(*twin))
        )
        assert ours <= 1.05 * theirs


@kernels_alone
def test_a_tokens_bits_do_not_depend_on_the_others(backend):
    """While the weights are streamed past the tokens, and again among tiles."""
    sizes = 150, 8, 2, 192, 64, form(INT4, True), form((torch.int8, BF16))
    arguments = experts(backend, *sizes, dtype=BF16)
    by_token = "x", "experts", "weights"
    for counts in ((1, 8, 9, 30), (40, 150)):
        first = {n: a[: counts[0]] if n in by_token else a for n, a in arguments.items()}
        expected = backend.ops.moe_experts(**first)
        for count in counts[1:]:
            part = {n: a[:count] if n in by_token else a for n, a in arguments.items()}
            assert torch.equal(backend.ops.moe_experts(**part)[: counts[0]], expected)


def test_some_are_skipped(backend, poisoned_memory):
    for tokens in (5, 40):
        arguments = experts(backend, tokens, 6, 2, 64, 64, form(INT4), None, dtype=BF16)
        nobody = torch.arange(tokens)[:, None] % 3 == torch.arange(2)
        arguments["experts"][backend.to(nobody)] = 6
        arguments["weights"][backend.to(nobody)] = float("nan")
        check(backend.ops.moe_experts(**arguments), arguments, BF16)


@pytest.mark.parametrize("packed", ["gate_up", "down"])
def test_one_packed_beside_one_dense_runs_the_twin(backend, packed):
    opset.warn.cache_clear()
    arguments = experts(backend, 5, 4, 2, 64, 128, form(INT4), None, dtype=BF16)
    dense = ({"gate_up", "down"} - {packed}).pop()
    arguments[dense] = backend.to(arguments[dense].to("cpu").dense(BF16))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        y = backend.ops.moe_experts(**arguments)
    check(y, arguments, BF16)
    sentence = "moe_experts runs eager torch, without a kernel: it is for gate_up and down that"
    assert [str(w.message)[: len(sentence)] for w in seen] == [sentence] * (backend.name != "eager")


def test_gradient(backend):
    """Of x and of the routing weights; codes have none."""
    arguments = experts(backend, 7, 4, 2, 128, 64, form(INT4, True), None, dtype=FP32)
    names = "x", "weights"
    leaves = {name: arguments[name].requires_grad_() for name in names}
    y = backend.ops.moe_experts(**arguments)
    grad = backend.randn(*y.shape)
    actual = torch.autograd.grad(y, leaves.values(), grad)
    exact = {name: x.detach().double().cpu().requires_grad_() for name, x in leaves.items()}
    y = float64.moe_experts(**arguments | exact)
    expected = torch.autograd.grad(y, exact.values(), grad.double().cpu())
    for a, e in zip(actual, expected, strict=True):
        assert_close_to_float64(a, e, FP32, terms=400, magnitude=e.abs().max())


def test_autocast_leaves_packed_weights_alone(backend):
    arguments = experts(backend, 3, 4, 2, 64, 64, form(INT4), None, dtype=FP32)
    with torch.autocast(backend.device, BF16):
        y = backend.ops.moe_experts(**arguments)
    arguments["x"] = arguments["x"].to(BF16)
    assert torch.equal(y, backend.ops.moe_experts(**arguments).float())


KINDS = {"int4": FORMS[0], "nvfp4": FORMS[2], "int8": FORMS[5], "fp8 of tiles": FORMS[11]}
OPENINGS = [(1, 704, 64, 8), (9, 192, 48, 24), (16, 64, 80, 16), (17, 64, 64, 8)]


@pytest.mark.parametrize("sizes", OPENINGS, ids=lambda sizes: f"{sizes[0]} tokens")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_moe_open(backend, poisoned_memory, sizes, kind):
    arguments = cases.moe_open(backend, *sizes, dtype=BF16, form=form(kind, sizes[0] > 1))
    results = backend.ops.moe_open(**arguments)
    exact, rounded = (float64.moe_open(**arguments, eps=1e-6, dtype=to) for to in (None, BF16))
    for i, result in enumerate(results):
        most = dict(magnitude=exact[i].abs().amax()) if i < 2 else {}
        terms = dict(terms=sizes[1], rounded=rounded[i])
        assert_close_to_float64(result, exact[i], BF16, **terms, **most)


BESIDE = [(1, 9, 8, 192, 64, 704), (8, 3, 2, 64, 128, 64), (9, 128, 8, 64, 64, 128)]
BESIDE += [(16, 4, 3, 128, 64, 192), (17, 4, 2, 64, 64, 64)]


@pytest.mark.parametrize("sizes", BESIDE, ids=lambda sizes: f"{sizes[0]} tokens")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_moe_experts_small(backend, poisoned_memory, sizes, kind):
    arguments = cases.moe_experts_small(backend, *sizes, dtype=BF16, form=form(kind, sizes[0] > 1))
    results = backend.ops.moe_experts_small(**arguments)
    exact, rounded = (float64.moe_experts_small(**arguments, dtype=to) for to in (None, BF16))
    for i, result in enumerate(results):
        most = dict(magnitude=exact[i].abs().amax()) if i else {}
        terms = dict(terms=sum(sizes[3:]), rounded=rounded[i])
        assert_close_to_float64(result, exact[i], BF16, **terms, **most)


BAD = {
    "scales": (
        {"gate_up": lambda w: PackedWeight(w.codes, w.scales[..., :8])},
        ValueError,
        r"gate_up_scales must have shape \[4, 8, 2, 32\], got \[4, 8, 2, 8\]",
    ),
    "codes": (
        {"down": lambda w: PackedWeight(w.codes[..., :8], w.scales)},
        ValueError,
        r"down must be \[..., N / 16, D / 64, 512\], got \[4, 8, 1, 8\]",
    ),
    "hidden width": (
        {"gate_up": lambda w: PackedWeight(w.codes[:, :4], w.scales[:, :4])},
        ValueError,
        r"gate_up must have shape \[4, 128, 128\], got \[4, 64, 128\]",
    ),
    "one expert": (
        {"down": lambda w: w[0]},
        ValueError,
        r"down must be \[E, D, F\], got \[128, 64\]",
    ),
    "width": (
        {"down": lambda w: PackedWeight(w.codes[:, :4], w.scales[:, :4])},
        ValueError,
        r"down must be \[E, 128, F\], got \[E, 64, F\]",
    ),
    "device": (
        {"down": lambda w: w.to("meta")},
        ValueError,
        "down must be on the device of x, c.*, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = experts(backend, 3, 4, 2, 128, 64, form(INT4), None, dtype=BF16)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.moe_experts, arguments, error, sentence)


def test_scales_come_with_codes_alone():
    arguments = cases.complete("moe_experts", cases.moe_experts(EAGER, 2, 3, 2, 64, 64))
    arguments["down_row_scales"] = torch.ones(3, 64)
    with pytest.raises(ValueError, match="down_row_scales must come with a packed down alone"):
        opset.OPS["moe_experts"].registered(*arguments.values())
