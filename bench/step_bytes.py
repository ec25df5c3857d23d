"""Bytes that a training step moves, beside what no step can do without: counted, nothing measured.

    python bench/step_bytes.py [--models NAME ...] [--by-aten]

The released models in bf16 on the meta device, 4 rows of 2,048 tokens, forward and backward, all
weights trained or PEFT's LoRA of rank 16 on every linear layer. There the dispatcher sees each op
as a GPU would be given it: an op reads its inputs once and writes its outputs once. The floor is
that of `floor`, from the config alone: every tensor once. The optimizer is left out of both.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig
from gemma4_kernels.opset import Op

BATCH, LENGTH, RANK = 4, 2048, 16
MODELS = ("E4B", "12B", "26B-A4B")
PRODUCTS = ("mm", "addmm", "addmm_", "bmm")


def touched(x: Tensor) -> int:
    """Bytes of a tensor; what an expanded dimension repeats counts once."""
    if not x.numel():
        return 0
    repeats = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        repeats *= size if stride == 0 else 1
    return x.numel() // repeats * x.element_size()


class Moved(TorchDispatchMode):
    """Bytes read and written, by what did it: an op of ours (and what autograd makes of its twin),
    the matrix products, or another op by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.by: str | None = None

    @contextmanager
    def watching(self) -> Iterator["Moved"]:
        differentiate = Op._differentiate_twin

        def named(op: Op, *args: Any) -> Any:
            self.by = f"{op.name}_backward"
            try:
                return differentiate(op, *args)
            finally:
                self.by = None

        with mock.patch.object(Op, "_differentiate_twin", named), self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes[self.by or part(func)] += moved(func, args, kwargs or {}, result)
        return result


def part(func: Any) -> str:
    name = func.overloadpacket.__name__
    return "products" if name in PRODUCTS else name


def moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """What a call reads and writes, were each tensor in no cache."""
    name = func.overloadpacket.__name__
    if name.startswith(("empty", "new_empty", "_unsafe_view")):
        return 0
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if name in ("embedding", "ple_embed"):  # of a table only the rows that are looked up
        tensors[0 if name == "embedding" else 1] = made[0]
    if name == "ple_gate":  # of the inputs of all layers one
        tensors[1] = made[0]
    if name in ("zeros", "new_zeros", "zeros_like", "full_like", "fill_", "zero_"):
        tensors = []
    return sum(map(touched, (*tensors, *made)))


def model_of(name: str, lora: bool) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = Gemma4ForCausalLM(Gemma4TextConfig.preset(name)).to(torch.bfloat16)
        if lora:
            import peft

            config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, config).to(torch.bfloat16)
    return model.train()


def counted(name: str, lora: bool) -> Counter[str]:
    model = model_of(name, lora)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
    with Moved().watching() as moved:
        model(input_ids=ids, labels=ids).loss.backward()
    return moved.bytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=MODELS)
    for name in parser.parse_args().models:
        for lora in (False, True):
            found = counted(name, lora)
            total = sum(found.values())
            print(name, "LoRA" if lora else "full", round(total / 1e9, 1))
            for k, v in found.most_common(24):
                print(f"   {k:40} {v / 1e9:9.2f} {100 * v / total:5.1f}%")
