"""Twins and checks of `ops/logits.py`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .common import (
    check_beside,
    check_floating,
    check_integral,
    check_like,
    check_same_device,
    check_shape,
    extremes,
)

__all__ = [
    "sample",
    "softcap",
    "softcap_argmax",
    "softcap_cross_entropy",
    "softcap_cross_entropy_backward",
]

IGNORED = -100  # as a target
LOSS_ELEMENTS = 1 << 22  # logits that are there in fp32 at once
SAMPLE_KEYS = 2048  # logits a counter
_WORD = 0xFFFFFFFF  # 32 bits


def check_softcap(logits: Tensor, cap: float) -> None:
    check_floating("logits", logits)
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")


def softcap(logits: Tensor, cap: float) -> Tensor:
    return (torch.tanh_(logits / cap) * cap).contiguous()


def check_softcap_argmax(logits: Tensor, cap: float) -> None:
    check_softcap(logits, cap)
    if logits.ndim < 1 or logits.shape[-1] <= 0:
        raise ValueError(f"logits must end in a non-empty vocabulary, got {list(logits.shape)}")


def softcap_argmax(logits: Tensor, cap: float) -> Tensor:
    return softcap(logits, cap).argmax(-1)


def check_softcap_cross_entropy(logits: Tensor, targets: Tensor, cap: float) -> None:
    check_floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [T, V] of a vocabulary, got {list(logits.shape)}")
    check_integral("targets", targets)
    check_same_device("targets", targets, "logits", logits)
    check_shape("targets", targets, logits.shape[:1])
    if not cap >= 0:
        raise ValueError(f"cap must be at least 0, got {cap}")


def softcap_cross_entropy(
    logits_TV: Tensor, targets_T: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    ignored_T, chosen_T = _targets(targets_T, logits_TV.shape[1])
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    nll_T, lse_T = (logits_TV.new_empty(logits_TV.shape[:1], dtype=dtype) for _ in range(2))
    for rows in _few_rows(logits_TV):
        x = _capped(logits_TV[rows].to(dtype), cap)
        lse_T[rows] = x.logsumexp(-1)
        nll_T[rows] = lse_T[rows] - x.gather(-1, chosen_T[rows, None])[:, 0]
    return nll_T.masked_fill_(ignored_T, 0.0), lse_T.masked_fill_(ignored_T, 0.0)


def check_softcap_cross_entropy_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad_nll: Tensor,
    grad_lse: Tensor,
    cap: float,
    d_logits: Tensor,
) -> None:
    check_softcap_cross_entropy(logits, targets, cap)
    for name, x in (("lse", lse), ("grad_nll", grad_nll), ("grad_lse", grad_lse)):
        check_beside(name, x, "logits", logits, targets.shape)
    check_like("d_logits", d_logits, "logits", logits)
    check_shape("d_logits", d_logits, logits.shape)
    if not d_logits.is_contiguous():
        raise ValueError("d_logits must be contiguous")


def softcap_cross_entropy_backward(
    logits_TV: Tensor,
    targets_T: Tensor,
    lse_T: Tensor,
    grad_nll_T: Tensor,
    grad_lse_T: Tensor,
    cap: float,
    d_logits_TV: Tensor,
) -> None:
    ignored_T, chosen_T = _targets(targets_T, logits_TV.shape[1])
    for rows in _few_rows(logits_TV):
        x = _capped(logits_TV[rows].to(lse_T.dtype), cap)
        grad = (x - lse_T[rows, None]).exp_() * (grad_nll_T + grad_lse_T)[rows, None]
        grad.scatter_add_(-1, chosen_T[rows, None], -grad_nll_T[rows, None])
        if cap:
            grad *= 1 - (x / cap) ** 2
        d_logits_TV[rows] = grad.masked_fill_(ignored_T[rows, None], 0.0)


def _targets(targets_T: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Which are ignored, and tokens that can be looked up, 0 in their place."""
    ignored_T = targets_T == IGNORED
    chosen_T = targets_T.long().masked_fill(ignored_T, 0)
    for target in extremes(chosen_T) if len(chosen_T) else ():
        if not 0 <= target < vocab_size:
            raise ValueError(
                f"targets must lie in 0..{vocab_size - 1}, or be {IGNORED} for none, got {target}"
            )
    return ignored_T, chosen_T


def _few_rows(x_TV: Tensor) -> Iterator[slice]:
    """All rows, so many at once that an fp32 copy of them is small."""
    tokens, vocab_size = x_TV.shape
    step = max(1, LOSS_ELEMENTS // vocab_size)
    return (slice(begin, begin + step) for begin in range(0, tokens, step))


def _capped(x: Tensor, cap: float) -> Tensor:
    return softcap(x, cap) if cap else x


def check_sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    ids: Tensor,
    done: Tensor,
    counters: Tensor,
    eos: Tensor,
    cap: float,
    top_p: float,
    min_p: float,
) -> None:
    check_floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [B, V] of a vocabulary, got {list(logits.shape)}")
    batch, vocab_size = logits.shape
    check_integral("positions", positions)
    rows = {"seeds": seeds, "positions": positions, "ids": ids, "done": done}
    for name, x in (rows | {"eos": eos}).items():
        check_same_device(name, x, "logits", logits)
        if name != "positions" and x.dtype != torch.int64:
            raise TypeError(f"{name} must hold int64, got {x.dtype}")
        check_shape(name, x, (x.numel() if name == "eos" else batch,))
        if name != "positions" and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    check_same_device("counters", counters, "logits", logits)
    if counters.dtype != torch.int32:
        raise TypeError(f"counters must hold int32, got {counters.dtype}")
    least = batch * -(-vocab_size // SAMPLE_KEYS)
    if counters.ndim != 1 or counters.numel() < least or not counters.is_contiguous():
        raise ValueError(
            f"counters must be at least {least} side by side, got {list(counters.shape)}"
        )
    if not cap >= 0:
        raise ValueError(f"cap must be at least 0, got {cap}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if not min_p <= 1:
        raise ValueError(f"min_p must be at most 1, got {min_p}")


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    ids: Tensor,
    done: Tensor,
    counters: Tensor,
    eos: Tensor,
    cap: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    pad: int,
) -> None:
    x = softcap(logits, cap) if cap else logits
    if temperature == 0:
        chosen = x.argmax(-1)
    else:
        scores, kept = cut(x, temperature, top_k, top_p, min_p)
        winner = (scores + gumbel(seeds, positions, kept, scores.shape[1])).argmax(-1, True)
        chosen = (winner if kept is None else kept.gather(-1, winner)).squeeze(-1)
    ids.copy_(torch.where(done != 0, pad, chosen))
    done.bitwise_or_((ids[:, None] == eos).any(-1))  # isin waits for the device where eos are many


def cut(
    x_BV: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor | None]:
    """What is drawn from: logits over the temperature [B, N], -inf where top_p or min_p cut a token
    off, and the tokens [B, N], best first; None: all of them, in their order."""
    vocab_size = x_BV.shape[-1]
    top_k = min(top_k or vocab_size, vocab_size)
    scores = x_BV.to(torch.promote_types(x_BV.dtype, torch.float32))
    ids = None
    if top_k < vocab_size or top_p < 1:
        ids = _best(scores, top_k)
        scores = scores.gather(-1, ids)
    scores = scores / temperature
    if top_p < 1 or min_p:
        probabilities = scores.softmax(-1)
        if top_p < 1:
            # Keep the best tokens whose predecessors' mass is below top_p; the first always stays.
            before = probabilities.cumsum(-1) - probabilities
            scores = scores.masked_fill(before >= top_p, -torch.inf)
        if min_p:
            least = min_p * probabilities.amax(-1, keepdim=True)
            scores = scores.masked_fill(probabilities < least, -torch.inf)
    return scores, ids


def _best(x_BV: Tensor, k: int) -> Tensor:
    """The tokens of the k largest [B, k], best first, of equals the lower first; where the k-th has
    equals, topk leaves open which of them it takes."""
    if k == x_BV.shape[-1]:
        return x_BV.sort(stable=True, dim=-1, descending=True).indices
    values, ids = x_BV.topk(k, -1)
    least = values[:, -1:]
    above = (~(values <= least)).sum(-1, keepdim=True)  # NaN too
    place = torch.arange(k, device=x_BV.device) - above
    # Behind those above come the first of its equals, as they are counted from the left.
    equals = torch.searchsorted((x_BV == least).cumsum(-1), place.clamp(min=0) + 1)
    ids = torch.where(place < 0, ids, equals).sort(-1).values
    order = x_BV.gather(-1, ids).sort(stable=True, dim=-1, descending=True).indices
    return ids.gather(-1, order)


def gumbel(seeds_B: Tensor, positions_B: Tensor, ids_BN: Tensor | None, vocab_size: int) -> Tensor:
    """-log(e), e exponential, of tokens [B, N], or of all: a function of seed, position and token,
    the same on every device."""
    if ids_BN is None:
        fours = torch.arange(-(-vocab_size // 4), device=seeds_B.device)
        words = philox(seeds_B[:, None], fours, positions_B[:, None]).flatten(1)[:, :vocab_size]
    else:
        words = philox(seeds_B[:, None], ids_BN >> 2, positions_B[:, None])
        words = words.gather(-1, (ids_BN & 3)[..., None]).squeeze(-1)
    # The uniform number is finest near 0, where the largest results come from.
    uniform = (words.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def philox(seed: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), all in int64,
    which wraps: four words [..., 4] for a counter of a word `low` and two of `high`."""
    high = high.to(torch.int64)
    zero = torch.zeros_like(seed + low + high)
    a, b, c, d = zero + (low & _WORD), zero + (high & _WORD), zero + ((high >> 32) & _WORD), zero
    key, other_key = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((y >> 32) & _WORD) ^ b ^ key, y & _WORD
        c, d = ((x >> 32) & _WORD) ^ d ^ other_key, x & _WORD
        key, other_key = (key + 0x9E3779B9) & _WORD, (other_key + 0xBB67AE85) & _WORD
    return torch.stack([a, b, c, d], -1)
