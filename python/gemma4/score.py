"""How well a model foretells a text, and how far it is from another one: what quantising costs."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache, KVDtype
from .model import Gemma4ForCausalLM

# Tokens whose logits are there at once.
CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Score:
    """Sums over the tokens of a text but those that open its windows."""

    tokens: int
    nats: float  # -log p
    against_nats: float = math.nan
    agreed: int = 0  # tokens before which both would choose the same one
    divergence: float = math.nan  # Σ p' log(p' / p), p' the other model's, in nats

    @property
    def bits_per_token(self) -> float:
        return self.nats / math.log(2) / self.tokens

    @property
    def against_bits_per_token(self) -> float:
        return self.against_nats / math.log(2) / self.tokens

    @property
    def divergence_bits(self) -> float:
        """A token's."""
        return self.divergence / math.log(2) / self.tokens


@torch.no_grad()
def score(
    model: Gemma4ForCausalLM,
    ids: Sequence[int],
    against: Gemma4ForCausalLM | None = None,
    context: int = 2048,
    bos: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
    kv_dtype: KVDtype | None = None,
) -> Score:
    """Scores the tokens of a text in windows of `context`, each read from its beginning alone.

    bos, if given, opens every window and is not scored; else a window's first token is not. Of the
    logits [N, V] no more than 128 tokens' are in memory. progress is told how many tokens are done.
    kv_dtype is that of the model's cache (see `Cache`); the other model's is as wide as ever.
    Raises ValueError for a text of too few tokens and for models of unlike vocabularies,
    RuntimeError where logits are not finite.
    """
    models = [model] if against is None else [model, against]
    if len({each.config.vocab_size for each in models}) > 1:
        sizes = " and ".join(str(each.config.vocab_size) for each in models)
        raise ValueError(f"models that are compared must have one vocab_size, got {sizes}")
    opening = [] if bos is None else [bos]
    step = context - len(opening)
    if step < 1 or len(ids) + len(opening) < 2:
        raise ValueError(
            f"a text must have two tokens and fit a context, got {len(ids)} of {context}"
        )
    totals, tokens = torch.zeros(4, dtype=torch.float64), 0
    for begin in range(0, len(ids), step):
        window = torch.tensor([[*opening, *ids[begin : begin + step]]])
        if window.shape[1] < 2:
            break
        kinds = zip(models, (kv_dtype, None), strict=False)
        made = (_logits(each, window, kind) for each, kind in kinds)
        for targets, *logits in zip(window[0, 1:].split(CHUNK_TOKENS), *made, strict=True):
            totals += _sums(logits, targets)
            tokens += len(targets)
            progress(tokens)
    nats, against_nats, agreed, divergence = totals.tolist()
    if against is None:
        return Score(tokens, nats)
    return Score(tokens, nats, against_nats, round(agreed), divergence)


def _logits(model: Gemma4ForCausalLM, window: Tensor, kv_dtype: KVDtype | None) -> Iterator[Tensor]:
    """The logits [N, V] behind the tokens of a window [1, S], N at a time."""
    sizes = 1, model.compute_dtype, model.device, window.shape[1]
    cache = Cache(model.config, *sizes, kv_dtype=kv_dtype)
    for part in window[:, :-1].split(CHUNK_TOKENS, 1):
        yield model(part.to(model.device), cache=cache).logits[0]


def _sums(logits: list[Tensor], targets: Tensor) -> Tensor:
    """-log p of both models, where they agree, and their divergence, float64 [4]."""
    made = torch.zeros(4, dtype=torch.float64)
    rows = [F.log_softmax(x.float(), -1) for x in logits]
    for i, log_p in enumerate(rows):
        nats = F.nll_loss(log_p, targets.to(log_p.device), reduction="none").double().sum()
        if not bool(nats.isfinite()):
            raise RuntimeError("a token's probability is 0 or no number: the logits are not finite")
        made[i] = nats.cpu()
    if len(rows) == 2:
        log_p, other = rows[0], rows[1].to(rows[0].device)
        made[2] = (log_p.argmax(-1) == other.argmax(-1)).sum().cpu()
        made[3] = F.kl_div(log_p, other, reduction="none", log_target=True).double().sum().cpu()
    return made
