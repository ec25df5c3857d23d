import pytest
import torch
from support import float64
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

from gemma4_kernels import reference

CASES = {  # shape of gate_up
    "no rows": (0, 64),
    "no width": (3, 0),
    "one value": (1, 2),
    "one dimension": (48,),
    "odd half": (5, 2 * 37),
    "batch": (2, 3, 96),
    "E2B width": (2, 2 * 6144),
    "long": (129, 2 * 24),
}


def check(backend, gate_up, dtype):
    y = backend.ops.geglu(gate_up)
    gate, up = gate_up.double().cpu().chunk(2, -1)
    # 1 + tanh cancels where the gate is far below 0, hence an error of the size of the factors.
    assert_close_to_float64(
        y, float64.geglu(gate_up), dtype, roundings=2, magnitude=(gate * up).abs()
    )
    assert y.is_contiguous()


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_geglu(backend, poisoned_memory, case, dtype):
    check(backend, backend.randn(*CASES[case], dtype=dtype, std=2.0), dtype)


@pytest.mark.parametrize("view", ["columns", "every other row", "transposed"])
def test_strided(backend, view):
    packed = backend.randn(12, 3 * 64)
    views = {"columns": packed[:, 64:128], "every other row": packed[::2], "transposed": packed.T}
    check(backend, views[view], torch.float32)


@all_dtypes
def test_far_gates(backend, dtype):
    """gelu(-100) is 0 and gelu(100) is 100; nothing overflows on the way (100³ does in fp16)."""
    gate = torch.tensor([-100.0, -20.0, -0.0, 20.0, 100.0])
    check(backend, backend.to(torch.cat([gate, torch.full((5,), 3.0)]).to(dtype)), dtype)


def test_gelu_is_the_tanh_form(backend):
    y = backend.ops.geglu(backend.to(torch.tensor([2.0, 1.0])))
    assert y.item() == pytest.approx(1.954598, abs=1e-6)  # erf 1.954500, SiLU 1.761594


def test_gate_comes_first(backend):
    assert backend.ops.geglu(backend.to(torch.tensor([0.0, 5.0]))).item() == 0


def test_fp16_saturates(backend):
    """Where the exact product is past fp16's largest value, that value comes; NaN stays."""
    gate = torch.tensor([300.0, 300.0, 250.0, float("nan"), 300.0], dtype=torch.float16)
    up = torch.tensor([300.0, -300.0, 250.0, 1.0, float("nan")], dtype=torch.float16)
    y = backend.ops.geglu(backend.to(torch.cat([gate, up]))).cpu()
    assert y[:3].tolist() == [65504.0, -65504.0, 62496.0] and y[3:].isnan().all()


def gradient(geglu, gate_up, grad):
    gate_up = gate_up.detach().requires_grad_()
    return torch.autograd.grad(geglu(gate_up), gate_up, grad)[0]


def check_gradient(backend, gate_up, dtype):
    """Nearer to float64 than the twin's is, which rounds the gradient of the gate twice."""
    grad = backend.randn(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=dtype)
    actual = gradient(backend.ops.geglu, gate_up, grad)
    expected = gradient(float64.geglu, gate_up.double().cpu(), grad.double().cpu())
    gate, up = gate_up.double().cpu().abs().chunk(2, -1)
    grads = torch.cat([grad, grad], -1).double().cpu().abs()
    # 1 + tanh cancels far below 0, and the slope has the exponent's error times its own slope.
    size = torch.cat([(1 + gate) ** 2 * up, gate], -1) * grads
    roundings = 3 if backend.name == "eager" else 1
    assert_close_to_float64(
        actual, expected, dtype, roundings=roundings, terms=4, magnitude=roundings * size
    )
    return actual


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_gradient(backend, poisoned_memory, case, dtype):
    check_gradient(backend, backend.randn(*CASES[case], dtype=dtype, std=2.0), dtype)


@pytest.mark.parametrize("view", ["columns", "transposed"])
def test_gradient_of_strided(backend, view):
    packed = backend.randn(12, 48)
    views = {"columns": packed[:, 16:32], "transposed": packed.T}
    assert check_gradient(backend, views[view], torch.float32).is_contiguous()
    x, wide = backend.randn(6, 32), backend.randn(6, 48)
    grad = gradient(backend.ops.geglu, x, wide[:, 16:32])
    assert torch.equal(grad, gradient(backend.ops.geglu, x, wide[:, 16:32].contiguous()))


def test_what_is_held_back_passes_nothing(backend):
    """Where fp16 saturates there is no slope; beside it there is."""
    gate = torch.tensor([300.0, -300.0, 300.0, 250.0], dtype=torch.float16)
    up = torch.tensor([300.0, 300.0, -300.0, 250.0], dtype=torch.float16)
    ones = backend.to(torch.ones(4, dtype=torch.float16))
    grad = gradient(backend.ops.geglu, backend.to(torch.cat([gate, up])), ones)
    assert grad.tolist() == [0, 0, 0, 250, 0, 0, 0, 250]


def test_the_backward_twin(device_backend):
    """What stands for the kernel where none is, beside what autograd makes of the forward."""
    gate_up = device_backend.randn(5, 74, std=3.0)
    grad = device_backend.randn(5, 37)
    actual = reference.geglu_backward(grad, gate_up)
    expected = gradient(float64.geglu, gate_up.double().cpu(), grad.double().cpu())
    size = 4 * (1 + gate_up.abs().amax()) ** 2
    assert_close_to_float64(actual, expected, torch.float32, magnitude=float(size))


BAD = {
    "integers": (lambda x: x.int(), TypeError, "gate_up must be a floating.*got torch.int32"),
    "odd width": (lambda x: x[:, :7], ValueError, r"gate_up .* even width.*got \[3, 7\]"),
    "scalar": (lambda x: x[0, 0], ValueError, r"gate_up .* even width.*got \[\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    change, error, sentence = BAD[case]
    assert_refused(backend.ops.geglu, {"gate_up": change(backend.randn(3, 8))}, error, sentence)
