"""When a kernel may start while the one before it still runs."""

import pytest
import torch
from support import emulated
from support.marks import needs_compiler

import gemma4_kernels
from gemma4_kernels import opset

pytestmark = needs_compiler


@pytest.fixture
def launched(monkeypatch):
    """Calls an op past the tests' own rules; returns which of its launches were dependent."""
    control = emulated.control()
    monkeypatch.setattr(control.settings, "profile", True)
    kernels = getattr(torch.ops, emulated.NAME)

    def call(name, *args):
        control.reset_counts()
        getattr(kernels, name)(*args)
        return [launch.dependent for launch in control.counts().launched]

    with opset.using(emulated.kernels()):
        opset.kernels.set_dependent_launches(False)
        yield call


LOGITS = torch.randn(2, 64)


def test_off_until_it_is_asked_for(launched):
    assert launched("softcap", LOGITS, 30.0) == [False]


def test_all_but_the_first_op(launched):
    """What the stream was given before, weights among it, is done when the first one starts."""
    with gemma4_kernels.dependent_launches():
        assert launched("softcap", LOGITS, 30.0) == [False]
        assert launched("softcap", LOGITS, 30.0) == [True]
        assert launched("rms_norm", LOGITS, torch.ones(64), 1e-6) == [True]
    assert launched("softcap", LOGITS, 30.0) == [False]


def test_forbidden_from_outside(launched):
    with gemma4_kernels.dependent_launches(False), gemma4_kernels.dependent_launches():
        for _ in range(2):
            assert launched("softcap", LOGITS, 30.0) == [False]


def test_nested(launched):
    with gemma4_kernels.dependent_launches():
        launched("softcap", LOGITS, 30.0)
        with gemma4_kernels.dependent_launches():
            assert launched("softcap", LOGITS, 30.0) == [True]
        assert launched("softcap", LOGITS, 30.0) == [True]
        with gemma4_kernels.dependent_launches(False):
            assert launched("softcap", LOGITS, 30.0) == [False]
        assert [launched("softcap", LOGITS, 30.0) for _ in range(2)] == [[False], [True]]


def test_as_before_after_an_error(launched):
    with pytest.raises(ZeroDivisionError), gemma4_kernels.dependent_launches():
        launched("softcap", LOGITS, 30.0)
        _ = 1 / 0
    assert launched("softcap", LOGITS, 30.0) == [False]
    with gemma4_kernels.dependent_launches():
        assert [launched("softcap", LOGITS, 30.0) for _ in range(2)] == [[False], [True]]


def test_a_weight_that_is_converted_is_waited_for(launched):
    """The conversion is the kernel before."""
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    weight, matrix = torch.ones(64, dtype=torch.float16), torch.randn(16, 64, dtype=torch.bfloat16)
    misaligned = torch.ones(65, dtype=torch.bfloat16)[1:]
    with gemma4_kernels.dependent_launches():
        launched("softcap", LOGITS, 30.0)
        assert launched("rms_norm", x, weight, 1e-6) == [False]
        assert launched("rms_norm", x, weight.bfloat16(), 1e-6) == [True]
        small = opset.OPS["linear_small"].names
        values = dict(x=x, weight=matrix, norm_weight=misaligned, eps=1e-6, gated=False)
        assert launched("linear_small", *map(values.get, small)) == [False]
        values["norm_weight"] = misaligned.clone()
        assert launched("linear_small", *map(values.get, small)) == [True]


def test_without_kernels_nothing_changes():
    with opset.using(opset.NoKernels()), gemma4_kernels.dependent_launches():
        assert torch.equal(gemma4_kernels.softcap(LOGITS, 30.0), 30 * torch.tanh(LOGITS / 30))
