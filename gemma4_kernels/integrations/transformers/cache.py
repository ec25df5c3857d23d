"""transformers' static cache, as a step of decoding writes and reads it."""

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer


class RingLayer(StaticSlidingWindowLayer):
    """A layer of a window's size where a step writes over the oldest key and moves no other.

    Its parent moves all of them. Slot 0 held the oldest key when `since` tokens had been cached;
    None while keys lie in their parent's order. Whoever looks at `keys` or `values` finds them in
    that order again. cumulative_length, on the device, is the next token's slot, modulo their
    number, and no less than that once all are full.
    """

    since: int | None = None
    ring_keys: Tensor
    ring_values: Tensor

    @property
    def keys(self) -> Tensor:
        self.put_in_order()
        return self.ring_keys

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self.ring_keys = keys

    @property
    def values(self) -> Tensor:
        self.put_in_order()
        return self.ring_values

    @values.setter
    def values(self, values: Tensor) -> None:
        self.ring_values = values

    def put_in_order(self) -> None:
        if self.since is None:
            return
        turned = (self.cumulative_length_int - self.since) % self.max_cache_len
        self.since = None
        for x in (self.ring_keys, self.ring_values):
            x.copy_(x.roll(-turned, 2))
        self.cumulative_length.fill_(self.max_cache_len)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.put_in_order()  # before its parent counts
        before, slots = self.cumulative_length_int, self.max_cache_len
        kept = super().update(key_states, value_states, *args, **kwargs)
        if before < slots <= self.cumulative_length_int:
            self.cumulative_length.fill_(slots)
        return kept

    def wrote_one(self) -> None:
        """A step has written a key, and cumulative_length is still to say so."""
        if self.since is None and self.cumulative_length_int >= self.max_cache_len:
            self.since = self.cumulative_length_int
        self.cumulative_length_int += 1

    def reset(self) -> None:
        super().reset()
        self.since = None


def make_ring(layer: object) -> None:
    """Turns a sliding layer of a static cache into a ring, which holds what it held."""
    if type(layer) is not StaticSlidingWindowLayer:
        return
    keys, values = layer.__dict__.pop("keys"), layer.__dict__.pop("values")
    layer.__class__ = RingLayer
    layer.keys, layer.values = keys, values
    if layer.is_initialized and layer.cumulative_length_int >= layer.max_cache_len:
        layer.cumulative_length.fill_(layer.max_cache_len)


def stored(layer: StaticLayer) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, C] as they lie."""
    if isinstance(layer, RingLayer):
        return layer.ring_keys, layer.ring_values
    assert layer.keys is not None and layer.values is not None  # it is initialized
    return layer.keys, layer.values


def as_pages(x: Tensor) -> Tensor:
    """[B, G, S, C] as pages of one slot, [N, 1, G, C]: slot s of row b is page b G S + s."""
    batch, heads, slots, channels = x.shape
    pages = ((batch - 1) * heads + 1) * slots
    return x.as_strided((pages, 1, heads, channels), (channels, channels, slots * channels, 1))


def pages_of(layer: StaticLayer, counts_B: Tensor) -> Tensor:
    """Of each row's `counts` newest keys, with the one that is to be written, the pages [B, S]."""
    batch, heads, slots, _ = stored(layer)[0].shape
    places = torch.arange(slots, dtype=torch.int32, device=counts_B.device)
    rows = torch.arange(batch, dtype=torch.int32, device=counts_B.device) * (heads * slots)
    slot_BS = (layer.cumulative_length + 1 - counts_B[:, None] + places) % slots
    return rows[:, None] + slot_BS
