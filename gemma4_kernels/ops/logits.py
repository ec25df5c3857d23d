"""The cap on the logits, and the choice of the next token."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..opset import Args, Gradient, NoGradient, Op, new
from ..reference import logits as reference


def _softcap_backward(
    kept: Args, wanted: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
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


_softcap_cross_entropy_backward = Op(
    "softcap_cross_entropy_backward(Tensor logits, Tensor targets, Tensor lse, Tensor grad_nll,"
    " Tensor grad_lse, float cap, Tensor(a!) d_logits) -> ()",
    reference.softcap_cross_entropy_backward,
    check=reference.check_softcap_cross_entropy_backward,
    outputs=lambda: None,
)


def softcap_cross_entropy_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad_nll: Tensor,
    grad_lse: Tensor,
    cap: float,
    d_logits: Tensor,
) -> None:
    """Writes the gradient of the logits into d_logits [T, V] of their dtype, contiguous, which may
    be the logits themselves: of a caller to whom alone they belong, and who needs them no more."""
    _softcap_cross_entropy_backward(logits, targets, lse, grad_nll, grad_lse, cap, d_logits)


@once_differentiable
def _new_logits_gradient(kept: Args, grad_nll: Tensor | None, grad_lse: Tensor | None) -> Tensor:
    logits, targets, lse, cap = kept
    grads = (torch.zeros_like(lse) if grad is None else grad for grad in (grad_nll, grad_lse))
    d_logits = new(logits, *logits.shape)
    _softcap_cross_entropy_backward.registered(logits, targets, lse, *grads, cap, d_logits)
    return d_logits


_softcap_cross_entropy = Op(
    "softcap_cross_entropy(Tensor logits, Tensor targets, float cap) -> (Tensor, Tensor)",
    reference.softcap_cross_entropy,
    check=reference.check_softcap_cross_entropy,
    outputs=lambda logits: _two_numbers_a_row(logits),
    gradient=Gradient(
        lambda inputs, output: (*inputs[:2], output[1], inputs[2]),
        lambda kept, wanted, *grads: (_new_logits_gradient(kept, *grads), None, None),
    ),
)


def _two_numbers_a_row(logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return new(logits, logits.shape[0], dtype=dtype), new(logits, logits.shape[0], dtype=dtype)


def softcap_cross_entropy(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """lse - x[target] and lse = log Σ exp x of each row, of x = softcap(logits, cap), or of the
    logits where cap is 0.

    logits [T, V]; targets [T] integers, tokens or -100: such a row is not read and has 0 and 0.
    Returns two [T] in fp32 (fp64 for fp64): the cross-entropy and the log-sum-exp, whose sums and
    functions are in it, without a copy of all logits. The gradient is a new tensor of the logits'
    dtype. The eager twin reads the targets and raises ValueError for one that is neither; a kernel
    makes the cross-entropy and the gradient of such a row NaN.
    """
    return _softcap_cross_entropy(logits, targets, cap)


MOST_TOP_K = 256  # of a kernel


def _sample_unserved(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> str | None:
    if temperature == 0 or top_k == 1:
        return None
    if top_k == 0 and (top_p < 1 or min_p > 0):
        return "it is for a top_p and min_p of a top_k"
    if logits.ndim == 2 and min(top_k, logits.shape[1]) > MOST_TOP_K:
        return f"it is for a top_k of at most {MOST_TOP_K}, got {top_k}"
    return None


_sample = Op(
    "sample(Tensor logits, Tensor seeds, Tensor positions, Tensor(a!) ids, Tensor(b!) done,"
    " Tensor(c!) counters, Tensor eos, float cap, float temperature, int top_k, float top_p,"
    " float min_p, int pad) -> ()",
    reference.sample,
    check=reference.check_sample,
    outputs=lambda: None,
    unserved=_sample_unserved,
)


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    ids: Tensor,
    done: Tensor,
    counters: Tensor,
    eos: Tensor,
    *,
    cap: float = 0.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    pad: int = 0,
) -> None:
    """The next token of each row, drawn or the best, and whether the row ends with it.

    x = softcap(logits, cap), or the logits where cap is 0. With temperature 0 the token is the
    argmax of x. Else of the top_k largest x (0: of all) it is one drawn from softmax(x /
    temperature), restricted to the best whose better ones' mass is below top_p, and of them to
    those at least min_p times as probable as the best: the argmax of x / temperature plus Gumbel
    noise, which Philox makes of the row's seed, its position and the token. A row's draws depend on
    nothing else, and are the same on every device. Of equals the lowest index is taken.

    logits [B, V]; seeds [B] int64; positions [B] integers, another in each step; ids [B] int64,
    written: the token, or pad where the row has ended; done [B] int64, written: 1 where the
    token is one of eos [E] int64, and not 0 where the row had ended; counters [C] int32, zeros, and
    left so: one at least for each 2,048 logits of a row that were begun. Returns nothing.
    """
    _sample(
        *(logits, seeds, positions, ids, done, counters, eos),
        *(cap, temperature, top_k, top_p, min_p, pad),
    )


def sample_counters(logits: Tensor) -> Tensor:
    """The counters of `sample` for logits of this shape and device."""
    batch, vocab_size = logits.shape
    size = batch * -(-vocab_size // reference.SAMPLE_KEYS)
    return torch.zeros(size, dtype=torch.int32, device=logits.device)
