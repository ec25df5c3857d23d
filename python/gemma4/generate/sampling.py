"""From logits to the next tokens: processors, then the distribution's cut, then the draw.

All of it stays on the device: nothing here makes the host wait.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .options import GenerationConfig

# (ids [B, T] so far, scores [B, V]) -> scores [B, V]
Processor = Callable[[Tensor, Tensor], Tensor]
Processors = Processor | Sequence[Processor] | None

F = TypeVar("F", bound=Callable[..., object])


class RepetitionPenalty:
    """Makes less probable what a row holds, its prompt included but not its padding."""

    def __init__(self, penalty: float, prompt_BS: Tensor, real_BS: Tensor, vocab_size: int):
        self.penalty = penalty
        shape = (prompt_BS.shape[0], vocab_size + 1)  # one column more, for what is padding
        self.seen_BV = torch.zeros(shape, dtype=torch.bool, device=prompt_BS.device)
        self.seen_BV.scatter_(1, prompt_BS.where(real_BS, vocab_size), True)

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        self.seen_BV.scatter_(1, ids_BT[:, -1:], True)
        less_BV = torch.where(scores_BV < 0, scores_BV * self.penalty, scores_BV / self.penalty)
        return torch.where(self.seen_BV[:, :-1], less_BV, scores_BV)


class MinNewTokens:
    """No row ends before it has `least` tokens beyond the `width` of its prompt."""

    def __init__(self, least: int, width: int, eos_E: Tensor):
        self.length, self.eos_E = least + width, eos_E

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        if ids_BT.shape[1] >= self.length:
            return scores_BV
        return scores_BV.index_fill(1, self.eos_E, -torch.inf)


def processors(
    options: GenerationConfig,
    prompt_BS: Tensor,
    real_BS: Tensor,
    vocab_size: int,
    given: Processors,
) -> list[Processor]:
    """What `options` ask for and then what was `given`; real_BS says what of the prompt is no
    padding."""
    found: list[Processor] = []
    if options.repetition_penalty != 1:
        penalty = options.repetition_penalty
        found.append(RepetitionPenalty(penalty, prompt_BS, real_BS, vocab_size))
    if options.min_new_tokens and options.eos_ids:
        eos_E = torch.tensor(options.eos_ids, device=prompt_BS.device)
        found.append(MinNewTokens(options.min_new_tokens, prompt_BS.shape[1], eos_E))
    return found + functions("logits_processor", given)


def functions(name: str, given: F | Sequence[F] | None) -> list[F]:
    """An argument that is one function, several or None, as a list; TypeError if it is not."""
    if given is None:
        return []
    found = list(given) if isinstance(given, Sequence) else [given]
    for function in found:
        if not callable(function):
            raise TypeError(f"{name} must be a function or a list of them, got {function!r}")
    return found


class Sampler:
    """Chooses the next token of each row: `processors`, then temperature, top_k, top_p and min_p,
    then a draw; or after the processors the best token, where nothing is drawn. That is
    transformers' order.
    """

    def __init__(
        self,
        options: GenerationConfig,
        processors: Sequence[Processor],
        seed: int | None,
        batch_size: int,
        device: torch.device,
    ):
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        self.options, self.processors = options, processors
        self.generators = [
            None if seed is None else torch.Generator(device).manual_seed(seed + row)
            for row in range(batch_size)
        ]

    def __call__(self, ids_BT: Tensor, logits_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens [B], and what they were drawn from [B, V] if output_scores."""
        options, keep = self.options, self.options.output_scores
        scores_BV = logits_BV
        if self.processors or keep or options.samples:
            # A copy: a decoder's logits are overwritten by its next step, and processors may write.
            wide = torch.promote_types(logits_BV.dtype, torch.float32)
            scores_BV = logits_BV.to(wide, copy=True)
        for process in self.processors:
            scores_BV = _processed(process, ids_BT, scores_BV)
        if not options.samples:
            return scores_BV.argmax(-1), scores_BV if keep else None
        scores_BN, ids_BN = _cut(scores_BV, options)
        drawn_B1 = _draw(scores_BN.softmax(-1), self.generators)
        if ids_BN is None:
            return drawn_B1.squeeze(-1), scores_BN if keep else None
        if keep:
            scores_BV = scores_BV.fill_(-torch.inf).scatter(-1, ids_BN, scores_BN)
        return ids_BN.gather(-1, drawn_B1).squeeze(-1), scores_BV if keep else None


def _processed(process: Processor, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
    found = process(ids_BT, scores_BV)
    if not isinstance(found, Tensor) or found.shape != scores_BV.shape:
        got = list(found.shape) if isinstance(found, Tensor) else found
        raise ValueError(
            f"a logits_processor must return scores {list(scores_BV.shape)}, got {got}"
        )
    return found


def _cut(scores_BV: Tensor, options: GenerationConfig) -> tuple[Tensor, Tensor | None]:
    """Scores over the temperature, -inf where a token is cut off; with ids, best first, where the
    cut had to sort."""
    scores = scores_BV / options.temperature
    vocab_size = scores.shape[-1]
    top_k, top_p = min(options.top_k or vocab_size, vocab_size), options.top_p or 1.0
    ids = None
    if top_k < vocab_size or top_p < 1:
        scores, ids = scores.topk(top_k, -1)
    if top_p < 1 or options.min_p:
        probabilities = scores.softmax(-1)
        if top_p < 1:
            # Keep the best tokens whose predecessors' mass is below top_p; the first always stays.
            before = probabilities.cumsum(-1) - probabilities
            scores = scores.masked_fill(before >= top_p, -torch.inf)
        if options.min_p:
            least = options.min_p * probabilities.amax(-1, keepdim=True)
            scores = scores.masked_fill(probabilities < least, -torch.inf)
    return scores, ids


def _draw(probabilities_BN: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """One index [B, 1] of each row. argmax of p / e with e exponential draws from p; one generator
    a row keeps rows independent."""
    noise_BN = torch.empty_like(probabilities_BN)
    for row, generator in zip(noise_BN, generators, strict=True):
        row.exponential_(generator=generator)
    return (probabilities_BN / noise_BN).argmax(-1, keepdim=True)
