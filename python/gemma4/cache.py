"""Keys and values of past tokens: all of them on full layers, a ring of the window on sliding ones.

Layers that borrow keys own nothing here. A row's token p lies in slot p of its full layers and in
slot p mod slots of its rings; rows count their real tokens alone, so padding takes no room.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from gemma4_kernels import ops

from .config import SLIDING, Gemma4TextConfig
from .layout import Layout, cumulative

# Slots of a full layer come in pages of this many, so that the same memory can be read as rows
# [B, S, G, C] or as pages through a block table.
PAGE_SIZE = 64
# The decode op takes up to this many new tokens a sequence; longer runs go through prefill.
DECODE_TOKENS = 16


@dataclass(frozen=True)
class Keys:
    """The keys and values that one call of attention reads, packed or in a cache."""

    k: Tensor
    v: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_k: int
    block_table: Tensor | None = None
    # Set where the tokens are decoded against a cache of rows.
    seq_lens: Tensor | None = None
    ring: bool = False

    def attend(
        self, q_THC: Tensor, layout: Layout, causal: bool, window: int, window_right: int
    ) -> Tensor:
        """Attention of the packed queries of `layout`, the tail of each sequence's keys."""
        if self.seq_lens is not None:
            q_BNHC = q_THC.unflatten(0, (self.seq_lens.shape[0], -1))
            out, _ = ops.attention_decode(
                q_BNHC,
                self.k,
                self.v,
                self.seq_lens,
                window=window,
                ring=self.ring,
                return_lse=False,
            )
            return out.flatten(0, 1)
        out, _ = ops.attention_prefill(
            q_THC,
            self.k,
            self.v,
            layout.cu_seqlens_q,
            self.cu_seqlens_k,
            layout.max_seqlen_q,
            self.max_seqlen_k,
            causal=causal,
            window=window,
            window_right=window_right,
            block_table=self.block_table,
        )
        return out


class Cache:
    """The cache of one batch; made by the model, handed back to it with the next tokens.

    lengths counts the tokens of each row, columns those of the padded batch. rollback is how many
    tokens `trim` can take back once a sliding layer's ring is full. ids are the first tokens of
    each row as far as `generate` wrote them, and reused counts those that its last call found here.
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
        if not isinstance(rollback, int) or isinstance(rollback, bool) or rollback < 0:
            raise ValueError(f"rollback must be a whole number of at least 0, got {rollback!r}")
        self.config, self.signature = config, _signature(config)
        self.window, self.rollback = config.sliding_window, rollback
        self.dtype, self.device = dtype, torch.device(device)
        self.lengths = [0] * batch_size
        self.columns = 0
        self.ids: list[list[int]] = [[] for _ in range(batch_size)]
        self.reused = [0] * batch_size
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
        if config is not self.config:
            if self.signature != _signature(config) or self.window != config.sliding_window:
                raise ValueError("cache belongs to a model of another shape")
            if self.config.rope_parameters != config.rope_parameters:
                raise ValueError("cache belongs to a model with other rope_parameters")
        if self.dtype != dtype:
            raise ValueError(f"cache holds {self.dtype}, the model computes in {dtype}")
        if self.batch_size != batch_size:
            raise ValueError(f"cache holds {self.batch_size} rows, the input has {batch_size}")

    def trim(self, count: int | Sequence[int]) -> None:
        """Takes back the last `count` tokens of every row; a sequence has one count a row.

        Raises ValueError if a row holds fewer, or if a ring no longer holds the window before them.
        """
        counts = count if isinstance(count, (list, tuple)) else [count] * self.batch_size
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
        self.columns = self.columns - count if counts is not count else max(self.lengths)
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
        for name in ("k", "v"):
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
        for store in (self.k, self.v):
            for layer in full:
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
        """A `DecodeStep` has written one token of each row."""
        self.lengths = [length + 1 for length in self.lengths]
        self._written = [max(pair) for pair in zip(self._written, self.lengths, strict=True)]
        self.columns += 1

    def begin(self, layout: Layout) -> "CacheStep":
        """Prepares the writing of the tokens of `layout`; `CacheStep.commit` makes it count."""
        self.reserve(layout.max_seqlen_k)
        self._written = [max(pair) for pair in zip(self._written, layout.totals, strict=True)]
        return CacheStep(self, layout)


def _signature(config: Gemma4TextConfig) -> list[tuple[int, bool, int, int]]:
    """(layer, is a ring, KV heads, head size) of the layers that own keys."""
    return [
        (i, kind == SLIDING, config.kv_heads(kind), config.head_size(kind))
        for i, kind in enumerate(config.layer_types)
        if config.kv_owner(i) == i
    ]


class CacheStep:
    """One forward's view of a cache: where its tokens go, and what its attention reads."""

    def __init__(self, cache: Cache, layout: Layout):
        self.cache, self.layout = cache, layout
        length = layout.uniform_length
        self.decoding = length is not None and 0 < length <= min(DECODE_TOKENS, cache.rollback + 1)
        self.seq_lens = layout.cu_seqlens_k.diff() if self.decoding else None
        self._slots: dict[int, Tensor] = {}

    def slots(self, per_row: int) -> Tensor:
        """The slot of each new token in rows of `per_row` slots."""
        if per_row not in self._slots:
            runs = [
                torch.arange(past, total).remainder(per_row) + row * per_row
                for row, (past, total) in enumerate(
                    zip(self.layout.pasts, self.layout.totals, strict=True)
                )
            ]
            self._slots[per_row] = torch.cat(runs).to(self.cache.device)
        return self._slots[per_row]

    def write(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        q_weight: Tensor,
        k_weight: Tensor,
        inv_freq: Tensor,
        eps: float,
    ) -> tuple[Tensor, Keys]:
        """Norms and rotates q, k and v, caches k and v; returns q and the keys it attends to."""
        cache, layout = self.cache, self.layout
        k_cache, v_cache, ring = cache.k[layer], cache.v[layer], cache._ring[layer]
        args = (q, k, v, q_weight, k_weight, layout.positions, inv_freq)
        if ring and not self.decoding:
            q, k, v = ops.qkv_norm_rope(*args, eps)
            keys = self._join(k, v, k_cache, v_cache)
            self._write_ring(k, v, k_cache, v_cache)
            return q, keys
        q = ops.qkv_norm_rope_cache(*args, k_cache, v_cache, self.slots(k_cache.shape[1]), eps)
        if self.decoding:
            k, v, table = k_cache, v_cache, None
        else:
            pages = (-1, PAGE_SIZE, *k_cache.shape[2:])
            k, v, table = k_cache.view(pages), v_cache.view(pages), cache.block_table
        return q, Keys(k, v, layout.cu_seqlens_k, layout.max_seqlen_k, table, self.seq_lens, ring)

    def _join(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Keys:
        """The last window - 1 cached keys of each row before its new ones."""
        layout = self.layout
        if not any(layout.pasts):
            return Keys(k, v, layout.cu_seqlens_k, layout.max_seqlen_k)
        ends, slots = [0, *accumulate(layout.lengths)], k_cache.shape[1]
        ks, vs, lengths = [], [], []
        for row, past in enumerate(layout.pasts):
            tail = torch.arange(max(0, past - self.cache.window + 1), past).remainder(slots)
            tail = tail.to(k.device)
            new = slice(ends[row], ends[row + 1])
            ks += [k_cache[row, tail], k[new]]
            vs += [v_cache[row, tail], v[new]]
            lengths.append(len(tail) + layout.lengths[row])
        return Keys(torch.cat(ks), torch.cat(vs), cumulative(lengths, k.device), max(lengths))

    def _write_ring(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """The new tokens into the ring; of a run longer than the ring only its last slots."""
        layout, slots = self.layout, k_cache.shape[1]
        chosen = self.slots(slots)
        if layout.max_seqlen_q > slots:
            ends = accumulate(layout.lengths)
            last = torch.cat(
                [
                    torch.arange(end - min(length, slots), end)
                    for end, length in zip(ends, layout.lengths, strict=True)
                ]
            ).to(k.device)
            k, v, chosen = k[last], v[last], chosen[last]
        k_cache.flatten(0, 1).index_copy_(0, chosen, k)
        v_cache.flatten(0, 1).index_copy_(0, chosen, v)

    def commit(self) -> None:
        """Makes the tokens count, once every layer has written them."""
        self.cache.lengths = self.layout.totals
        self.cache.columns += self.layout.shape[1]


class DecodeStep:
    """One more token for each row, as often as wanted, with nothing left to the host.

    Positions, lengths and slots lie in device tensors that `advance` moves on in place: every step
    reads the same addresses, so that one CUDA graph serves all lengths. Takes the place of a
    `CacheStep`, and of a `Layout` as far as layers look at one.
    """

    def __init__(self, cache: Cache):
        self.cache = cache
        self.rows = torch.arange(cache.batch_size, device=cache.device)
        self.positions = torch.tensor(cache.lengths, device=cache.device)
        self.seq_lens = torch.empty(cache.batch_size, dtype=torch.int32, device=cache.device)
        self.slots = {k.shape[1]: torch.empty_like(self.rows) for k in cache.k.values()}
        self._place()

    def _place(self) -> None:
        torch.add(self.positions, 1, out=self.seq_lens)
        for per_row, slots in self.slots.items():
            torch.remainder(self.positions, per_row, out=slots)
            slots.add_(self.rows, alpha=per_row)

    def advance(self) -> None:
        self.positions.add_(1)
        self._place()

    def write(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        q_weight: Tensor,
        k_weight: Tensor,
        inv_freq: Tensor,
        eps: float,
    ) -> tuple[Tensor, Keys]:
        """As in `CacheStep`."""
        cache = self.cache
        k_cache, v_cache, ring = cache.k[layer], cache.v[layer], cache._ring[layer]
        args = (q, k, v, q_weight, k_weight, self.positions, inv_freq)
        q = ops.qkv_norm_rope_cache(*args, k_cache, v_cache, self.slots[k_cache.shape[1]], eps)
        return q, Keys(k_cache, v_cache, self.seq_lens, 0, None, self.seq_lens, ring)
