import math

import pytest
import torch
from support import cases, float64
from support.backends import BF16, FP16, FP32, in_dtypes
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # ids, V, L, P
    "no tokens": ([], 5, 3, 8),
    "one token": ([4], 5, 1, 8),
    "odd width": ([0, 4, 2], 5, 3, 7),
    "one channel": ([0, 4, 2], 5, 3, 1),
    "repeated ids": ([3, 3, 0, 3, 0], 7, 4, 64),
    "E2B": ([6, 0, 1], 7, 35, 256),
    "ids of no row": ([-1, 5, 2, -100, 10**6], 5, 2, 32),
}


def inputs(backend, case, dtype):
    ids, vocabulary, layers, width = CASES[case]
    arguments = cases.ple_embed(backend, len(ids), vocabulary, layers, width, dtype=dtype)
    return arguments | {"ids": backend.to(torch.tensor(ids, dtype=torch.int64))}


def check(backend, arguments, dtype, eps=1e-6):
    y = backend.ops.ple_embed(**arguments, eps=eps)
    expected = float64.ple_embed(**arguments, eps=eps)
    table = arguments["table"].dtype
    wide = torch.promote_types(dtype, table)
    rounded = float64.ple_embed(**arguments, eps=eps, dtype=dtype, table_dtype=table, wide=wide)
    terms = arguments["weight"].shape[0]
    # Sums cancel, so the size that counts is that of a row's terms, not of its few values.
    size = expected.abs().max() if expected.numel() else None
    inner = torch.promote_types(dtype, FP32)
    assert_close_to_float64(
        y, expected, wide, rounded=rounded, terms=terms, magnitude=size, inner=inner
    )
    assert y.is_contiguous()


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_ple_embed(backend, poisoned_memory, case, dtype):
    check(backend, inputs(backend, case, dtype), dtype)


MIXES = {
    "autocast to bf16": {"projected": BF16},
    "autocast to fp16": {"projected": FP16},
    "fp32 weight": {"projected": BF16, "table": BF16},
    "16-bit weight": {"projected": FP16, "weight": FP16},
    "16-bit table": {"table": BF16},
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", [name for name in CASES if name != "one token"])
def test_mixed_dtypes(backend, poisoned_memory, case, mix):
    arguments = in_dtypes(inputs(backend, case, torch.float32), **MIXES[mix])
    check(backend, arguments, arguments["projected"].dtype)


def test_ids_of_no_row_read_nothing(backend):
    """Not even row 0 or the last one, where a clamped id would land."""
    arguments = inputs(backend, "ids of no row", torch.float32)
    arguments["table"][[0, 1, 3, 4]] = float("nan")
    check(backend, arguments, torch.float32)
    y = backend.ops.ple_embed(**arguments)[0]
    alone = float64.rms_norm(arguments["projected"][0].view(2, 32), arguments["weight"], 1e-6)
    assert_close_to_float64(y, alone / math.sqrt(2), torch.float32, terms=32)


def test_rows_of_other_ids_are_not_read(backend):
    arguments = inputs(backend, "repeated ids", torch.float32)
    arguments["table"][[1, 2, 4, 5, 6]] = float("nan")
    check(backend, arguments, torch.float32)


def test_int32_ids_and_strided_rows(backend):
    arguments = inputs(backend, "repeated ids", torch.float32)
    arguments["ids"] = arguments["ids"].int()
    arguments["projected"] = backend.randn(5, 3 * 256)[:, 256:512]
    arguments["table"] = backend.randn(7, 3 * 256)[:, 256:512]
    check(backend, arguments, torch.float32)
    arguments["table"] = backend.randn(7, 256)
    check(backend, arguments, torch.float32)


def test_transposed_projection(backend):
    arguments = inputs(backend, "repeated ids", torch.float32)
    arguments["projected"] = backend.randn(256, 5).T
    check(backend, arguments, torch.float32)


def test_table_may_stay_in_host_memory(backend):
    arguments = inputs(backend, "E2B", torch.float32)
    table = arguments["table"].cpu()
    arguments["table"] = table.pin_memory() if backend.device == "cuda" else table
    check(backend, arguments, torch.float32)


def test_eps(backend):
    arguments = inputs(backend, "repeated ids", torch.float32)
    arguments["projected"] *= 1e-3
    check(backend, arguments, torch.float32)
    check(backend, arguments, torch.float32, eps=0.25)


def test_scale_factors(backend):
    """Token part times √256 = 16, norm of the projection as it is, their sum times 2^-½."""
    ones, zeros = backend.to(torch.ones(1, 256)), backend.to(torch.zeros(1, 256))
    weight = backend.to(torch.full((256,), 3.0))
    ids = backend.to(torch.tensor([0]))
    token = backend.ops.ple_embed(ids, ones, zeros, weight)
    context = backend.ops.ple_embed(ids, zeros, 5 * ones, weight)
    assert token.flatten()[0].item() == pytest.approx(16 * 0.5**0.5, rel=1e-6)
    assert context.flatten()[0].item() == pytest.approx(3 * 0.5**0.5, rel=1e-6)


def test_gradient_skips_ids_of_no_row(backend):
    arguments = inputs(backend, "ids of no row", torch.float32)
    table = arguments["table"].requires_grad_()
    (grad,) = torch.autograd.grad(backend.ops.ple_embed(**arguments).sum(), table)
    assert (grad[[0, 1, 3, 4]] == 0).all()
    assert grad[2].tolist() == pytest.approx([math.sqrt(32 / 2)] * 64)


BAD = {
    "float ids": (
        {"ids": lambda i: i.float()},
        TypeError,
        "ids must hold integers, got torch.float32",
    ),
    "batched ids": ({"ids": lambda i: i[None]}, ValueError, r"ids must be \[T\], got \[1, 5\]"),
    "ids device": (
        {"ids": lambda i: i.to("meta")},
        ValueError,
        "ids must be on the device of projected, c.*, got meta",
    ),
    "integer projected": (
        {"projected": lambda p: p.int()},
        TypeError,
        "projected must be a floating.*got torch.int32",
    ),
    "projected rows": (
        {"projected": lambda p: p[:4]},
        ValueError,
        r"projected must have shape \[5, 256\], got \[4, 256\]",
    ),
    "projected width": (
        {"projected": lambda p: p[:, :64]},
        ValueError,
        r"projected must have shape \[5, 256\], got \[5, 64\]",
    ),
    "integer table": (
        {"table": lambda t: t.int()},
        TypeError,
        "table must be a floating-point tensor, got torch.int32",
    ),
    "table width": (
        {"table": lambda t: t[:, :250]},
        ValueError,
        r"table must be \[V, L \* P\] and weight \[P\], got \[7, 250\] and \[64\]",
    ),
    "flat table": (
        {"table": lambda t: t[0]},
        ValueError,
        r"table must be .* got \[256\] and \[64\]",
    ),
    "integer weight": (
        {"weight": lambda t: t.int()},
        TypeError,
        "weight must be a floating-point tensor, got torch.int32",
    ),
    "weight device": (
        {"weight": lambda w: w.to("meta")},
        ValueError,
        "weight must be on the device of projected, c.*, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = inputs(backend, "repeated ids", torch.float32)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.ple_embed, arguments, error, sentence)
