"""Packed weights of every form, from one token to more than a tile of them."""

import itertools

import pytest
import torch
from support import cases, float64
from support.backends import BF16, EAGER, FP16, FP32
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes
from support.packed import FORMS, dense
from test_linear_small import CLOSE, OPEN, TWO
from test_linear_small import check as check_small

from gemma4_kernels.packed import PackedWeight
from gemma4_kernels.reference import linear as reference

TOKENS = (1, 2, 3, 8, 9, 16, 17, 64, 128, 129)
WIDTHS = (704, 2112, 256, 1536)
# Every count of tokens with every width and, over them, every form; row scales with each other one.
CASES = [
    (tokens, width, form, i % 2 == 1)
    for i, ((tokens, width), form) in enumerate(
        zip(itertools.product(TOKENS, WIDTHS), itertools.cycle(FORMS))
    )
]
# Each form at few and at many tokens.
CASES += [(tokens, 192, form, i % 2 == 0) for i, form in enumerate(FORMS) for tokens in (5, 40)]
kernels_alone = pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)


def draw(backend, tokens, width, rows, form, row_scales=False, dtype=BF16):
    codes, scales = form
    kind = dict(codes=codes, scales=scales, row_scales=row_scales)
    return cases.linear_packed(backend, tokens, width, rows, **kind, dtype=dtype)


def check(y, arguments, dtype):
    x = arguments["x"]
    exact, rounded = (
        float64.linear_packed(**arguments, dtype=rounds_to) for rounds_to in (None, dtype)
    )
    inner = torch.promote_types(dtype, FP32)
    size = dict(terms=x.shape[-1], inner=inner, magnitude=exact.abs().max() if y.numel() else 0)
    assert_close_to_float64(y, exact, dtype, rounded=rounded, **size)
    assert y.is_contiguous()


def name(case):
    tokens, width, (codes, scales), _ = case
    return f"({tokens}, {width}, {codes}, {scales})"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_linear_packed(backend, poisoned_memory, case):
    tokens, width, form, row_scales = case
    # Many: few blocks of tiles, or enough for the card, the last one not full.
    rows = 48 if tokens < 17 else 80 if row_scales else 272
    dtype = FP16 if (form[1] == FP16) == (width != 704) else BF16
    arguments = draw(backend, tokens, width, rows, form, row_scales, dtype)
    check(backend.ops.linear_packed(**arguments), arguments, dtype)


@pytest.mark.parametrize("tokens", TOKENS)
@kernels_alone
def test_no_further_from_float64_than_the_twin(backend, tokens):
    """On average; the twin rounds what it multiplies."""
    rows, every = (48, 1) if tokens < 17 else (272, 7) if tokens < 128 else (144, 7)
    turned = WIDTHS[tokens % 4 :] + WIDTHS[: tokens % 4]
    for form, width in zip(FORMS[::every], itertools.cycle(turned), strict=False):
        arguments = draw(backend, tokens, width, rows, form)
        twin = {"x": arguments["x"].cpu(), "weight": arguments["weight"].to("cpu")}
        exact = float64.linear_packed(**arguments)
        ours, theirs = (
            (ops.linear_packed(**given).double().cpu() - exact).abs().mean()
            for ops, given in ((backend.ops, arguments), (EAGER.ops, twin))
        )
        assert ours <= 1.05 * theirs


@pytest.mark.parametrize("tokens", [40, 150])
@pytest.mark.parametrize("form", FORMS[::3], ids=str)
def test_tiles_on_hopper(on_card, poisoned_memory, tokens, form):
    arguments = draw(on_card("Hopper"), tokens, 320, 400, form, True)
    check(on_card("Hopper").ops.linear_packed(**arguments), arguments, BF16)


SMALL = {  # of linear_small: tokens, width, rows of y, what comes with it
    "no tokens": (0, 64, 16, OPEN),
    "9 tokens": (9, 192, 48, OPEN),
    "first layer": (3, 384, 32, {"norm_weight"}),
    "closes alone": (3, 384, 32, CLOSE),
    "two branches": (3, 320, 32, TWO),
    "gated": (5, 192, 48, OPEN | {"gated"}),
    "gated, plain": (1, 128, 16, {"gated"}),
    "factor": (4, 320, 256, CLOSE | {"factor"}),
    "more tiles than blocks": (2, 64, 208, OPEN),
    "gated, more tiles than blocks": (12, 64, 208, {"gated"}),
    "26B width": (14, 2816, 16, OPEN),
}
BY_FORM = dict(zip(SMALL, itertools.cycle(FORMS)))


@pytest.mark.parametrize("case", SMALL)
def test_linear_small(backend, poisoned_memory, case):
    """With what stands before and behind it; each case with a form of its own, and all of it."""
    tokens, width, rows, parts = SMALL[case]
    codes, scales = BY_FORM[case]
    form = dict(codes=codes, scales=scales, row_scales="gated" in parts)
    arguments = cases.linear_small(backend, tokens, width, rows, *parts, dtype=BF16, form=form)
    check_small(backend, arguments, BF16)


@all_dtypes
@pytest.mark.parametrize("tokens", [0, 2, 33])
def test_dtypes(backend, tokens, dtype):
    arguments = draw(backend, tokens, 128, 32, FORMS[0], dtype=dtype)
    check(backend.ops.linear_packed(**arguments), arguments, dtype)


def test_strided(backend):
    for tokens in (3, 20):
        arguments = draw(backend, tokens, 128, 32, FORMS[0])
        arguments["x"] = backend.randn(tokens, 3 * 128, dtype=BF16)[:, 128:256]
        check(backend.ops.linear_packed(**arguments), arguments, BF16)
        arguments["x"] = backend.randn(tokens, 129, dtype=BF16)[:, 1:]
        check(backend.ops.linear_packed(**arguments), arguments, BF16)


@kernels_alone
def test_a_tokens_bits_do_not_depend_on_the_others(backend):
    for form in FORMS:
        arguments = draw(backend, 16, 320, 64, form)
        together = backend.ops.linear_packed(**arguments)
        for first, last in ((0, 1), (5, 8), (9, 10), (4, 16)):
            alone = backend.ops.linear_packed(arguments["x"][first:last], arguments["weight"])
            assert torch.equal(alone, together[first:last])


def test_gradient(backend):
    """dx = dy W, a block of rows at a time."""
    arguments = draw(backend, 5, 128, 48, FORMS[0], dtype=FP32)
    x = arguments["x"].requires_grad_()
    y = backend.ops.linear_packed(**arguments)
    grad = backend.randn(*y.shape)
    (dx,) = torch.autograd.grad(y, x, grad)
    expected = grad.double().cpu() @ dense(arguments["weight"].to("cpu"))
    assert_close_to_float64(dx, expected, FP32, terms=48)


def test_the_twin_has_a_bounded_part_as_numbers(monkeypatch):
    whole = draw(EAGER, 3, 128, 112, FORMS[5], True)
    expected = EAGER.ops.linear_packed(**whole)
    most = []
    rows = PackedWeight.rows

    def counted(weight, begin, end):
        most.append(end - begin)
        return rows(weight, begin, end)

    monkeypatch.setattr(PackedWeight, "rows", counted)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 128 * 40)
    torch.testing.assert_close(EAGER.ops.linear_packed(**whole), expected)
    assert most == [32, 32, 32, 16]


BAD = {
    "dense": (lambda w: torch.ones(32, 64), TypeError, "weight must be a PackedWeight, got Tensor"),
    "width": (
        lambda w: PackedWeight(w.codes[:, :1], w.scales[:, :1]),
        ValueError,
        r"weight must be \[N / 16, 128 / 64, codes of a tile\], got \[2, 1, 512\]",
    ),
    "experts": (
        lambda w: PackedWeight(w.codes[None], w.scales[None]),
        ValueError,
        r"weight must be \[N / 16, 128 / 64, codes of a tile\], got \[1, 2, 2, 512\]",
    ),
    "scales": (
        lambda w: PackedWeight(w.codes, w.scales[..., :8]),
        ValueError,
        r"weight_scales must have shape \[2, 2, 32\], got \[2, 2, 8\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    change, error, sentence = BAD[case]
    arguments = draw(backend, 3, 128, 32, FORMS[0])
    arguments["weight"] = change(arguments["weight"])
    assert_refused(backend.ops.linear_packed, arguments, error, sentence)
