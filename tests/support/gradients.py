"""Gradients of an op, beside those of its formula in float64 and of plain autograd."""

from typing import Any

import torch
from torch import Tensor

from gemma4_kernels import opset

from . import float64
from .backends import FP32, Backend
from .cases import Arguments, complete

# In fp32 the order of a sum is all the error there is.
FACTORS = {torch.bfloat16: 1.05, torch.float16: 1.05}


def outputs(result: Any) -> list[Tensor]:
    """Those there are; what an op leaves out is None, or empty beside others."""
    made = result if isinstance(result, tuple) else (result,)
    return [x for x in made if x is not None and (x.numel() or len(made) == 1)]


def drawn(b: Backend, op: str, arguments: Arguments) -> list[Tensor]:
    """Gradients of all results."""
    made = outputs(opset.OPS[op].twin(*complete(op, arguments).values()))
    return [b.randn(*y.shape, dtype=y.dtype) for y in made]


def gradients(
    function: Any, arguments: Arguments, wanted: tuple[str, ...], grads: list[Tensor | None]
) -> list[Tensor]:
    """By plain autograd; results whose gradient is None are not used."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in wanted}
    made = outputs(function(**arguments | leaves))
    pairs = zip(made, grads, strict=True)
    used = [(y, g) for y, g in pairs if g is not None and y.requires_grad]
    given = [g.to(y.device, y.dtype) for y, g in used]
    return list(torch.autograd.grad([y for y, _ in used], list(leaves.values()), given))


def assert_gradients(
    b: Backend,
    op: str,
    arguments: Arguments,
    wanted: tuple[str, ...],
    grads: list[Tensor | None] | None = None,
) -> None:
    """No further from the exact gradients than what autograd makes of the twin, by 5 % and half a
    unit of a row's largest; on average by 5 %, and in fp32, where it is not exact, by half."""
    given = complete(op, arguments)
    grads = drawn(b, op, given) if grads is None else grads
    found = gradients(lambda **a: opset.OPS[op].registered(*a.values()), given, wanted, grads)
    plain = gradients(lambda **a: opset.OPS[op].twin(*a.values()), given, wanted, grads)
    formula = getattr(float64, op)
    exact = gradients(formula, {n: _double(x) for n, x in given.items()}, wanted, grads)
    for name, a, p, e in zip(wanted, found, plain, exact, strict=True):
        assert (a.dtype, a.shape) == (given[name].dtype, given[name].shape)
        if a.numel():
            _assert_no_further(name, *(x.double().cpu() for x in (a, p, e)), a.dtype)


def _assert_no_further(name: str, a: Tensor, p: Tensor, e: Tensor, dtype: torch.dtype) -> None:
    error, plains = (a - e).abs(), (p - e).abs()
    info = torch.finfo(dtype)
    size = e.abs().amax(-1, keepdim=True)
    fine = torch.finfo(torch.promote_types(dtype, FP32)).eps * e.shape[-1] ** 0.5
    bound = 1.05 * plains.amax(-1, keepdim=True) + (info.eps / 2 + fine) * size
    bound = bound + info.smallest_normal * info.eps
    worst = (error / bound).max()
    assert worst <= 1, f"the gradient of {name} is off by {worst:.3g} times the bound"
    # Of n errors the mean is known to within n^-½.
    mean = (
        FACTORS.get(dtype, 1.5) + 2 * e.numel() ** -0.5
    ) * plains.mean() + fine / 8 * size.mean()
    assert error.mean() <= mean, f"the gradient of {name} is off by {error.mean() / mean:.3g} times"


def _double(x: Any) -> Any:
    is_float = isinstance(x, Tensor) and x.is_floating_point()
    return x.double().cpu() if is_float else x
