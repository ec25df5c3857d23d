"""Keys and values of past tokens: all of them on full layers, a ring of the window on sliding ones.

Layers that borrow keys own nothing here. A row's token p lies in slot p of its full layers and in
slot p mod slots of its rings; rows count their real tokens alone, so padding takes no room. What
one forward does with a cache stands in steps.py.
"""

import torch
from torch import Tensor

from .config import SLIDING, Gemma4TextConfig

# Slots of a full layer come in pages of this many, so that the same memory can be read as rows
# [B, S, G, C] or as pages through a block table.
PAGE_SIZE = 64
# The decode op takes up to this many new tokens a sequence; longer runs go through prefill.
DECODE_TOKENS = 16


class Cache:
    """The cache of one batch; made by the model, handed back to it with the next tokens.

    lengths counts the tokens of each row, columns those of the padded batch. rollback is how many
    tokens `trim` can take back once a sliding layer's ring is full.
    """

    def __init__(
        self,
        config: Gemma4TextConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int = 0,
        rollback: int = DECODE_TOKENS,
    ):
        self.config, self.signature = config, _signature(config)
        self.window, self.rollback = config.sliding_window, rollback
        self.dtype, self.device = dtype, torch.device(device)
        self.lengths = [0] * batch_size
        self.columns = 0
        # The longest each row has been: what lies this far back in a ring is overwritten.
        self._written = [0] * batch_size
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self._ring: dict[int, bool] = {}
        self.block_table = torch.empty(batch_size, 0, dtype=torch.int32, device=self.device)
        for layer, ring, kv_heads, head_dim in self.signature:
            slots = self.window + rollback if ring else 0
            for store in (self.k, self.v):
                store[layer] = torch.empty(
                    batch_size, slots, kv_heads, head_dim, dtype=dtype, device=device
                )
            self._ring[layer] = ring
        self.reserve(max_length)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def get_seq_length(self) -> int:
        """Columns of the padded batch that the cache has seen."""
        return self.columns

    def check(self, config: Gemma4TextConfig, batch_size: int, dtype: torch.dtype) -> None:
        """Raises ValueError if this is not a cache of this model and batch."""
        # The model that made the cache hands it back every step: its own config needs no look.
        same = config is self.config or (
            self.signature == _signature(config) and self.window == config.sliding_window
        )
        if not same:
            raise ValueError("cache belongs to a model of another shape")
        if self.dtype != dtype:
            raise ValueError(f"cache holds {self.dtype}, the model computes in {dtype}")
        if self.batch_size != batch_size:
            raise ValueError(f"cache holds {self.batch_size} rows, the input has {batch_size}")

    def trim(self, count: int) -> None:
        """Takes back the last `count` tokens of every row.

        Raises ValueError if a row holds fewer, or if a ring no longer holds the window before them.
        """
        if count < 0 or count > min(self.lengths):
            raise ValueError(f"cannot trim {count} tokens, rows hold {self.lengths}")
        slots = self.window + self.rollback
        for length, written in zip(self.lengths, self._written, strict=True):
            oldest = written - slots
            if any(self._ring.values()) and oldest > max(0, length - count - self.window + 1):
                raise ValueError(
                    f"cannot trim {count} tokens: sliding layers keep {self.rollback} tokens "
                    "beyond the window (rollback)"
                )
        self.lengths = [length - count for length in self.lengths]
        self.columns -= count

    def reserve(self, length: int) -> None:
        """Room for `length` tokens a row on the full layers, doubling so that growth is linear."""
        full = [layer for layer, ring in self._ring.items() if not ring]
        if not full or length <= self.k[full[0]].shape[1]:
            return
        slots = max(length, 2 * self.k[full[0]].shape[1])
        slots = -(-slots // PAGE_SIZE) * PAGE_SIZE
        for store in (self.k, self.v):
            for layer in full:
                old = store[layer]
                store[layer] = old.new_empty(old.shape[0], slots, *old.shape[2:])
                store[layer][:, : old.shape[1]] = old
        pages = torch.arange(self.batch_size * (slots // PAGE_SIZE), dtype=torch.int32)
        self.block_table = pages.view(self.batch_size, -1).to(self.device)

    @property
    def room(self) -> int | None:
        """The tokens that every row can still take without new memory; None if rings are all."""
        full = [layer for layer, ring in self._ring.items() if not ring]
        return self.k[full[0]].shape[1] - max(self.lengths) if full else None

    def count_one(self) -> None:
        """A `DecodeStep` has written one token of each row."""
        self.lengths = [length + 1 for length in self.lengths]
        self._written = [max(pair) for pair in zip(self._written, self.lengths, strict=True)]
        self.columns += 1

    def make_room(self, totals: list[int]) -> None:
        """Room for rows of these lengths, which are about to be written."""
        self.reserve(max(totals))
        self._written = [max(pair) for pair in zip(self._written, totals, strict=True)]

    def count(self, totals: list[int], columns: int) -> None:
        """Rows hold these many tokens now, all layers having written theirs."""
        self.lengths = list(totals)
        self.columns += columns

    def is_ring(self, layer: int) -> bool:
        return self._ring[layer]


def _signature(config: Gemma4TextConfig) -> list[tuple[int, bool, int, int]]:
    """(layer, is a ring, KV heads, head size) of the layers that own keys."""
    return [
        (i, kind == SLIDING, config.kv_heads(kind), config.head_size(kind))
        for i, kind in enumerate(config.layer_types)
        if config.kv_owner(i) == i
    ]
