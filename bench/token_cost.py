"""What one decoded token costs at batch 1, on four cards: arithmetic, nothing measured.

    python bench/token_cost.py    # all five models; no GPU is needed

    seconds = weights / rate + attention + launches * cost of one
    attention = the largest of keys and values / rate and of a block's turns, layer by layer

The rate is a part of what copies reach. Launches, and the blocks that share a layer's keys, are
those that the emulator counts for that card (see launches.py); bytes are the shapes'.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import launches
import limits
import paths  # noqa: F401
import torch
from estimates import ITERATION, LAUNCH, STREAMED
from support import emulated

from gemma4 import Gemma4ForCausalLM
from gemma4.config import FULL, SLIDING
from gemma4.measure import decode_bytes
from gemma4.presets import RELEASED

CONTEXTS = (1024, 32768)

# Of a launch, dependent ones save up to 0.96 µs (pegainfer#569).
DEPENDENT_LAUNCH = 0.8e-6
# What of a card's memory is left by its driver, its context and the allocator.
USABLE = 0.95
# Copies of the nominal bandwidth of a card: 3.0 of 3.35 TB/s are measured on the H100.
COPIED = limits.DRAM / 3.35e12


@dataclass(frozen=True)
class Card:
    """As its data sheet has it."""

    name: str
    nominal: float  # bytes a second
    memory: float  # bytes
    multiprocessors: int
    smem_kb: int  # of a block
    dependent: bool  # has dependent launches

    @property
    def copies(self) -> float:
        return self.nominal * COPIED


CARDS = (
    Card("H100 SXM", 3.35e12, 80 << 30, 132, 227, True),
    Card("A100 SXM", 2.039e12, 80 << 30, 108, 163, False),
    Card("RTX 4090", 1.008e12, 24 << 30, 128, 99, False),
    Card("RTX 5090", 1.792e12, 32 << 30, 170, 99, True),
)


@dataclass(frozen=True)
class Step:
    """One decoding step of a model on a card, over so many keys."""

    model: str
    keys: int
    launches: int
    turns: dict[str, int]  # of attention's longest block, by the layer's kind

    def key_bytes(self, kind: str) -> int:
        return limits.attention_bytes(self.model, kind, 1, self.keys)

    @property
    def all_key_bytes(self) -> int:
        return sum(map(self.key_bytes, limits.MODELS[self.model].layer_types))

    def floor(self, card: Card) -> float:
        """Seconds that no step can do without."""
        return (weight_bytes(self.model)[0] + self.all_key_bytes) / card.copies

    def seconds(self, card: Card, launch: float) -> float:
        rate = STREAMED * card.copies
        attention = sum(
            max(self.key_bytes(kind) / rate, self.turns[kind] * ITERATION)
            for kind in limits.MODELS[self.model].layer_types
        )
        return weight_bytes(self.model)[0] / rate + attention + self.launches * launch

    def fits(self, card: Card) -> bool:
        """Whether the weights and the keys of this context do."""
        c = limits.MODELS[self.model]
        owners = {c.kv_owner(i) for i in range(c.num_hidden_layers)}
        cached = sum(self.key_bytes(c.layer_types[i]) for i in owners)
        return weight_bytes(self.model)[1] + cached <= USABLE * card.memory


def weight_bytes(model: str) -> tuple[int, int]:
    """Of what a step reads, and of all."""
    if model not in _weight_bytes:
        with torch.device("meta"):
            whole = Gemma4ForCausalLM(limits.MODELS[model]).to(torch.bfloat16)
        _weight_bytes[model] = decode_bytes(whole), limits.BYTES * whole.num_parameters()
    return _weight_bytes[model]


_weight_bytes: dict[str, tuple[int, int]] = {}


def turns(model: str, kind: str, keys: int, card: Card) -> int:
    """Of a block of `attention_decode`: its tiles of keys, and one to merge if others share them.

    The emulator is given a cache of `keys` slots, by which a launch is planned, that holds one."""
    c, settings = limits.MODELS[model], emulated.control().settings
    window, size, kv_heads = c.window(kind)[0], c.head_size(kind), c.kv_heads(kind)
    slots = min(keys, window) if window else keys
    settings.sm_count, settings.max_smem_bytes = card.multiprocessors, card.smem_kb * 1024
    q = torch.zeros(1, 1, c.num_attention_heads, size, dtype=torch.bfloat16)
    cache = torch.zeros(1, slots, kv_heads, size, dtype=torch.bfloat16)
    emulated.control().reset_counts()
    settings.profile = True
    with emulated.one_schedule():
        one = torch.ones(1, dtype=torch.int32)
        options = dict(window=window, ring=bool(window), return_lse=False)
        emulated.ops().attention_decode(q, cache, cache, one, **options)
    settings.profile = False
    blocks = emulated.control().counts().launched[0].blocks
    group = c.num_attention_heads // kv_heads
    tile = emulated.control().attention_tile(size, group, card.smem_kb * 1024)["keys"]
    splits = blocks / kv_heads
    return math.ceil(math.ceil(slots / splits) / tile) + (splits > 1)


def steps() -> Iterator[tuple[Step, Card]]:
    """Every model, context and card."""
    emulated.ops()
    settings = emulated.control().settings
    before = settings.sm_count, settings.max_smem_bytes
    for model in RELEASED:
        for keys in CONTEXTS:
            settings.sm_count, settings.max_smem_bytes = launches.MULTIPROCESSORS, before[1]
            total = sum(map(sum, launches.counted(model, keys).values()))
            for card in CARDS:
                walked = {kind: turns(model, kind, keys, card) for kind in (SLIDING, FULL)}
                yield Step(model, keys, total, walked), card
    settings.sm_count, settings.max_smem_bytes = before


def row(step: Step, card: Card) -> dict:
    """Of the static report. Tokens a second are None where the card lacks what they need."""
    fits = step.fits(card)

    def rate(seconds: float, given: bool = True) -> float | None:
        return round(1 / seconds, 1) if fits and given else None

    return {
        "model": step.model,
        "keys": step.keys,
        "card": card.name,
        "launches": step.launches,
        "turns": [step.turns[kind] for kind in (SLIDING, FULL)],
        "weights_gb": round(weight_bytes(step.model)[0] / 1e9, 3),
        "keys_gb": round(step.all_key_bytes / 1e9, 3),
        "floor_tok_s": rate(step.floor(card)),
        "tok_s": rate(step.seconds(card, LAUNCH)),
        "dependent_tok_s": rate(step.seconds(card, DEPENDENT_LAUNCH), card.dependent),
    }


def rows() -> list[dict]:
    return [row(step, card) for step, card in steps()]


if __name__ == "__main__":
    from report import tokens_table

    print(tokens_table(rows()), end="")
