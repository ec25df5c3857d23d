import pytest
import torch
from support import backward_cases, cases, float64
from support.backends import BF16, FP16
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

from gemma4_kernels.ops.logits import softcap_cross_entropy_backward

CASES = {  # T, V, cap, size of the logits
    "no rows": (0, 97, 30.0, 20.0),
    "one value": (1, 1, 30.0, 20.0),
    "ragged": (6, 1031, 30.0, 20.0),
    "several rounds": (3, 16_584, 30.0, 20.0),
    "no cap": (6, 1031, 0.0, 5.0),
    "no cap, large": (3, 4104, 0.0, 1000.0),
    "small cap": (6, 128, 0.5, 1.0),
    "saturated": (6, 128, 30.0, 1000.0),
    "all alike": (3, 128, 30.0, 0.0),
}


def inputs(backend, case, dtype):
    tokens, vocab_size, cap, size = CASES[case]
    return cases.softcap_cross_entropy(backend, tokens, vocab_size, dtype=dtype, std=size, cap=cap)


def largest(arguments):
    """What an error of fp32 is relative to: the largest x, of logits whose exp is summed."""
    logits, cap = arguments["logits"], arguments["cap"]
    return cap or float(logits.abs().max()) if logits.numel() else 1.0


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_softcap_cross_entropy(backend, poisoned_memory, case, dtype):
    arguments = inputs(backend, case, dtype)
    before = arguments["logits"].clone()
    found = backend.ops.softcap_cross_entropy(**arguments)
    wide = torch.promote_types(dtype, torch.float32)
    for a, e in zip(found, float64.softcap_cross_entropy(**arguments), strict=True):
        assert_close_to_float64(a, e, wide, terms=16, magnitude=1 + largest(arguments))
    assert torch.equal(arguments["logits"], before)


def gradients(function, arguments, grad_nll, grad_lse):
    logits = arguments["logits"].detach().requires_grad_()
    nll, lse = function(**(arguments | {"logits": logits}))
    loss = (nll * grad_nll).sum() + (lse * grad_lse).sum()
    return torch.autograd.grad(loss, logits)[0]


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_gradient(backend, poisoned_memory, case, dtype):
    arguments = inputs(backend, case, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    grads = [backend.randn(CASES[case][0], dtype=wide) for _ in range(2)]
    actual = gradients(backend.ops.softcap_cross_entropy, arguments, *grads)
    exact = arguments | {"logits": arguments["logits"].double().cpu()}
    expected = gradients(float64.softcap_cross_entropy, exact, *(g.double().cpu() for g in grads))
    # An error of x, which is of its largest value, is one of the probability's last digits.
    magnitude = 4 * (1 + largest(arguments)) * (1 + expected.abs().amax()) if len(actual) else 1.0
    assert_close_to_float64(actual, expected, dtype, magnitude=magnitude)
    assert (actual[1::4] == 0).all()


@pytest.mark.parametrize("case", ["ragged", "several rounds", "no cap"])
def test_gradient_over_the_logits(backend, case):
    arguments = backward_cases.softcap_cross_entropy_backward(backend, inputs(backend, case, BF16))
    softcap_cross_entropy_backward(**arguments)
    apart = arguments["d_logits"].clone()
    softcap_cross_entropy_backward(**(arguments | {"d_logits": arguments["logits"]}))
    assert torch.equal(arguments["logits"], apart)


@pytest.mark.parametrize("view", ["columns", "transposed"])
def test_strided(backend, view):
    packed = backend.randn(12, 40, std=5.0)
    logits = packed[:, 8:24] if view == "columns" else packed.T
    targets = torch.arange(len(logits)) % 12
    arguments = {"logits": logits, "targets": backend.to(targets), "cap": 30.0}
    expected = float64.softcap_cross_entropy(**arguments)
    for a, e in zip(backend.ops.softcap_cross_entropy(**arguments), expected, strict=True):
        assert_close_to_float64(a, e, torch.float32, terms=16, magnitude=30.0)
    ones = backend.to(torch.ones(len(logits)))
    exact = arguments | {"logits": logits.double().cpu()}
    assert_close_to_float64(
        gradients(backend.ops.softcap_cross_entropy, arguments, ones, ones),
        gradients(float64.softcap_cross_entropy, exact, ones.cpu(), ones.cpu()),
        torch.float32,
        magnitude=100.0,
    )


def test_ignored_rows_are_not_read(backend):
    arguments = inputs(backend, "ragged", torch.float32)
    arguments["logits"][1::4] = float("nan")
    nll, lse = backend.ops.softcap_cross_entropy(**arguments)
    assert nll.isfinite().all() and (nll[1::4] == 0).all() and (lse[1::4] == 0).all()
    grads = [backend.to(torch.ones(6))] * 2
    grad = gradients(backend.ops.softcap_cross_entropy, arguments, *grads)
    assert grad.isfinite().all() and (grad[1::4] == 0).all()


def test_minus_infinity_has_no_share(backend):
    """Where tokens are masked out, even all that a thread reads first."""
    logits = backend.to(torch.full((1, 4104), -torch.inf))
    logits[0, 4000:4002] = 1.0
    nll, lse = backend.ops.softcap_cross_entropy(logits, backend.to(torch.tensor([4001])), 0.0)
    assert nll.item() == pytest.approx(0.6931472) and lse.item() == pytest.approx(1.6931472)


def test_many_rows(backend):
    """Rows that differ in one logit alone give one loss each, in their order."""
    logits = backend.to(torch.zeros(40, 8))
    logits[:, 3] = torch.arange(40) / 30
    nll, _ = backend.ops.softcap_cross_entropy(logits, backend.to(torch.full((40,), 3)), 0.0)
    assert (nll.diff() < 0).all()


def test_half_precision_gradients_keep_small_probabilities(backend):
    """What fp16 holds below its normal range comes from fp32, rounded once."""
    logits = backend.to(torch.zeros(1, 4096, dtype=FP16))
    nll, _ = backend.ops.softcap_cross_entropy(
        logits.requires_grad_(), backend.to(torch.tensor([0])), 30.0
    )
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    assert (grad[0, 1:] == 1 / 4096).all() and grad[0, 0] == -1 + 1 / 4096


BAD = {
    "integers": ({"logits": lambda x: x.int()}, TypeError, "logits must be a floating.*int32"),
    "one dimension": ({"logits": lambda x: x[0]}, ValueError, r"logits must be \[T, V\].*\[8\]"),
    "no vocabulary": ({"logits": lambda x: x[:, :0]}, ValueError, r"of a vocabulary.*\[3, 0\]"),
    "floating targets": ({"targets": lambda t: t.float()}, TypeError, "targets .* integers"),
    "few targets": (
        {"targets": lambda t: t[:2]},
        ValueError,
        r"targets must have shape \[3\], got \[2\]",
    ),
    "targets' device": ({"targets": lambda t: t.to("meta")}, ValueError, "targets must be on"),
    "cap below zero": ({"cap": lambda c: -30.0}, ValueError, "cap must be at least 0, got -30"),
    "cap not a number": ({"cap": lambda c: c * float("nan")}, ValueError, "cap .* got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = cases.softcap_cross_entropy(backend, 3, 8)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.softcap_cross_entropy, arguments, error, sentence)


BAD_BACKWARD = {
    "lse of another shape": ("lse", lambda x: x[:2], ValueError, "lse must have shape"),
    "integer gradient": ("grad_nll", lambda x: x.int(), TypeError, "grad_nll must be a floating"),
    "another dtype": ("d_logits", lambda x: x.double(), TypeError, "d_logits must have the dtype"),
    "another width": ("d_logits", lambda x: x[:, :4], ValueError, "d_logits must have shape"),
    "turned": (
        "d_logits",
        lambda x: x.new_empty(x.shape[::-1]).T,
        ValueError,
        "d_logits must be contiguous",
    ),
}


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_bad_input_of_the_backward(backend, case):
    name, change, error, sentence = BAD_BACKWARD[case]
    forward = cases.softcap_cross_entropy(backend, 3, 8)
    arguments = backward_cases.softcap_cross_entropy_backward(backend, forward)
    arguments[name] = change(arguments[name])
    assert_refused(softcap_cross_entropy_backward, arguments, error, sentence)
