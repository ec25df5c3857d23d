import pytest
import torch
from support import float64
from support.expect import assert_refused
from support.marks import all_dtypes

CASES = {  # shape, size of the logits
    "no rows": ((0, 97), 20.0),
    "one value": ((1, 1), 20.0),
    "one dimension": ((97,), 20.0),
    "batch": ((2, 3, 97), 20.0),
    "ragged": ((5, 1031), 8.0),
    "saturated": ((5, 1031), 300.0),
    "all below zero": ((5, 4), -1.0),
}


def rows(logits):
    return logits.flatten(0, -2) if logits.ndim > 1 else logits[None]


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_softcap_argmax(backend, poisoned_memory, case, dtype):
    shape, size = CASES[case]
    logits = backend.randn(*shape, dtype=dtype, std=abs(size))
    logits = -logits.abs() if size < 0 else logits
    index = backend.ops.softcap_argmax(logits, 30.0)
    assert index.dtype == torch.int64 and index.shape == shape[:-1]
    for row, chosen in zip(rows(logits), index.flatten().tolist(), strict=True):
        capped = float64.softcap(row, 30.0)
        # Capped logits that round to one value are equals; three roundings lie in between.
        near = 2 * 3 * torch.finfo(dtype).eps * capped.max().abs()
        assert capped[chosen] >= capped.max() - near


@all_dtypes
def test_equals_go_to_the_lower_index(backend, dtype):
    logits = backend.to(torch.linspace(-20, 20, 41, dtype=dtype).repeat(3))
    assert backend.ops.softcap_argmax(logits, 30.0).item() == 40
    assert backend.ops.softcap_argmax(logits.new_zeros(2, 97), 30.0).tolist() == [0, 0]
    infinite = logits.new_tensor([1.0, float("inf"), 2.0, float("inf")])
    assert backend.ops.softcap_argmax(infinite, 30.0).item() == 1


def test_not_a_number_wins_and_the_first_of_them(backend):
    logits = backend.randn(3, 97, std=20.0)
    logits[1, 50] = logits[1, 70] = float("nan")
    logits[2] = float("nan")
    index = backend.ops.softcap_argmax(logits, 30.0).tolist()
    assert index == [logits[0].argmax().item(), 50, 0]


def test_strided(backend):
    logits = backend.randn(12, 3 * 64, std=20.0)
    for view in (logits[:, 64:128], logits.T):
        assert backend.ops.softcap_argmax(view, 30.0).equal(view.argmax(-1))


def test_logits_stay_as_they_are(backend):
    logits = backend.randn(3, 97, std=20.0)
    before = logits.clone()
    backend.ops.softcap_argmax(logits, 30.0)
    assert torch.equal(logits, before)


def test_has_no_gradient(backend):
    logits = backend.randn(3, 97).requires_grad_()
    assert not backend.ops.softcap_argmax(logits, 30.0).requires_grad


BAD = {
    "integers": ({"logits": lambda x: x.int()}, TypeError, "logits must be a floating.*int32"),
    "no vocabulary": (
        {"logits": lambda x: x[:, :0]},
        ValueError,
        r"logits must end in a non-empty vocabulary, got \[3, 0\]",
    ),
    "scalar": ({"logits": lambda x: x[0, 0]}, ValueError, r"logits .*vocabulary, got \[\]"),
    "cap of zero": ({"cap": lambda c: 0.0}, ValueError, "cap must be positive, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = {"logits": backend.randn(3, 8), "cap": 30.0}
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.softcap_argmax, arguments, error, sentence)
