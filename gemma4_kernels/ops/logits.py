"""The cap on the logits, and the choice of the next token."""

import torch
from torch import Tensor

from ..opset import Args, Gradient, NoGradient, Op, new
from ..reference import logits as reference


def _softcap_backward(kept: Args, grad: Tensor) -> tuple[Tensor | None, ...]:
    output, cap = kept
    return grad * (1 - (output / cap) ** 2), None


_softcap = Op(
    "softcap(Tensor logits, float cap) -> Tensor",
    reference.softcap,
    check=reference.check_softcap,
    outputs=lambda logits: new(logits, *logits.shape),
    # The output and not the input: the loss keeps one copy of the logits alive, not two.
    gradient=Gradient(lambda inputs, output: (output, inputs[1]), _softcap_backward),
)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap); logits of any shape, of a floating dtype; cap > 0."""
    return _softcap(logits, cap)


_softcap_argmax = Op(
    "softcap_argmax(Tensor logits, float cap) -> Tensor",
    reference.softcap_argmax,
    check=reference.check_softcap_argmax,
    outputs=lambda logits: new(logits, *logits.shape[:-1], dtype=torch.int64),
    gradient=NoGradient("an index has no gradient"),
)


def softcap_argmax(logits: Tensor, cap: float) -> Tensor:
    """softcap(logits, cap).argmax(-1) without the capped logits being kept.

    logits [..., V]. Returns [...] int64: the lowest index among equals; NaN wins, as in torch.
    """
    return _softcap_argmax(logits, cap)
