"""From logits to the next tokens: processors, then the choice.

All of it stays on the device: nothing here makes the host wait.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gemma4_kernels import ops
from gemma4_kernels.ops.logits import sample_counters
from gemma4_kernels.reference.logits import cut

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
    """Chooses the next token of each row: `processors`, then what `ops.sample` does.

    ids [B] are the newest tokens, pads where a row has ended, and done [B] is not 0 there. The
    draws of row r are those of seed + r at its position; of a seed from torch's global generator
    where none is given.
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
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ())) if options.samples else 0
        seeds = [_as_int64(seed + row) for row in range(batch_size)]
        self.seeds = torch.tensor(seeds, device=device)
        self.ids = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.done = torch.zeros_like(self.ids)
        self.eos = torch.tensor(options.eos_ids, dtype=torch.int64, device=device)
        self.counters: Tensor | None = None
        self.temperature = options.temperature if options.samples else 0.0
        self.cuts = (options.top_k or 0, options.top_p or 1.0, options.min_p or 0.0)

    @property
    def is_one_op(self) -> bool:
        """Whether `choose` is all there is to a step: nobody sees what it chooses from."""
        keeps = self.options.output_scores or self.options.output_logits
        return not (self.processors or keeps)

    def __call__(self, ids_BT: Tensor, logits_BV: Tensor, positions_B: Tensor) -> Tensor | None:
        """Chooses after the processors; returns what it chose from [B, V] if output_scores."""
        keep, scores_BV = self.options.output_scores, logits_BV
        if self.processors or keep:
            # A copy: a decoder's logits are overwritten by its next step, and processors may write.
            wide = torch.promote_types(logits_BV.dtype, torch.float32)
            scores_BV = logits_BV.to(wide, copy=True)
        for process in self.processors:
            scores_BV = _processed(process, ids_BT, scores_BV)
        self.choose(scores_BV, positions_B)
        if not keep or not self.temperature:
            return scores_BV if keep else None
        scores_BN, ids_BN = cut(scores_BV, self.temperature, *self.cuts)
        if ids_BN is None:
            return scores_BN
        return scores_BV.fill_(-torch.inf).scatter(-1, ids_BN, scores_BN)

    def choose(self, logits_BV: Tensor, positions_B: Tensor, cap: float = 0.0) -> None:
        """Of logits that are still to be capped, if a cap is given, for tokens at `positions_B`."""
        if self.counters is None:
            self.counters = sample_counters(logits_BV)
        top_k, top_p, min_p = self.cuts
        ops.sample(
            *(logits_BV, self.seeds, positions_B, self.ids, self.done, self.counters, self.eos),
            cap=cap,
            temperature=self.temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            pad=self.options.pad_token_id or 0,
        )


def _as_int64(seed: int) -> int:
    """The last 64 bits, with a sign."""
    return (seed + 2**63) % 2**64 - 2**63


def _processed(process: Processor, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
    found = process(ids_BT, scores_BV)
    if not isinstance(found, Tensor) or found.shape != scores_BV.shape:
        got = list(found.shape) if isinstance(found, Tensor) else found
        raise ValueError(
            f"a logits_processor must return scores {list(scores_BV.shape)}, got {got}"
        )
    return found
