"""Keys and values of past tokens: all of them on full layers, a ring of the window on sliding ones.

Layers that borrow keys own nothing here. A row's token p lies in slot p of its full layers and in
slot p mod slots of its rings; rows count their real tokens alone, so padding takes no room. What
one forward does with a cache stands in steps.py.

In fp8 a head of a key is 8-bit codes (e4m3) and a scale of its own, max |x| / 448 of its normed and
rotated row, which the kernel that makes the row computes: 1.6 % of the codes' bytes at 256
channels, 0.8 % at 512. Scales that a checkpoint brings for its cache (k_scale, v_scale) are of a
whole layer, and are not used.
"""

from collections.abc import Sequence
from copy import copy
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gemma4_kernels.common import DECODE_TOKENS
from gemma4_kernels.e4m3 import E4M3

from .config import SLIDING, Gemma4TextConfig

# Slots of a full layer come in pages of this many, so that the same memory can be read as rows
# [B, slots, G, C] or as pages through a block table.
PAGE_SIZE = 64
# Keys and values in 8 bits: of full layers, or of all.
KVDtype: TypeAlias = Literal["fp8", "fp8-all"]
KV_DTYPES = ("fp8", "fp8-all")


class Cache:
    """The cache of one batch; made by the model, handed back to it with the next tokens.

    lengths counts the tokens of each row, columns those of the padded batch. rollback is how many
    tokens `trim` can take back once a sliding layer's ring is full. ids are the first tokens of
    each row as far as `generate` wrote them, and reused counts those that its last call found here.

    kv_dtype "fp8" holds keys and values of full layers in half the memory, "fp8-all" those of
    sliding layers, of which there is at most a window, too.
    """

    def __init__(
        self,
        config: Gemma4TextConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int = 0,
        rollback: int = DECODE_TOKENS,
        kv_dtype: KVDtype | None = None,
    ):
        if kv_dtype is not None and kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be None or one of {KV_DTYPES}, got {kv_dtype!r}")
        if not isinstance(rollback, int) or isinstance(rollback, bool) or rollback < 0:
            raise ValueError(f"rollback must be a whole number of at least 0, got {rollback!r}")
        self.config, self.signature = config, _signature(config)
        self.window, self.rollback = config.sliding_window, rollback
        # Not `dtype`: programs that cast a model's outputs take what has one for a tensor.
        self.model_dtype, self.device = dtype, torch.device(device)
        self.kv_dtype = kv_dtype
        self.lengths = [0] * batch_size
        self.columns = 0
        self.ids: list[list[int]] = [[] for _ in range(batch_size)]
        self.reused = [0] * batch_size
        # The longest each row has been: what lies this far back in a ring is overwritten.
        self._written = [0] * batch_size
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        # [B, slots, G] of the layers in fp8.
        self.k_scales: dict[int, Tensor] = {}
        self.v_scales: dict[int, Tensor] = {}
        self._ring: dict[int, bool] = {}
        self.block_table = torch.empty(batch_size, 0, dtype=torch.int32, device=self.device)
        for layer, ring, kv_heads, head_dim in self.signature:
            slots = self.window + rollback if ring else 0
            heads, coded = (batch_size, slots, kv_heads), is_coded(kv_dtype, ring)
            for store in (self.k, self.v):
                held = E4M3 if coded else dtype
                store[layer] = torch.empty(*heads, head_dim, dtype=held, device=device)
            for scales in (self.k_scales, self.v_scales) if coded else ():
                scales[layer] = torch.empty(heads, dtype=torch.float32, device=device)
            self._ring[layer] = ring
        self.reserve(max_length)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def get_seq_length(self) -> int:
        """Columns of the padded batch that the cache has seen."""
        return self.columns

    def check(
        self, config: Gemma4TextConfig, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises ValueError if this is not a cache of this model and batch."""
        # The model that made the cache hands it back every step: its own config needs no look.
        if config is not self.config:
            if self.signature != _signature(config) or self.window != config.sliding_window:
                raise ValueError("cache belongs to a model of another shape")
            if self.config.rope_parameters != config.rope_parameters:
                raise ValueError("cache belongs to a model with other rope_parameters")
        if self.model_dtype != dtype:
            raise ValueError(f"cache holds {self.model_dtype}, the model computes in {dtype}")
        here = self.block_table.device
        if here != device:
            raise ValueError(f"cache lies on {here}, the model on {device}")
        if self.batch_size != batch_size:
            raise ValueError(f"cache holds {self.batch_size} rows, the input has {batch_size}")

    def trim(self, count: int | Sequence[int]) -> None:
        """Takes back the last `count` tokens of every row; a sequence has one count a row.

        Raises ValueError if a row holds fewer, or if a ring no longer holds the window before them.
        """
        counts = count if isinstance(count, Sequence) else [count] * self.batch_size
        if len(counts) != self.batch_size:
            raise ValueError(f"cannot trim {len(counts)} rows, the cache holds {self.batch_size}")
        for row, (some, length) in enumerate(zip(counts, self.lengths, strict=True)):
            whole = isinstance(some, int) and not isinstance(some, bool)
            if not whole or not 0 <= some <= length:
                raise ValueError(f"cannot trim {some!r} tokens, rows hold {self.lengths}")
            if not self._can_keep(row, length - some):
                raise ValueError(
                    f"cannot trim {some} tokens: sliding layers keep {self.rollback} tokens "
                    "beyond the window (rollback)"
                )
        self.lengths = [length - some for length, some in zip(self.lengths, counts, strict=True)]
        self.columns = self.columns - count if isinstance(count, int) else max(self.lengths)
        self.ids = [ids[:length] for ids, length in zip(self.ids, self.lengths, strict=True)]
        pairs = zip(self._written, self.lengths, strict=True)
        self._written = [written if length else 0 for written, length in pairs]

    def _can_keep(self, row: int, length: int) -> bool:
        """Whether the rings still hold the window at the end of the row's first `length` tokens."""
        if length == 0 or not any(self._ring.values()):
            return True
        oldest = self._written[row] - self.window - self.rollback
        return oldest <= max(0, length - self.window + 1)

    def resume(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Takes back all but what the cache and `rows` begin with; returns the tokens kept of each.

        A row's last token is never kept, for its logits are wanted. Tokens beyond `ids`, those of a
        forward, are taken to be the row's own. A row whose rings have lost the window before the
        next token starts anew.
        """
        kept = []
        for row, (ids, known, length) in enumerate(zip(rows, self.ids, self.lengths, strict=True)):
            pairs = zip(ids, known, strict=False)
            same = next((i for i, (one, other) in enumerate(pairs) if one != other), length)
            same = min(same, length, len(ids) - 1)
            kept.append(same if self._can_keep(row, same) else 0)
        self.trim([length - same for length, same in zip(self.lengths, kept, strict=True)])
        self.reused = kept
        return kept

    def record(self, rows: Sequence[list[int]], cut_short: bool) -> None:
        """Notes which tokens the rows hold. cut_short: a step may have written one more."""
        self.ids = [ids[:length] for ids, length in zip(rows, self.lengths, strict=True)]
        self._written = [written + cut_short for written in self._written]

    def repeated(self, times: int) -> "Cache":
        """A cache that holds each row `times` times, one copy after the other."""
        other = copy(self)
        for name in ("lengths", "ids", "reused", "_written"):
            setattr(other, name, [x for x in getattr(self, name) for _ in range(times)])
        for name in ("k", "v", "k_scales", "v_scales"):
            store = getattr(self, name)
            setattr(other, name, {i: x.repeat_interleave(times, 0) for i, x in store.items()})
        other.block_table = other._pages(self.block_table.shape[1])
        return other

    def reserve(self, length: int) -> None:
        """Room for `length` tokens a row on the full layers, doubling so that growth is linear."""
        full = [layer for layer, ring in self._ring.items() if not ring]
        if not full or length <= self.k[full[0]].shape[1]:
            return
        slots = max(length, 2 * self.k[full[0]].shape[1])
        slots = -(-slots // PAGE_SIZE) * PAGE_SIZE
        for store in (self.k, self.v, self.k_scales, self.v_scales):
            for layer in store.keys() & set(full):
                old = store[layer]
                store[layer] = old.new_empty(old.shape[0], slots, *old.shape[2:])
                store[layer][:, : old.shape[1]] = old
        self.block_table = self._pages(slots // PAGE_SIZE)

    def _pages(self, per_row: int) -> Tensor:
        pages = torch.arange(self.batch_size * per_row, dtype=torch.int32)
        return pages.view(self.batch_size, per_row).to(self.device)

    @property
    def room(self) -> int | None:
        """The tokens that every row can still take without new memory; None if rings are all."""
        full = [layer for layer, ring in self._ring.items() if not ring]
        return self.k[full[0]].shape[1] - max(self.lengths) if full else None

    def count_one(self) -> None:
        """A `DecodePlan` has written one token of each row."""
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

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Of the keys and of the values of a layer in fp8."""
        if layer not in self.k_scales:
            return None, None
        return self.k_scales[layer], self.v_scales[layer]


def is_coded(kv_dtype: KVDtype | None, ring: bool) -> bool:
    """Whether a layer's keys are in fp8."""
    return kv_dtype == "fp8-all" or (kv_dtype == "fp8" and not ring)


def _signature(config: Gemma4TextConfig) -> list[tuple[int, bool, int, int]]:
    """(layer, is a ring, KV heads, head size) of the layers that own keys."""
    return [
        (i, kind == SLIDING, config.kv_heads(kind), config.head_size(kind))
        for i, kind in enumerate(config.layer_types)
        if config.kv_owner(i) == i
    ]
