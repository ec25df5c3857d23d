"""The plan of one forward: where its tokens stand, where their keys go, what attention reads.

There are three. `PackedPlan` has no cache; `CachePlan` writes any number of tokens of each row into
one; `DecodePlan` writes one token a row, again and again, with nothing left to the host. A layer
hands q, k and v to `write` (or normed and rotated k and v to `store`) and attends to the keys that
come back.
"""

from dataclasses import replace
from itertools import accumulate
from typing import NoReturn, TypeGuard

import torch
from torch import Tensor, nn

from gemma4_kernels import ops
from gemma4_kernels.common import DECODE_TOKENS
from gemma4_kernels.e4m3 import from_e4m3, to_e4m3
from gemma4_kernels.fusion import Classes, M, is_plain, why_not_fused
from gemma4_kernels.joined import joined
from gemma4_kernels.ops.decode import MOST_GROUP
from gemma4_kernels.packed import Weight
from gemma4_kernels.reference.decode import COUNTERS

from .cache import PAGE_SIZE, Cache
from .keys import CachedKeys, CodedKeys, Keys, PackedKeys, Slots, held
from .layout import Layout, cumulative


class PackedPlan:
    """Tokens that attend to one another alone.

    inv_freq: what ops turn by, [C / 2] of each layer kind; or rotation, cosines and sines [T, C] of
    each, of a rotary embedding that had to be called. keys: what later layers share, by owner.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.inv_freq: dict[str, Tensor] = {}
        self.rotation: dict[str, tuple[Tensor, Tensor]] | None = None
        self.keys: dict[int, Keys] = {}

    def plain(
        self,
        module: nn.Module,
        cls: type[M] | tuple[type[M], ...],
        device: torch.device | None = None,
    ) -> TypeGuard[M]:
        """Whether a fused op may stand in for `module` (see `gemma4_kernels.fusion`)."""
        return is_plain(module, cls, device)

    def whole(self, module: nn.Module, cls: Classes) -> bool:
        """The same of the module and all its parts."""
        return why_not_fused(module, cls) is None

    def joined(self, *linears: nn.Linear) -> tuple[Weight, Tensor | None] | None:
        """As `gemma4_kernels.joined`."""
        return joined(*linears)

    def call(self, module: nn.Module, cls: Classes, x: Tensor) -> Tensor:
        """module(x) for packed x [T, ...]; what is not plain sees [B, S, ...]."""
        return module(x) if self.whole(module, cls) else self.layout.call(module, x)

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
        """Norms and rotates q, k and v and stores k and v; returns q and the keys it attends to."""
        args = (q, k, v, q_weight, k_weight, self.layout.positions, inv_freq)
        if (target := self.target(layer)) is not None:
            to, keys = target
            cache, (k_scales, v_scales) = (to.k, to.v, to.slots), to.scales
            q = ops.qkv_norm_rope_cache(*args, *cache, eps, k_scales=k_scales, v_scales=v_scales)
            return q, keys
        q, made_k, made_v = ops.qkv_norm_rope(*args, eps)
        assert made_k is not None and made_v is not None  # as k is
        return q, self.store(layer, made_k, made_v)

    def target(self, layer: int) -> tuple[Slots, Keys] | None:
        """The slots that `write` fills at once, and the row's keys as they lie in the cache then;
        None where there are none, or where the keys have to be read before they are stored."""
        return None

    def store(self, layer: int, k: Tensor, v: Tensor) -> Keys:
        """Stores normed and rotated k and v; returns the keys to attend to."""
        return PackedKeys(k, v, self.layout.cu_seqlens_k, self.layout.max_seqlen_k)

    def keep(self, layout: Layout, chosen: Tensor) -> None:
        """From here on the `chosen` tokens alone go on, which lie as `layout` says."""
        self.layout = layout
        if self.rotation is not None:
            tables = self.rotation.items()
            self.rotation = {kind: (cos[chosen], sin[chosen]) for kind, (cos, sin) in tables}

    def finish(self) -> None:
        """Every layer has run."""


class CachePlan(PackedPlan):
    """With gradients the cache must be empty: attention then reads the tokens' own keys, and the
    cache is given copies that belong to no graph."""

    def __init__(self, layout: Layout, cache: Cache):
        super().__init__(layout)
        # Of keys that an earlier forward cached nothing is known but their values.
        self.stale = any(cache.lengths)
        self.training = torch.is_grad_enabled() and not self.stale
        cache.make_room(layout.totals)
        self.cache, self.totals, self.columns = cache, layout.totals, layout.shape[1]
        length = layout.uniform_length
        few = length is not None and 0 < length <= min(DECODE_TOKENS, cache.rollback + 1)
        self.decoding = few and not self.training
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

    def target(self, layer: int) -> tuple[Slots, Keys] | None:
        if self.training or (self.cache.is_ring(layer) and not self.decoding):
            return None
        return self._into(layer), self._cached(layer)

    def _into(self, layer: int) -> Slots:
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        scales = self.cache.scales(layer)
        return Slots(k_cache, v_cache, scales, self.slots(k_cache.shape[1]))

    def store(self, layer: int, k: Tensor, v: Tensor) -> Keys:
        if (target := self.target(layer)) is not None:
            slots, keys = target
            slots.fill(k, v)
            return keys
        keys = self._join(layer, k, v)  # before the ring's slots are written over
        self._copy(layer, k.detach(), v.detach())
        return keys

    def _cached(self, layer: int) -> Keys:
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        scales, layout, table = self.cache.scales(layer), self.layout, self.cache.block_table
        if self.seq_lens is not None:
            return CachedKeys(k_cache, v_cache, scales, self.seq_lens, self.cache.is_ring(layer))
        if scales[0] is not None:
            keys = scales, self.totals, layout.cu_seqlens_k, self.cache.model_dtype
            return CodedKeys(k_cache, v_cache, *keys)
        pages = (-1, PAGE_SIZE, *k_cache.shape[2:])
        return PackedKeys(
            k_cache.view(pages),
            v_cache.view(pages),
            layout.cu_seqlens_k,
            layout.max_seqlen_k,
            table,
        )

    def _join(self, layer: int, k: Tensor, v: Tensor) -> Keys:
        """The last window - 1 cached keys of each row before its new ones, as a cache has them."""
        layout, (k_scales, v_scales) = self.layout, self.cache.scales(layer)
        if k_scales is not None and not self.training:
            k, v = (from_e4m3(*to_e4m3(x), x.dtype) for x in (k, v))
        if not any(layout.pasts):
            return super().store(layer, k, v)
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        ends, slots = [0, *accumulate(layout.lengths)], k_cache.shape[1]
        ks, vs, lengths = [], [], []
        for row, past in enumerate(layout.pasts):
            tail = torch.arange(max(0, past - self.cache.window + 1), past).remainder(slots)
            tail = tail.to(k.device)
            new = slice(ends[row], ends[row + 1])
            ks += [held(k_cache, k_scales, row, tail, k.dtype), k[new]]
            vs += [held(v_cache, v_scales, row, tail, v.dtype), v[new]]
            lengths.append(len(tail) + layout.lengths[row])
        return PackedKeys(torch.cat(ks), torch.cat(vs), cumulative(lengths, k.device), max(lengths))

    def _copy(self, layer: int, k: Tensor, v: Tensor) -> None:
        """The new tokens into their slots; of a run longer than a ring only its last ones."""
        into, layout = self._into(layer), self.layout
        slots = into.k.shape[1]
        if layout.max_seqlen_q > slots:
            ends = accumulate(layout.lengths)
            last = torch.cat(
                [
                    torch.arange(end - min(length, slots), end)
                    for end, length in zip(ends, layout.lengths, strict=True)
                ]
            ).to(k.device)
            k, v, into = k[last], v[last], replace(into, slots=into.slots[last])
        into.fill(k, v)

    def finish(self) -> None:
        """Makes the tokens count."""
        self.cache.count(self.totals, self.columns)


class DecodePlan(PackedPlan):
    """One more token for each row, as often as wanted.

    Positions and lengths lie in one device tensor that `finish` moves on in place: every step reads
    the same addresses, so that one CUDA graph serves all lengths. The cache's own counts, on
    the host, are left to `Cache.count_one`. Which modules are plain, and where joined weights lie,
    is asked in the first step and holds for all of them, as it must for a graph.
    """

    def __init__(self, cache: Cache):
        rows, device = cache.batch_size, cache.device
        lengths = torch.tensor(cache.lengths, dtype=torch.int32, device=device)
        self.now_2B = torch.stack([lengths, lengths + 1])
        positions, seq_lens = self.now_2B
        every = cumulative([1] * rows, device)
        layout = Layout(
            shape=(rows, 1),
            rows=list(range(rows)),
            columns=[0] * rows,
            lengths=[1] * rows,
            pasts=list(cache.lengths),
            positions=positions,
            index=None,
            cu_seqlens_q=every,
            cu_seqlens_k=every,
        )
        super().__init__(layout)
        self.cache, self.positions, self.seq_lens = cache, positions, seq_lens
        self.cached = {
            layer: CachedKeys(
                k, cache.v[layer], cache.scales(layer), seq_lens, cache.is_ring(layer)
            )
            for layer, k in cache.k.items()
        }
        self.keys = dict(self.cached)
        self.counters = {
            kv_heads: torch.zeros(rows, kv_heads, COUNTERS, dtype=torch.int32, device=device)
            for kv_heads in {k.shape[2] for k in cache.k.values()}
        }
        self._slots: dict[int, Tensor] = {}  # of this step
        self.fitting: dict[int, bool] = {}  # of decode_layers.py
        self._plain: dict[int, bool] = {}
        self._whole: dict[int, bool] = {}
        self._joined: dict[int, tuple[Weight, Tensor | None] | None] = {}

    # mypy does not see that a generic TypeGuard overrides its like.
    def plain(  # type: ignore[override]
        self,
        module: nn.Module,
        cls: type[M] | tuple[type[M], ...],
        device: torch.device | None = None,
    ) -> TypeGuard[M]:
        answer = self._plain.get(id(module))
        if answer is None:
            answer = self._plain[id(module)] = is_plain(module, cls, device)
        return answer

    def whole(self, module: nn.Module, cls: Classes) -> bool:
        answer = self._whole.get(id(module))
        if answer is None:
            answer = self._whole[id(module)] = super().whole(module, cls)
        return answer

    def joined(self, *linears: nn.Linear) -> tuple[Weight, Tensor | None] | None:
        if id(linears[0]) not in self._joined:
            self._joined[id(linears[0])] = joined(*linears)
        return self._joined[id(linears[0])]

    def attends(self, owner: int, q: Tensor) -> bool:
        """Whether `attend` takes such heads of q."""
        kv_heads = self.cached[owner].k.shape[2]
        return q.dtype == self.cache.model_dtype and q.shape[1] <= MOST_GROUP * kv_heads

    def attend(
        self,
        owner: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        q_weight: Tensor,
        k_weight: Tensor | None,
        inv_freq: Tensor,
        eps: float,
        window: int,
    ) -> Tensor:
        """`write` and attention in one: [B, H, C], over the keys of `owner`."""
        keys = self.cached[owner]
        args = (q, k, v, q_weight, k_weight, self.positions, inv_freq)
        cache, counters = (keys.k, keys.v, self.seq_lens), self.counters[keys.k.shape[2]]
        k_scales, v_scales = keys.scales
        return ops.qkv_attention_decode(
            *args,
            *cache,
            counters=counters,
            eps=eps,
            window=window,
            ring=keys.ring,
            k_scales=k_scales,
            v_scales=v_scales,
        )

    def target(self, layer: int) -> tuple[Slots, Keys]:
        keys = self.cached[layer]
        return Slots(keys.k, keys.v, keys.scales, self.slots(keys.k.shape[1])), keys

    def slots(self, per_row: int) -> Tensor:
        """The slot of each new token in rows of `per_row` slots, where a layer asks for it."""
        if per_row not in self._slots:
            first = torch.arange(self.positions.shape[0], device=self.positions.device) * per_row
            self._slots[per_row] = first + self.positions % per_row
        return self._slots[per_row]

    def store(self, layer: int, k: Tensor, v: Tensor) -> Keys:
        slots, keys = self.target(layer)
        slots.fill(k, v)
        return keys

    def finish(self, tokens: int = 1) -> None:
        self.now_2B.add_(tokens)
        self._slots.clear()

    def rewind(self) -> None:
        """Takes back the last `finish`: the next step writes the same slots."""
        self.finish(-1)


class _NoGradient(torch.autograd.Function):
    """Passes a tensor on and refuses its gradient by name."""

    @staticmethod
    def forward(ctx: object, x: Tensor, _: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> NoReturn:
        raise RuntimeError(
            "a forward over a cache that holds tokens has no gradient: give the whole sequence at "
            "once, with an empty cache or none"
        )


def refuse_gradient(x: Tensor) -> Tensor:
    """x, whose gradient the backward refuses by name: it comes of a stale plan."""
    refused: Tensor = _NoGradient.apply(x, torch.empty(0, requires_grad=True))
    return refused
