"""Products of one input in training: gradients in float64, what is kept, and when modules are
called instead."""

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from gemma4_kernels.joined import products

WIDTH, OUTPUTS = 6, (5, 3, 4)


def linears(bias: bool = False, dtype: torch.dtype = torch.float64) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, n, bias, dtype=dtype) for n in OUTPUTS]


@pytest.mark.parametrize("bias", [False, True])
def test_gradients(bias: bool) -> None:
    """The first and the second, also where an output goes nowhere."""
    modules, x = linears(bias), torch.randn(2, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = [p for module in modules for p in module.parameters()]

    def made(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        found = products(x, *modules)
        assert found is not None
        return tuple(found)

    for y, module in zip(made(x), modules, strict=True):
        assert torch.equal(y, module(x))
    assert gradcheck(made, (x, *parameters))
    assert gradgradcheck(lambda *inputs: made(*inputs)[1:], (x, *parameters))


def test_bf16_is_rounded_no_more_often_than_by_sums() -> None:
    modules = linears(dtype=torch.bfloat16)
    x = torch.randn(300, WIDTH, dtype=torch.bfloat16)
    grads = [torch.randn(300, n, dtype=torch.bfloat16) for n in OUTPUTS]

    def gradient(dtype: torch.dtype, *, together: bool) -> Tensor:
        into = x.to(dtype).detach().clone().requires_grad_()
        each = [copy.deepcopy(module).to(dtype) for module in modules]
        made = products(into, *each) if together else [module(into) for module in each]
        assert made is not None
        torch.autograd.backward(list(made), [grad.to(dtype) for grad in grads])
        assert into.grad is not None
        return into.grad.double()

    plain, ours = (gradient(torch.bfloat16, together=t) for t in (False, True))
    exact = gradient(torch.float64, together=False)
    assert (ours - exact).norm() <= 1.05 * (plain - exact).norm()


@pytest.mark.parametrize("frozen", list(product([False, True], repeat=len(OUTPUTS))))
def test_frozen_weights_keep_and_get_nothing(frozen: tuple[bool, ...]) -> None:
    modules, x = linears(), torch.randn(7, WIDTH, dtype=torch.float64)
    for module, is_frozen in zip(modules, frozen, strict=True):
        module.requires_grad_(not is_frozen)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        leaf = x.clone().requires_grad_()
        made = products(leaf, *modules)
    assert made is not None
    assert any(t is leaf or t.data_ptr() == leaf.data_ptr() for t in kept) == (not all(frozen))
    sum(y.sum() for y in made).backward()
    assert leaf.grad is not None
    assert [module.weight.grad is None for module in modules] == list(frozen)


def test_modules_are_called() -> None:
    """Where something watches them, or nothing would be gained."""
    modules, x = linears(), torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    assert products(x, modules[0]) is None
    assert products(x.detach(), *modules) is None
    with torch.no_grad():
        assert products(x, *modules) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert products(x, *modules) is None
    handle = modules[1].register_forward_hook(lambda *_: None)
    assert products(x, *modules) is None
    handle.remove()
    assert products(x, *modules) is not None
