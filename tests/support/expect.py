"""What the op tests expect: how exact an op must be, what it refuses, what it may not wait for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_kernels.packed import PackedWeight


def assert_close_to_float64(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    *,
    rounded: Tensor | None = None,
    roundings: int = 1,
    terms: int = 1,
    magnitude: Tensor | float | None = None,
    inner: torch.dtype | None = None,
) -> None:
    """The error against the float64 value is at most twice what rounding to `dtype` makes
    unavoidable, plus what sums and functions cost in `inner` (fp32, for float64 itself).

    Unavoidable is, where the op rounds between its steps, the largest error in a row of `rounded`,
    the same formula in float64 rounded at those points; else `roundings` times the unit roundoff.
    An inner result of `terms` summed values of size `magnitude` (the largest in a row unless
    given) costs eps √terms of that size.
    """
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    actual, expected = actual.detach().double().cpu(), expected.detach()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    assert actual.isfinite().equal(finite), "not finite where float64 is"
    actual, expected = actual.where(finite, 0), expected.where(finite, 0)

    info = torch.finfo(dtype)
    unavoidable = roundings * info.eps / 2 * expected.abs()
    if rounded is not None:
        error = (rounded.detach().where(finite, 0) - expected).abs()
        unavoidable = unavoidable + (error.amax(-1, keepdim=True) if error.ndim else error)
    if magnitude is None:
        magnitude = expected.abs().amax(-1, keepdim=True) if expected.ndim else expected.abs()
    if isinstance(magnitude, Tensor):
        magnitude = magnitude.detach().double().cpu()
    inner_eps = torch.finfo(inner or torch.promote_types(dtype, torch.float32)).eps
    subnormal = info.smallest_normal * info.eps
    bound = 2 * (unavoidable + subnormal) + inner_eps * terms**0.5 * magnitude
    excess = (actual - expected).abs() / bound
    worst = excess.argmax()
    assert excess.max() <= 1, (
        f"error is {excess.max():.3g} times the bound: got {actual.flatten()[worst]}, "
        f"float64 gives {expected.flatten()[worst]}, {int((excess > 1).sum())} of "
        f"{excess.numel()} values are off"
    )


def assert_refused(
    function: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    """The op refuses these arguments, and its fake (on meta tensors) with the same words."""
    with pytest.raises(error, match=sentence) as by_op:
        function(**arguments)
    swapped = {name: _swap_device(value) for name, value in arguments.items()}
    with pytest.raises(error) as by_fake:
        function(**swapped)
    tensors = (x for x in arguments.values() if isinstance(x, Tensor | PackedWeight))
    if not any(x.device.type == "meta" for x in tensors):
        assert str(by_fake.value) == str(by_op.value)


def _swap_device(value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return PackedWeight(*map(_swap_device, value.parts))
    if not isinstance(value, Tensor):
        return value
    return torch.zeros_like(value, device="cpu") if value.is_meta else value.to("meta")


class NoHostReads(TorchDispatchMode):
    """Refuses what would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "_to_copy", "copy_"), name
        return func(*args, **(kwargs or {}))
