"""Where the tokens of a padded batch lie, once, so that everything after it knows no padding.

The model works on packed tokens [T, D]: a padded [B, S] batch without its padding, row after row.
Rows, or the segments packed into a row, are sequences: a length and a number of cached tokens
each. Left and right padding are the same thing here, and no S x S mask exists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The real tokens of a [B, S] batch as packed sequences (lists have one entry a sequence)."""

    shape: tuple[int, int]
    rows: list[int]
    # Column of a sequence's first token.
    columns: list[int]
    lengths: list[int]
    # Tokens of the sequence that a cache holds already.
    pasts: list[int]
    positions: Tensor
    # Flat index of each token in [B, S]; None if every cell is a token.
    index: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @classmethod
    def whole(cls, shape: Sequence[int], device: torch.device) -> "Layout":
        """Rows without padding, one sequence each."""
        batch, width = shape
        return make_layout((batch, width), device)

    @property
    def max_seqlen_q(self) -> int:
        return max(self.lengths)

    @property
    def totals(self) -> list[int]:
        """Keys of each sequence: its cached tokens and its new ones."""
        return [past + length for past, length in zip(self.pasts, self.lengths, strict=True)]

    @property
    def max_seqlen_k(self) -> int:
        return max(self.totals)

    @property
    def uniform_length(self) -> int | None:
        """The length that all sequences have, or None."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @property
    def has_packed_rows(self) -> bool:
        """Whether some row holds more than one sequence."""
        return len(self.rows) != self.shape[0]

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] to [T, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def unpack(self, x: Tensor) -> Tensor:
        """[T, ...] to [B, S, ...], zeros in the padding."""
        if self.index is None:
            return x.unflatten(0, self.shape)
        cells = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return cells.index_copy(0, self.index, x).unflatten(0, self.shape)

    def call(self, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """module(x) for packed x [T, ...], in the shape that it has in a model without packing."""
        return self.pack(module(self.unpack(x)))

    def tail(self, columns: int) -> "tuple[Layout, Tensor] | None":
        """The layout of the last columns alone, and which packed tokens they hold.

        None where that would drop nothing, or leave sequences with different counts.
        """
        width = self.shape[1]
        first = width - columns
        starts = [max(column, first) for column in self.columns]
        kept = [
            max(0, column + length - start)
            for column, length, start in zip(self.columns, self.lengths, starts, strict=True)
        ]
        if columns >= width or len(set(kept)) != 1 or kept[0] == 0:
            return None
        ends = list(accumulate(self.lengths))
        device = self.positions.device
        chosen = torch.cat([torch.arange(end - kept[0], end) for end in ends]).to(device)
        layout = Layout(
            shape=(self.shape[0], columns),
            rows=self.rows,
            columns=[start - first for start in starts],
            lengths=kept,
            pasts=[total - n for total, n in zip(self.totals, kept, strict=True)],
            positions=self.positions[chosen],
            index=_flat_index((self.shape[0], columns), self.rows, starts, kept, first, device),
            cu_seqlens_q=cumulative(kept, device),
            cu_seqlens_k=self.cu_seqlens_k,
        )
        return layout, chosen


def make_layout(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_lengths: list[int] | None = None,
    past_columns: int = 0,
) -> Layout:
    """The layout of a [B, S] batch.

    attention_mask [B, past_columns + S] of 0 and 1, each row one run of ones in the S new columns
    (left or right padding). position_ids [B, S] or [1, S]; without a cache, a row is split into
    sequences where they do not go up by one. past_lengths counts each row's cached tokens.
    Raises ValueError where these contradict each other.
    """
    batch, width = shape
    cached = past_lengths is not None
    pasts = [0] * batch if past_lengths is None else past_lengths
    if batch < 1 or width < 1:
        raise ValueError(f"the input must hold at least one token per row, got {list(shape)}")
    rows, columns, lengths = list(range(batch)), [0] * batch, [width] * batch
    if attention_mask is not None:
        columns, lengths = _runs(attention_mask, shape, pasts, past_columns)
    ids = None
    if position_ids is not None:
        if position_ids.ndim != 2 or position_ids.shape not in (shape, (1, width)):
            raise ValueError(
                f"position_ids must be [{batch}, {width}], as long as the {width} input tokens, "
                f"got {list(position_ids.shape)}"
            )
        ids = position_ids.expand(shape)
        if not torch.compiler.is_compiling():
            rows, columns, lengths = _segments(ids.cpu(), columns, lengths, cached)
    if not cached:
        pasts = [0] * len(rows)
    index = None
    if lengths != [width] * batch:
        index = _flat_index(shape, rows, columns, lengths, 0, device)
    if ids is not None:
        flat = ids.flatten().to(device)
        positions = flat if index is None else flat[index]
    else:
        positions = torch.cat(
            [torch.arange(p, p + n) for p, n in zip(pasts, lengths, strict=True)]
        ).to(device)
    totals = [p + n for p, n in zip(pasts, lengths, strict=True)]
    return Layout(
        shape=(batch, width),
        rows=rows,
        columns=columns,
        lengths=lengths,
        pasts=list(pasts),
        positions=positions,
        index=index,
        cu_seqlens_q=cumulative(lengths, device),
        cu_seqlens_k=cumulative(totals, device),
    )


def cumulative(lengths: list[int], device: torch.device) -> Tensor:
    """cu_seqlens [B + 1] int32 of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


def _flat_index(
    shape: tuple[int, int],
    rows: list[int],
    columns: list[int],
    lengths: list[int],
    first: int,
    device: torch.device,
) -> Tensor | None:
    """Flat indices in [B, S] of the tokens, with S counted from column `first`."""
    if sum(lengths) == shape[0] * shape[1]:
        return None
    runs = [
        torch.arange(length) + (row * shape[1] + column - first)
        for row, column, length in zip(rows, columns, lengths, strict=True)
    ]
    return torch.cat(runs).to(device)


def _runs(
    mask: Tensor, shape: tuple[int, int], pasts: list[int], past_columns: int
) -> tuple[list[int], list[int]]:
    """First column and length of each row's run of ones among the new columns."""
    batch, width = shape
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [B, S] of 0 and 1, got {mask.ndim} dimensions: "
            "this model builds no S x S masks"
        )
    if mask.shape != (batch, past_columns + width):
        raise ValueError(
            f"attention_mask must be [{batch}, {past_columns + width}] ({past_columns} cached + "
            f"{width} new columns), got {list(mask.shape)}"
        )
    mask = mask.cpu()
    if mask.is_floating_point() and mask.isnan().any():
        raise ValueError("attention_mask holds NaN")
    keep = mask.bool()
    if not torch.equal(keep.to(mask.dtype), mask):
        raise ValueError("attention_mask must hold 0 and 1 alone (additive masks are not taken)")
    counts = keep[:, :past_columns].sum(1).tolist()
    for row, (kept, past) in enumerate(zip(counts, pasts, strict=True)):
        if past_columns and kept != past:
            raise ValueError(
                f"attention_mask keeps {kept} cached tokens of row {row}, the cache holds {past}"
            )
    keep = keep[:, past_columns:]
    lengths = keep.sum(1)
    columns = keep.int().argmax(1)
    span = torch.arange(width)
    run = (span >= columns[:, None]) & (span < (columns + lengths)[:, None])
    if not torch.equal(run, keep):
        row = int((run != keep).any(1).int().argmax())
        raise ValueError(
            f"attention_mask must be one run of ones per row (left or right padding), "
            f"row {row} has holes"
        )
    return columns.tolist(), lengths.tolist()


def _segments(
    ids: Tensor, columns: list[int], lengths: list[int], cached: bool
) -> tuple[list[int], list[int], list[int]]:
    """Rows split where the positions of their tokens do not go up by one."""
    rows, starts, counts = [], [], []
    for row, (column, length) in enumerate(zip(columns, lengths, strict=True)):
        run = ids[row, column : column + length]
        if length and int(run.min()) < 0:
            raise ValueError(f"position_ids must not be negative, got {int(run.min())}")
        breaks = ((run[1:] - run[:-1]) != 1).nonzero().flatten().add(1).tolist()
        if breaks and cached:
            raise ValueError(
                f"position_ids of row {row} must go up by one with a cache; "
                "rows that pack several sequences have none (use_cache=False)"
            )
        edges = [0, *breaks, length]
        for begin, end in pairwise(edges):
            rows.append(row)
            starts.append(column + begin)
            counts.append(end - begin)
    return rows, starts, counts
