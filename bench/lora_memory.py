"""What a LoRA step holds in memory, by a formula: arithmetic, nothing measured.

    python bench/lora_memory.py [--tokens N]    # the table of README.md

Weights, adapters with AdamW in bf16, what the forward keeps for the backward (with PEFT's LoRA of
step_bytes.py; of a layer alone where checkpoints let go of the rest), and the logits of the tokens
whose loss is made at once (skip_logits). Not in it: what one op of the backward has in hand, the
CUDA context, what the allocator cannot use.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from step_bytes import BYTES, RANK
from tables import table

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig
from gemma4.config import FULL
from gemma4.loss import LOSS_TOKENS
from gemma4.presets import RELEASED

TOKENS = 8192
# Of one adapter's number: itself, its gradient, and AdamW's two moments.
TRAINED = 4 * BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: int
    adapters: int
    kept: int
    kept_with_checkpoints: int
    loss: int

    def total(self, *, checkpoints: bool) -> int:
        kept = self.kept_with_checkpoints if checkpoints else self.kept
        return self.weights + self.adapters + kept + self.loss


def linears(c: Gemma4TextConfig, index: int) -> Iterator[tuple[int, int]]:
    """Inputs and outputs of a layer's adapted linears."""
    width, hidden, kind = c.hidden_size, c.mlp_width(index), c.layer_types[index]
    heads, kv = (n * c.head_size(kind) for n in (c.num_attention_heads, c.kv_heads(kind)))
    yield from ((width, heads), (heads, width))
    if c.kv_owner(index) == index:
        yield from [(width, kv)] * (1 if c.attention_k_eq_v and kind == FULL else 2)
    yield from ((width, hidden), (width, hidden), (hidden, width))


def layer_values(c: Gemma4TextConfig, index: int) -> int:
    """Values a token that a layer keeps; an fp32 one counts twice.

    D of each norm's input and output, of the PLE branch and of the experts' branch; q, k and v
    before and behind their norms, attention's output and log-sum-exp; gate, up and their product;
    the inner rows of the adapters.
    """
    kind, width, ple = c.layer_types[index], c.hidden_size, c.hidden_size_per_layer_input
    size, heads, kv_heads = c.head_size(kind), c.num_attention_heads, c.kv_heads(kind)
    kv = 0
    if c.kv_owner(index) == index:
        kv = (3 if c.attention_k_eq_v and kind == FULL else 4) * kv_heads
    kept = 6 * width + (3 * heads + kv) * size + 2 * heads + 3 * c.mlp_width(index)
    kept += RANK * len(list(linears(c, index)))
    if ple:
        kept += 2 * width + ple
    if c.enable_moe_block:
        experts, chosen, _ = c.expert_sizes
        kept += 3 * width + experts + 2 * 2 * chosen  # logits, and fp32 weights and numbers
    return kept


def memory(c: Gemma4TextConfig, weights: int, tokens: int = TOKENS) -> Memory:
    """Of a model whose weights take so many bytes."""
    count, width = c.num_hidden_layers, c.hidden_size
    layers = [layer_values(c, index) for index in range(count)]
    # The head's input, its gradient, and what all layers read.
    others = 2 * width + count * c.hidden_size_per_layer_input
    # A checkpoint keeps the residual and its norm; keys that later layers borrow stay.
    inputs, shared = 2 * width * count, 0
    owners = {c.kv_owner(i) for i in range(count) if c.kv_owner(i) != i}
    for owner in owners:
        kind = c.layer_types[owner]
        shared += 2 * c.kv_heads(kind) * c.head_size(kind)
    numbers = sum(RANK * sum(pair) for i in range(count) for pair in linears(c, i))
    row = BYTES * tokens
    return Memory(
        weights=weights,
        adapters=TRAINED * numbers,
        kept=row * (sum(layers) + others),
        kept_with_checkpoints=row * (inputs + shared + max(layers) + others),
        loss=BYTES * min(tokens, LOSS_TOKENS) * c.vocab_size,
    )


def released(name: str, tokens: int = TOKENS) -> Memory:
    config = Gemma4TextConfig.preset(name)
    with torch.device("meta"):
        model = Gemma4ForCausalLM(config)
    return memory(config, BYTES * model.num_parameters(), tokens)


def page(tokens: int = TOKENS) -> str:
    lines = []
    for name in RELEASED:
        m = released(name, tokens)
        sums = (m.total(checkpoints=c) for c in (False, True))
        parts = m.weights, m.adapters, m.kept, m.kept_with_checkpoints, m.loss, *sums
        lines.append((name, *(f"{part / 1e9:.1f}" for part in parts)))
    kept = "activations", "checkpointed"
    return table(("", "weights", "adapters", *kept, "logits", "all", "checkpointed"), lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    print(page(parser.parse_args().tokens), end="")
