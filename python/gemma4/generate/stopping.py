"""When rows end before their length: at an eos id, at a string, or where the caller says so."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .options import GenerationConfig
from .prompt import Prompt
from .sampling import functions

# (ids [B, T] so far, scores so far) -> bool, or bool [B]
Criterion = Callable[[Tensor, tuple[Tensor, ...]], bool | Tensor]
Criteria = Criterion | Sequence[Criterion] | None

# What bytes that are no character yet decode to.
_UNFINISHED = "\ufffd"


class Decodes(Protocol):
    """A tokenizer, this package's or transformers'."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str | list[str]: ...


class StopStrings:
    """Ends a row with the token that completes one of `strings`, though it may go on beyond it.

    Reads each step's ids on the host. Special tokens count by their names.
    """

    def __init__(self, tokenizer: Decodes, strings: Sequence[str], rows: Sequence[list[int]]):
        self.tokenizer, self.strings = tokenizer, strings
        # A token is a byte at least, so that this many hold any of the strings.
        self.tokens = max(len(string.encode()) for string in strings)
        self.tails = [row[-self.tokens :] for row in rows]

    def __call__(self, ids_BT: Tensor, scores: tuple[Tensor, ...]) -> Tensor:
        new = zip(self.tails, ids_BT[:, -1].tolist(), strict=True)
        return torch.tensor([self._ends(tail, index) for tail, index in new], device=ids_BT.device)

    def _ends(self, tail: list[int], index: int) -> bool:
        before = self._text(tail).rstrip(_UNFINISHED)
        tail.append(index)
        text = self._text(tail)
        ended = any(
            text.find(string, max(0, len(before) - len(string) + 1)) >= 0 for string in self.strings
        )
        if len(tail) > 4 * self.tokens + 64:
            # Not in the middle of a character, which would spoil those around it.
            rest = tail[-self.tokens :]
            if text.endswith(self._text(rest)):
                tail[:] = rest
        return ended

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        assert isinstance(text, str)  # transformers' tokenizers take batches too
        return text


class Stopper:
    """Which rows of a batch have ended: on the host, and not 0 in `done` [B] for the device."""

    def __init__(
        self,
        options: GenerationConfig,
        tokenizer: Decodes | None,
        given: Criteria,
        batch: Prompt,
        done: Tensor,
    ):
        self.eos, self.done = set(options.eos_ids), done
        self.ended = [False] * batch.batch_size
        self.criteria: list[Criterion] = functions("stopping_criteria", given)
        if options.stops:
            if tokenizer is None:
                raise ValueError("stop_strings need the tokenizer: give tokenizer=")
            self.criteria.insert(0, StopStrings(tokenizer, options.stops, batch.rows()))

    def __call__(self, ids: Sequence[int], ids_BT: Tensor, scores: list[Tensor]) -> bool:
        """Whether all have, after the newest token of each; criteria, of which there are none
        where ids come late, are asked with all tokens so far, and the scores if they are kept."""
        for criterion in self.criteria:
            self.done |= torch.as_tensor(criterion(ids_BT, tuple(scores)), device=self.done.device)
        if self.criteria:
            self.ended = [mark != 0 for mark in self.done.tolist()]
        pairs = zip(self.ended, ids, strict=True)
        self.ended = [ended or index in self.eos for ended, index in pairs]
        return all(self.ended)
