"""What a layer attends to, and where a cache takes what it makes: dense, in pages or in fp8."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from gemma4_kernels import ops
from gemma4_kernels.e4m3 import from_e4m3, write_slots

from .layout import Layout

# The scales of k and v, if they are in fp8.
Scales: TypeAlias = tuple[Tensor, Tensor] | tuple[None, None]


@dataclass(frozen=True)
class Slots:
    """The caches of k and v, and which of their slots, over all rows, the new tokens take."""

    k: Tensor
    v: Tensor
    scales: Scales
    slots: Tensor

    def fill(self, k: Tensor, v: Tensor) -> None:
        k_scales, v_scales = self.scales
        write_slots(self.k, k_scales, self.slots, k)
        write_slots(self.v, v_scales, self.slots, v)


@dataclass(frozen=True)
class Keys(ABC):
    """The keys and values that a layer attends to."""

    k: Tensor
    v: Tensor

    @abstractmethod
    def attend(
        self, q_THC: Tensor, layout: Layout, causal: bool, window: int, window_right: int
    ) -> Tensor:
        """Attention of the packed queries of `layout`, the tail of each sequence's keys."""


@dataclass(frozen=True)
class PackedKeys(Keys):
    """Keys one sequence after the other, or in pages."""

    cu_seqlens_k: Tensor
    max_seqlen_k: int
    block_table: Tensor | None = None

    def attend(
        self, q_THC: Tensor, layout: Layout, causal: bool, window: int, window_right: int
    ) -> Tensor:
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


@dataclass(frozen=True)
class CodedKeys(Keys):
    """Rows of a cache in fp8 that many tokens attend to: unpacked once, for all layers that share
    them. That reads and writes 7 bytes a number, against 1 of the cache."""

    scales: tuple[Tensor, Tensor]
    totals: list[int]
    cu_seqlens_k: Tensor
    dtype: torch.dtype

    @cached_property
    def dense(self) -> PackedKeys:
        k, v = (
            [
                from_e4m3(x[row, :n], scales[row, :n], self.dtype)
                for row, n in enumerate(self.totals)
            ]
            for x, scales in zip((self.k, self.v), self.scales, strict=True)
        )
        return PackedKeys(_joined(k), _joined(v), self.cu_seqlens_k, max(self.totals))

    def attend(
        self, q_THC: Tensor, layout: Layout, causal: bool, window: int, window_right: int
    ) -> Tensor:
        return self.dense.attend(q_THC, layout, causal, window, window_right)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class CachedKeys(Keys):
    """Rows of a cache, which a few tokens of each sequence are decoded against."""

    scales: Scales
    seq_lens: Tensor
    ring: bool

    def attend(
        self, q_THC: Tensor, layout: Layout, causal: bool, window: int, window_right: int
    ) -> Tensor:
        q_BNHC = q_THC.unflatten(0, (self.seq_lens.shape[0], -1))
        out, _ = ops.attention_decode(
            q_BNHC,
            self.k,
            self.v,
            self.seq_lens,
            window=window,
            ring=self.ring,
            return_lse=False,
            k_scales=self.scales[0],
            v_scales=self.scales[1],
        )
        return out.flatten(0, 1)


def held(
    cache: Tensor, scales: Tensor | None, row: int, slots: Tensor | slice, dtype: torch.dtype
) -> Tensor:
    """What a row's slots hold, [S, G, C]."""
    x = cache[row, slots]
    return x if scales is None else from_e4m3(x, scales[row, slots], dtype)
