"""What `generate` is asked to continue, checked and with each row's tokens at its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..cache import Cache
from ..layout import make_layout


class Array(Protocol):
    """numpy's, or what can become one."""

    def __array__(self) -> object: ...


ArrayLike = Tensor | Array | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts: `inputs` are the model's arguments by name, padded on the left.

    given holds the ids as they came ([B, 0] for embeddings), ids padded on the left, and
    lengths the number of each row's tokens.
    """

    inputs: dict[str, Tensor]
    given: Tensor
    ids: Tensor
    lengths: list[int]

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        return next(iter(self.inputs.values())).shape[1]

    @property
    def real(self) -> Tensor:
        """Which of ids are no padding."""
        width = self.ids.shape[1]
        return _last(self.lengths, width).to(self.ids.device)

    def rows(self) -> list[list[int]]:
        """The ids of each row, without its padding."""
        pairs = zip(self.ids.tolist(), self.lengths, strict=True)
        return [row[max(0, len(row) - length) :] for row, length in pairs]

    def row(self, index: int) -> "Prompt":
        return self._chosen([index])

    def repeated(self, times: int) -> "Prompt":
        """Each row `times` times, one copy after the other."""
        rows = range(self.batch_size)
        return self if times == 1 else self._chosen([row for row in rows for _ in range(times)])

    def _chosen(self, rows: list[int]) -> "Prompt":
        inputs = {name: x[rows] for name, x in self.inputs.items()}
        lengths = [self.lengths[row] for row in rows]
        return Prompt(inputs, self.given[rows], self.ids[rows], lengths)

    def rest(self, cache: Cache) -> tuple[dict[str, Tensor], Tensor | None]:
        """The arguments for what `cache` does not hold yet, and their mask [B, columns + rest]."""
        left = [n - kept for n, kept in zip(self.lengths, cache.lengths, strict=True)]
        width = max(left)
        inputs = {name: x[:, -width:] for name, x in self.inputs.items()}
        if min(left) == width:
            return inputs, None
        return inputs, torch.cat([_last(cache.lengths, cache.columns), _last(left, width)], 1)


def _last(counts: Sequence[int], width: int) -> Tensor:
    """A mask [B, width] of the last `counts` columns."""
    return torch.arange(width) >= width - torch.tensor(counts)[:, None]


def read_prompt(
    input_ids: ArrayLike | None,
    attention_mask: ArrayLike | None,
    inputs_embeds: Tensor | None,
    per_layer_inputs: Tensor | None,
    vocab_size: int,
    device: torch.device,
) -> Prompt:
    """Ids may be a tensor, an array, a list of rows or one row's list, of any integers.

    Raises ValueError for an empty prompt and for what is no prompt.
    """
    if input_ids is not None and inputs_embeds is not None:
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    for name, x in (("inputs_embeds", inputs_embeds), ("per_layer_inputs", per_layer_inputs)):
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    given = inputs_embeds if input_ids is None else _ids(input_ids, vocab_size)
    dimensions = 3 if input_ids is None else 2
    if given is not None and given.ndim != dimensions:
        raise ValueError(
            "the prompt must be input_ids [B, S] or inputs_embeds [B, S, D], "
            f"got {list(given.shape)}"
        )
    if given is None or given.shape[1] == 0:
        raise ValueError("the prompt is empty: it must hold at least one token per row")
    if given.shape[0] == 0:
        raise ValueError("the batch is empty: it must hold at least one row")
    given = given.to(device)
    inputs = {"input_ids" if input_ids is not None else "inputs_embeds": given}
    batch, width = given.shape[:2]
    if per_layer_inputs is not None:
        if per_layer_inputs.shape[:2] != (batch, width):
            raise ValueError(
                f"per_layer_inputs must be [{batch}, {width}, L, P], like inputs_embeds, "
                f"got {list(per_layer_inputs.shape)}"
            )
        inputs["per_layer_inputs"] = per_layer_inputs
    lengths = [width] * batch
    if attention_mask is not None:
        inputs, lengths = _left_padded(inputs, _tensor("attention_mask", attention_mask), given)
    none_B0 = torch.empty(batch, 0, dtype=torch.int64, device=device)
    if input_ids is None:
        return Prompt(inputs, none_B0, none_B0, lengths)
    return Prompt(inputs, given, inputs["input_ids"], lengths)


def _ids(input_ids: ArrayLike, vocab_size: int) -> Tensor:
    ids = _tensor("input_ids", input_ids)
    if isinstance(input_ids, (list, tuple)) and ids.ndim == 1 and len(ids):
        ids = ids[None]
    kind = ids.dtype
    if ids.numel() and (kind.is_floating_point or kind.is_complex or kind == torch.bool):
        raise ValueError(f"input_ids must be integers, got {kind}")
    ids = ids.to(torch.int64)
    if ids.numel():
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"input_ids must lie in 0..{vocab_size - 1}, got {bad}")
    return ids


def _tensor(name: str, value: object) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} must be a tensor, an array or rows of equal length, got {value!r:.80}"
        ) from None


def _left_padded(
    inputs: dict[str, Tensor], mask: Tensor, given: Tensor
) -> tuple[dict[str, Tensor], list[int]]:
    """The batch with each row's tokens at its end, so that all rows go on from one column; and
    their numbers."""
    batch, width = given.shape[:2]
    layout = make_layout((batch, width), torch.device("cpu"), mask)
    if 0 in layout.lengths:
        raise ValueError(f"the prompt of row {layout.lengths.index(0)} is empty: all its mask is 0")
    ends = [c + n for c, n in zip(layout.columns, layout.lengths, strict=True)]
    if ends == [width] * batch:
        return inputs, layout.lengths
    source = (torch.arange(width) - width + torch.tensor(ends)[:, None]) % width
    rows = torch.arange(batch)[:, None]
    moved = {name: x[rows.to(x.device), source.to(x.device)] for name, x in inputs.items()}
    return moved, layout.lengths
