"""Linears that read the same, multiplied as one; and trained as one, as far as that goes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autocast import product_dtype
from .fusion import is_plain
from .packed import PackedWeight, Weight, cat
from .packed_linear import LINEAR, PackedLinear, PackedParameter, has_kernels

# On a CPU one product in place of two or three saves calls and no bytes: measured, it is worth a
# copy of weights up to about this size. A GPU is saved launches, whatever the size.
CPU_JOIN_BYTES = 4 << 20


def joined(*linears: nn.Linear) -> tuple[Weight, Tensor | None] | None:
    """Weight and bias of the linears as one matrix, if one product may take their place now.

    That is a matter of inference: they are plain, no gradient is wanted, no autocast (which keeps
    a cast of each weight) and no compiler (which cannot see addresses) is at work. The first call
    lays the weights side by side in one piece of memory, one group at a time, and so does every
    call after something has moved them; the parameters stay who they are and become views. Packed
    weights of one form are joined like dense ones.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not all(is_plain(linear, LINEAR) for linear in linears)
    ):
        return None
    weights = [linear.weight for linear in linears]
    if torch.is_autocast_enabled(weights[0].device.type):
        return None
    weight = _weight_as_one(linears)
    if weight is None or linears[0].bias is None:
        return None if weight is None else (weight, None)
    bias = _as_one([linear.bias for linear in linears])
    return None if bias is None else (weight, bias)


def _weight_as_one(linears: Sequence[nn.Linear]) -> Weight | None:
    held = [linear.weight for linear in linears if isinstance(linear, PackedLinear)]
    if not held:
        return _as_one([linear.weight for linear in linears])
    # Where there are no kernels, a module knows better than an op how to multiply its weight.
    if len(held) < len(linears) or not has_kernels(held[0].device):
        return None
    if not all(is_plain(weight, PackedParameter) for weight in held):
        return None
    weights = [weight() for weight in held]
    made: list[Tensor | None] = []
    for parts in zip(*(weight.parts for weight in weights), strict=True):
        there = [part for part in parts if part is not None]
        one = _as_one(there) if len(there) == len(parts) else None
        if there and one is None:
            return None
        made.append(one)
    codes, scales, row_scales = made
    assert codes is not None  # every weight has them
    return PackedWeight(codes, scales, row_scales)


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensors joined along dimension 0: a view of their memory, laid out anew if need be."""
    first, rows = parts[0], 0
    size, end = first.element_size(), first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.dtype != first.dtype or not part.is_contiguous():
            return _lay_side_by_side(parts)
        rows += part.shape[0]
        end += part.numel() * size
    whole = (rows, *first.shape[1:])
    # Neighbours by chance lie in two storages; then the first one's ends before the last row.
    begin = first.untyped_storage().data_ptr()
    if end - begin > first.untyped_storage().nbytes():
        return _lay_side_by_side(parts)
    return first.as_strided(whole, first.stride())


def _lay_side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    first, total = parts[0], sum(part.nbytes for part in parts)
    if first.is_meta or (first.is_cpu and total > CPU_JOIN_BYTES):
        return None
    begin = 0
    for part in parts:
        # Memory that somebody else looks at (an optimizer's flat buffer, another process, a tied
        # module) must stay where it is: what is moved has a storage to itself. Pickle gives each
        # part a copy of what was one storage.
        held, offset = part.untyped_storage().nbytes(), part.storage_offset() * part.element_size()
        alone = held == part.nbytes or (held == total and offset == begin)
        if not alone or (part.is_cpu and part.is_shared()):
            return None
        if part.dtype != first.dtype or part.device != first.device:
            return None
        begin += part.nbytes
    if len({part.untyped_storage().data_ptr() for part in parts}) < len(parts):
        return None
    with torch.inference_mode(False):  # else the parameters could never be trained again
        whole = cat([part.detach() for part in parts])
    for part, view in zip(parts, whole.split([p.shape[0] for p in parts]), strict=True):
        part.data = view
    return whole


def products(x: Tensor, *linears: nn.Linear) -> Sequence[Tensor] | None:
    """What each of the linears makes of x, where a gradient is wanted and they can give x's as one.

    The second product is added to the first as it is made: autograd would write each and sum them,
    nine passes over x for q, k and v where these are five. None where the linears must be called:
    there is one alone, something hooks or replaces them, their weights are packed, a compiler plans
    its own sums, or autocast is on, under which plain sums are in fp32.
    """
    if (
        not (torch.is_grad_enabled() and x.requires_grad)
        or torch.compiler.is_compiling()
        or product_dtype(x) is not None
        or len(linears) < 2
        or not all(is_plain(linear, nn.Linear, x.device) for linear in linears)
    ):
        return None
    made: Sequence[Tensor] = _Products.apply(
        x, *(parameter for linear in linears for parameter in (linear.weight, linear.bias))
    )
    return made


class _Products(torch.autograd.Function):
    """x Wᵀ + b of each W and b, which are given in turns."""

    @staticmethod
    def forward(x: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        return tuple(F.linear(x, weight, bias) for weight, bias in pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        x, *parameters = inputs
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        # Frozen weights need no x, which nothing else may hold.
        kept = x if any(ctx.needs_input_grad[1::2]) else None
        ctx.save_for_backward(kept, *parameters[::2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        wants_x, *wanted = ctx.needs_input_grad
        dx, found = None, list[Tensor | None]()
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            if grad is None:
                found += [None, None]
                continue
            rows = grad.flatten(0, -2)
            if wants_x:
                dx = rows @ weight if dx is None else dx.addmm_(rows, weight)
            wants_weight, wants_bias = wanted[2 * i : 2 * i + 2]
            found.append(rows.T @ x.flatten(0, -2) if wants_weight else None)
            found.append(rows.sum(0) if wants_bias else None)
        return dx if dx is None else dx.view(ctx.shape), *found
