"""The keys and values that `flash_attn_with_kvcache` is given: what they must be, and new ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference.common import check_integral


def check_tensor(name: str, x: object, ndim: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got {list(x.shape)}")
    return x


def is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass
class FlashAttnCache:
    """K and V in a row a sequence, or in pages with a table of them."""

    k: Tensor
    v: Tensor
    block_table: Tensor | None
    room: int  # keys that a sequence can have
    lengths: Tensor  # [B] int32: keys that it has
    longest: int | None  # of them; None where the host would wait for it

    def next_positions(self, count: int) -> Tensor:
        """[B, count]"""
        return self.lengths.long()[:, None] + torch.arange(count, device=self.k.device)

    def append(self, k: Tensor, v: Tensor) -> None:
        positions = self.next_positions(k.shape[1])
        page_size = self.k.shape[1]
        if self.block_table is None:
            rows = torch.arange(len(k), device=k.device)[:, None].expand_as(positions)
        else:
            rows = self.block_table.gather(1, positions // page_size).long()
            _check_pages("block_table", rows, self.k)
            positions = positions % page_size
        self.k.index_put_((rows, positions), k)
        self.v.index_put_((rows, positions), v)
        self.lengths = self.lengths + k.shape[1]
        self.longest = None if self.longest is None else self.longest + k.shape[1]


def open_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    cache_seqlens: int | Tensor | None,
) -> FlashAttnCache:
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"v_cache must have the shape of k_cache, {list(k_cache.shape)}, "
            f"got {list(v_cache.shape)}"
        )
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx and block_table must not come together")
        _check_indices("cache_batch_idx", cache_batch_idx, 1, q)
        _check_pages("cache_batch_idx", cache_batch_idx, k_cache)
        block_table = cache_batch_idx[:, None]  # rows are pages too, one each
    elif block_table is not None:
        _check_indices("block_table", block_table, 2, q)
    elif len(k_cache) < len(q):
        raise ValueError(
            f"k_cache must have a row for each of {len(q)} sequences, got {len(k_cache)}"
        )
    else:
        k_cache, v_cache = k_cache[: len(q)], v_cache[: len(q)]
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths, longest = _lengths(q, room if cache_seqlens is None else cache_seqlens)
    return FlashAttnCache(k_cache, v_cache, block_table, room, lengths, longest)


def _check_indices(name: str, given: object, ndim: int, q: Tensor) -> None:
    """Integers for each of q's sequences."""
    x = check_tensor(name, given, ndim)
    check_integral(name, x)
    if len(x) != len(q) or x.device != q.device:
        raise ValueError(
            f"{name} must have a row for each of {len(q)} sequences on {q.device}, "
            f"got {list(x.shape)} on {x.device}"
        )


def _lengths(q: Tensor, cache_seqlens: int | Tensor) -> tuple[Tensor, int | None]:
    """[B] int32 counts of the keys in the cache, and the largest, if the host need not wait."""
    if not isinstance(cache_seqlens, Tensor):
        if not is_count(cache_seqlens):
            raise ValueError(f"cache_seqlens must be a count of keys, got {cache_seqlens!r}")
        lengths = torch.full((len(q),), cache_seqlens, dtype=torch.int32, device=q.device)
        return lengths, cache_seqlens
    _check_indices("cache_seqlens", cache_seqlens, 1, q)
    lengths = cache_seqlens.int()
    if not _on_host(lengths) or not len(q):
        return lengths, None
    shortest, longest = (int(x) for x in cache_seqlens.aminmax())
    if shortest < 0:
        raise ValueError(f"cache_seqlens must be counts of keys, got {shortest}")
    return lengths, longest


def _on_host(x: Tensor) -> bool:
    """Whether values can be looked at: not on a device, and not by the compiler."""
    return x.is_cpu and not torch.compiler.is_compiling()


def _check_pages(name: str, pages: Tensor, cache: Tensor) -> None:
    if _on_host(pages) and ((pages < 0) | (pages >= len(cache))).any():
        raise ValueError(f"{name} must lie in 0..{len(cache) - 1}, got {pages.tolist()}")


def count_new(q: Tensor, k_cache: Tensor, k: Tensor | None, v: Tensor | None) -> int:
    """How many keys each sequence appends."""
    if (k is None) != (v is None):
        raise ValueError("k and v must come together or not")
    if k is None:
        return 0
    want = [len(q), check_tensor("k", k, 4).shape[1], *k_cache.shape[2:]]
    for name, given in (("k", k), ("v", v)):
        x = check_tensor(name, given, 4)
        if x.dtype != k_cache.dtype:
            raise TypeError(f"{name} must have k_cache's dtype, {k_cache.dtype}, got {x.dtype}")
        if list(x.shape) != want or x.device != k_cache.device:
            raise ValueError(
                f"{name} must be {want} on {k_cache.device}, got {list(x.shape)} on {x.device}"
            )
    return k.shape[1]
