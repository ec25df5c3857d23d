"""Bytes that a training step moves, beside the fewest that do: counted, nothing measured.

    python bench/step_bytes.py    # makes bench/results/step_bytes.md; no GPU is needed

A step is forward and backward of a released model in bf16, of 4 rows of 2,048 tokens, with all
weights trained or with PEFT's LoRA, for the loss alone (skip_logits=True); the optimizer is left
out. It runs on the meta device, where
the dispatcher is given what a GPU with kernels would be: each op reads its inputs and writes its
outputs once, what has no kernel counts op by op of torch. Of the floor every number comes from the
config: a tensor is read once by what is one op or one product at best, and written once.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tables import table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig
from gemma4.config import FULL
from gemma4_kernels.opset import Op

RESULT = Path(__file__).parent / "results" / "step_bytes.md"
MODELS = ("E4B", "12B", "26B-A4B")
BATCH, LENGTH, BYTES = 4, 2048, 2
TOKENS = BATCH * LENGTH
RANK = 16
# What recipes adapt; the router, the head and PLE's linears stay as they are.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT = "PEFT's own"

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "_grouped_mm")
UNTOUCHED = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "_reshape_alias")
FILLS = ("zeros", "zeros_like", "new_zeros", "full", "full_like", "zero_", "fill_")
# Ops that are given a table, and read what they put out of it: the table's place.
LOOKUPS = {"embedding": 0, "ple_embed": 1, "ple_gate": 1, "ple_gate_backward": 2}


class Moved(TorchDispatchMode):
    """Bytes read and written by what an op of ours does (also where its twin is differentiated),
    by matrix products, and by every other op under its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._differentiated: str | None = None

    @contextmanager
    def watching(self) -> Iterator["Moved"]:
        differentiate = Op.differentiate_twin

        def named(op: Op, *args: Any) -> Any:
            self._differentiated = f"{op.name}_backward"
            try:
                return differentiate(op, *args)
            finally:
                self._differentiated = None

        with mock.patch.object(Op, "differentiate_twin", named), self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            name = func.overloadpacket.__name__
            part = self._differentiated or ("products" if name in PRODUCTS else name)
            self.bytes[part] += moved(name, [*args, *(kwargs or {}).values()], result)
        return result


def moved(name: str, args: Sequence[Any], result: Any) -> int:
    """What one call reads and writes, were nothing in a cache."""
    if name in UNTOUCHED:
        return 0
    made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    given = [] if name in FILLS else list(args)
    if name in LOOKUPS:
        given[LOOKUPS[name]] = made[0]
    return sum(touched(x) for x in [*tree_leaves(given), *made] if isinstance(x, Tensor))


def touched(x: Tensor) -> int:
    """Bytes of a tensor; what an expanded dimension repeats counts once."""
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n]
    return math.prod(sizes) * x.element_size()


def model_of(name: str, *, lora: bool) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = Gemma4ForCausalLM(Gemma4TextConfig.preset(name)).to(torch.bfloat16)
        if lora:
            import peft

            config = peft.LoraConfig(r=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, config).to(torch.bfloat16)
    return model.train()


def counted(name: str, *, lora: bool) -> Counter[str]:
    """Of a step, by part; what PEFT's modules do beside the layer that they adapt is a part."""
    model = model_of(name, lora=lora)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
    with Moved().watching() as moved:
        model(input_ids=ids, labels=ids, skip_logits=True).loss.backward()
    by = moved.bytes
    if lora:
        adapters = Floor(name, lora=True).adapters
        by.subtract(adapters)
        by[PEFT] = adapters.total()
    return by


class Floor:
    """The fewest bytes of a step, by part."""

    def __init__(self, name: str, *, lora: bool) -> None:
        self.lora, self.bytes, self.adapters = lora, Counter[str](), Counter[str]()
        c = self.config = Gemma4TextConfig.preset(name)
        width, vocabulary, ple = c.hidden_size, c.vocab_size, c.hidden_size_per_layer_input
        # Nothing before the first adapter has a gradient.
        self._rows("embedding", 2 * width)
        self._norm(width, backward=not lora)
        for index in range(c.num_hidden_layers):
            self._layer(index)
        if ple:
            rows = c.num_hidden_layers * ple
            self._product(width, [rows], backward=not lora)
            self._rows("ple_embed", 3 * rows, 0 if lora else 3 * rows)
            table = c.vocab_size_per_layer_input * rows
            self.bytes["ple_embed_backward"] += 0 if lora else BYTES * table
        self._product(width, [vocabulary])
        self._rows("softcap_cross_entropy", vocabulary, 2 * vocabulary)
        self.bytes[PEFT] = self.adapters.total()

    def _layer(self, index: int) -> None:
        c = self.config
        width, ple, kind = c.hidden_size, c.hidden_size_per_layer_input, c.layer_types[index]
        size, heads, kv_heads = c.head_size(kind), c.num_attention_heads, c.kv_heads(kind)
        given = made = 0  # heads of keys and values
        if c.kv_owner(index) == index:
            made = 2 * kv_heads
            given = kv_heads if c.attention_k_eq_v and kind == FULL else made
        kv = [kv_heads * size] * (given // kv_heads)
        before = not self.lora or index > 0
        self._product(width, [heads * size, *kv], adapted=True, backward=before)
        rows = 2 * heads + given + made
        self._rows("qkv_norm_rope", rows * size, (rows + heads + given) * size)
        rows = 2 * heads + 2 * kv_heads
        self._rows("attention_prefill", rows * size, 2 * rows * size)
        self._product(heads * size, [width], adapted=True)
        self._close(opens=True, scaled=False)
        self._gated_mlp(c.mlp_width(index))
        if c.enable_moe_block:
            self._experts()
        if ple:
            self._close(opens=False, scaled=False)
            self._product(width, [ple])
            self._rows("ple_gate", 3 * ple, (4 if self.lora else 5) * ple)
            self._product(ple, [width])
        self._close(opens=True, scaled=True)

    def _gated_mlp(self, hidden: int) -> None:
        width = self.config.hidden_size
        self._product(width, [hidden, hidden], adapted=True)
        self._rows("ple_gate", 3 * hidden, 5 * hidden)
        self._product(hidden, [width], adapted=True)

    def _experts(self) -> None:
        """Weights once forward and once backward, and their gradients once if wanted."""
        width, (experts, _, hidden) = self.config.hidden_size, self.config.expert_sizes
        weights = BYTES * experts * 3 * width * hidden
        self._rows("moe_norm", 3 * width, 4 * width)
        self._product(width, [experts])
        self._rows("moe_experts", 2 * width, 3 * width)
        self.bytes["moe_experts"] += weights
        self.bytes["moe_experts_backward"] += weights * (1 if self.lora else 2)
        self._norm(width)
        self._close(opens=False, scaled=False)

    def _norm(self, width: int, *, backward: bool = True) -> None:
        self._rows("rms_norm", 2 * width, 3 * width if backward else 0)

    def _close(self, *, opens: bool, scaled: bool) -> None:
        """add_rms_norm with or without a second norm. Without that and a scale the residual's
        gradient is the one that came."""
        backward = 6 if opens else 4 if scaled else 3
        width = self.config.hidden_size
        self._rows("add_rms_norm", (4 if opens else 3) * width, backward * width)

    def _rows(self, op: str, forward: int, backward: int = 0) -> None:
        """Values a token."""
        self.bytes[op] += BYTES * TOKENS * forward
        self.bytes[f"{op}_backward"] += BYTES * TOKENS * backward

    def _product(
        self, inputs: int, outputs: list[int], *, adapted: bool = False, backward: bool = True
    ) -> None:
        """x Wᵀ of weights that read the same x; backward: x has a gradient."""
        columns = sum(outputs)
        once = BYTES * (TOKENS * (inputs + columns) + inputs * columns)
        self.bytes["products"] += once * (1 + backward + (not self.lora))
        if self.lora and adapted:
            for n in outputs:
                self._adapter(inputs, n, backward=backward)

    def _adapter(self, inputs: int, outputs: int, *, backward: bool) -> None:
        """y + (x Aᵀ) Bᵀ s as PEFT calls it: two products, a factor, a sum, and their gradients."""
        x, y, h = (BYTES * TOKENS * n for n in (inputs, outputs, RANK))
        a, b = BYTES * RANK * inputs, BYTES * RANK * outputs
        down, up = x + a + h, h + b + y
        self.adapters["products"] += down * (2 + backward) + 3 * up
        self.adapters["mul"] += 2 * y + 2 * y
        self.adapters["add"] += 3 * y + (3 * x if backward else 0)


def section(name: str) -> str:
    """A model's table, in GB."""
    columns = [
        by
        for lora in (False, True)
        for by in (Floor(name, lora=lora).bytes, counted(name, lora=lora))
    ]
    floor, all_moved, lora_floor, lora_moved = (by.total() for by in columns)
    names = [
        n for n in sorted(set().union(*columns)) if max(by[n] for by in columns) > floor / 1000
    ]
    names.sort(key=lambda n: -max(by[n] for by in columns[:2]))
    others = (by.total() - sum(by[n] for n in names) for by in columns)
    lines = [[n, *(gigabytes(by[n]) for by in columns)] for n in names]
    lines.append(["others", *map(gigabytes, others)])
    lines.append(["all", *(gigabytes(by.total()) for by in columns)])
    own = columns[2][PEFT]
    said = (
        f"{all_moved / floor:.2f} times the floor, with LoRA {lora_moved / lora_floor:.2f} "
        f"({(lora_moved - own) / (lora_floor - own):.2f} without PEFT's own)"
    )
    head = ("part", "floor", "moved", "LoRA: floor", "moved")
    return f"## {name}: {said}\n\n{table(head, lines)}"


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f}"


def page(models: Sequence[str] = MODELS) -> str:
    return f"""# What a training step moves

Made by `bench/step_bytes.py`: GB read and written by forward and backward of {BATCH} rows of
{LENGTH:,} tokens, in bf16 and for the loss alone (`skip_logits=True`), counted on the meta device
and not measured. An op's inputs and outputs count once, and op by op what has no kernel; the floor
is every tensor once. LoRA is PEFT's, of rank {RANK}, on {len(TARGETS)} kinds of linear layers:
{", ".join(f"`{name}`" for name in TARGETS)}.
What its modules do beside the layer that they adapt is theirs, and stands in the floor as it is.
`add` are sums of gradients.

{chr(10).join(map(section, models))}"""


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    RESULT.write_text(page(), encoding="utf-8")
