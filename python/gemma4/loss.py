"""The language model's loss, of a chunk of tokens at a time: no logits whole, none in fp32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gemma4_kernels import ops
from gemma4_kernels.autocast import cast, product_dtype
from gemma4_kernels.fusion import is_plain
from gemma4_kernels.ops.logits import softcap_cross_entropy_backward
from gemma4_kernels.packed_linear import LINEAR

from .layout import Layout

# Tokens whose logits are there at once: 1 GB of a vocabulary of 262,144. Of more the head's weight
# is read less often, of fewer the logits take less memory. Where the weight has a gradient, chunks
# add up in fp32, which takes as much memory as the logits of four times the tokens, and far more
# bytes moved: there so many are taken.
LOSS_TOKENS, WITH_WEIGHT = 2048, 4


def causal_lm_loss(
    head: nn.Module,
    x_TD: Tensor,
    labels_BS: Tensor,
    layout: Layout,
    cap: float,
    num_items_in_batch: int | Tensor | None,
    skip_logits: bool,
) -> tuple[Tensor, Tensor | None]:
    """The cross-entropy, in fp32, of each token's logits against the label of the next column, and
    the soft-capped logits [T, V], unless they are skipped.

    Over labels that are not -100: their mean (0 if all are), or their sum over num_items_in_batch.
    Raises ValueError for labels of another shape than the batch.
    """
    if labels_BS.shape != layout.shape:
        raise ValueError(
            f"labels must be {list(layout.shape)}, like the input, got {list(labels_BS.shape)}"
        )
    targets_T = layout.pack(F.pad(labels_BS[:, 1:], (0, 1), value=-100)).to(x_TD.device)
    count = num_items_in_batch
    if count is None:
        count = (targets_T != -100).sum().clamp(min=1)
    if not isinstance(count, Tensor):
        count = targets_T.new_full((), count)
    count = count.to(x_TD.device, torch.promote_types(x_TD.dtype, torch.float32))
    # Who hangs on the head sees the logits of all tokens; a compiler takes no autograd.Function.
    plain = is_plain(head, LINEAR, x_TD.device) and head.bias is None
    if plain and not torch.compiler.is_compiling():
        weight = head.weight if isinstance(head.weight, Tensor) else None
        if (dtype := product_dtype(x_TD)) is not None:
            (x_TD,) = cast(dtype, x_TD)
            weight = None if weight is None else cast(dtype, weight)[0]
        loss, logits = _HeadLoss.apply(x_TD, weight, head, targets_T, count, cap, skip_logits)
        return loss, logits
    raw_TV = head(x_TD) if is_plain(head, LINEAR) else layout.call(head, x_TD)
    nll_T, _ = ops.softcap_cross_entropy(raw_TV, targets_T.to(raw_TV.device), cap)
    loss = nll_T.sum() / count.to(raw_TV.device)
    return loss, None if skip_logits else capped(raw_TV, cap)


def capped(raw_TV: Tensor, cap: float) -> Tensor:
    """The head's product as the model's logits."""
    return ops.softcap(raw_TV, cap) if cap else raw_TV


class _HeadLoss(torch.autograd.Function):
    """The loss of a plain head. Its gradients are made on the way forward, while a chunk's logits
    are there, and written over these, which nobody else has; the backward scales them.

    A row's gradient of the loss is 1 / count, which fp16 may not hold times a probability: rows get
    the power of two more that brings it to 1 at least, and the backward takes it away.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor | None,
        head: nn.Module,
        targets_T: Tensor,
        count: Tensor,
        cap: float,
        skip_logits: bool,
    ) -> tuple[Tensor, Tensor | None]:
        wanted = ctx.needs_input_grad[:2]
        mantissa, exponent = torch.frexp(count)
        total, d_x, d_weight, logits = torch.zeros_like(count), [], None, None
        step = LOSS_TOKENS * (WITH_WEIGHT if wanted[1] else 1)
        for begin in range(0, max(len(x_TD), 1), step):  # of no tokens too
            rows = slice(begin, begin + step)
            given, raw = _product(head, x_TD[rows], weight_VD, wanted)
            raw_TV, target = raw.detach(), targets_T[rows]
            nll_T, lse_T = ops.softcap_cross_entropy(raw_TV, target, cap)
            total += nll_T.sum()
            if not skip_logits:
                if logits is None:
                    logits = raw_TV.new_empty(len(x_TD), raw_TV.shape[1])
                logits[rows] = capped(raw_TV, cap)
            if not any(wanted):
                continue
            grads = mantissa.reciprocal().expand_as(lse_T), torch.zeros_like(lse_T)
            softcap_cross_entropy_backward(raw_TV, target, lse_T, *grads, cap, raw_TV)
            made = iter(torch.autograd.grad(raw, given, raw_TV))
            if wanted[0]:
                d_x.append(next(made))
            if wanted[1]:
                d_weight = _sum(d_weight, next(made))
        ctx.save_for_backward(x_TD, weight_VD, exponent, torch.cat(d_x) if d_x else None, d_weight)
        ctx.head, ctx.cap = head, cap
        ctx.set_materialize_grads(False)
        return total / count, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_loss: Tensor | None, d_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_TD, weight_VD, exponent, *made = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        found: list[Tensor | None] = [None, None]
        if d_loss is not None:
            factor = torch.ldexp(d_loss, -exponent)
            for i, (grad, like) in enumerate(zip(made, (x_TD, weight_VD), strict=True)):
                if grad is not None:
                    found[i] = torch.mul(grad, factor, out=torch.empty_like(like))
        if d_logits is not None:  # of another loss, which reads the logits
            given, raw = _product(ctx.head, x_TD, weight_VD, wanted)
            with torch.enable_grad():
                logits = capped(raw, ctx.cap)
            others = iter(torch.autograd.grad(logits, given, d_logits))
            for i, want in enumerate(wanted):
                if want:
                    other, mine = next(others), found[i]
                    found[i] = other if mine is None else mine + other
        return *found, None, None, None, None, None


def _product(
    head: nn.Module, x_TD: Tensor, weight_VD: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[list[Tensor], Tensor]:
    """The tensors whose gradients are wanted, and the head's product as a function of them."""
    with torch.set_grad_enabled(any(wanted)):
        x_TD = x_TD.detach().requires_grad_(wanted[0])
        if weight_VD is None:
            return [x_TD], head(x_TD)
        weight_VD = weight_VD.detach().requires_grad_(wanted[1])
        given = [t for t, want in zip((x_TD, weight_VD), wanted, strict=True) if want]
        return given, F.linear(x_TD, weight_VD)


def _sum(so_far: Tensor | None, chunk: Tensor) -> Tensor:
    """Of more chunks than one in fp32: each of their roundings is less than that of the sum."""
    if so_far is None:
        return chunk
    wide = torch.promote_types(chunk.dtype, torch.float32)
    return so_far.to(wide).add_(chunk)
