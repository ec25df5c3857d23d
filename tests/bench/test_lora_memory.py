"""The formula of a LoRA step's memory, beside what autograd keeps: of the released models on the
meta device, of tiny ones in a real step on the emulated kernels."""

import re
from pathlib import Path

import lora_memory
import peft
import pytest
import step_bytes
import torch
from support import emulated, tiny
from support.marks import needs_compiler
from torch import Tensor, nn

from gemma4 import Gemma4TextConfig
from gemma4_kernels import opset

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def kept_bytes(model: nn.Module, ids: Tensor) -> int:
    """Of all storages that autograd keeps and that no parameter owns."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(input_ids=ids, labels=ids, skip_logits=True).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


@pytest.mark.parametrize("name", ["E4B", "26B-A4B"])
def test_released_models(name: str) -> None:
    model, tokens = step_bytes.model_of(name, lora=True), 4096
    found = kept_bytes(model, torch.zeros(1, tokens, dtype=torch.long, device="meta"))
    said = lora_memory.released(name, tokens)
    assert found == pytest.approx(said.kept, rel=2e-3)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert said.adapters == lora_memory.TRAINED * adapters
    assert said.weights == 2 * (sum(p.numel() for p in model.parameters()) - adapters)


@needs_compiler
@pytest.mark.parametrize("name", ["e_series", "k_eq_v"])
def test_a_step(name: str) -> None:
    options = tiny.ALL[name] | dict(head_dim=64, global_head_dim=128)
    targets = list(step_bytes.TARGETS)
    config = peft.LoraConfig(r=step_bytes.RANK, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.tiny(options), config).bfloat16().train()
    ids = tiny.ids(1, 128)
    with emulated.one_schedule(), opset.using(emulated.kernels()):
        found = kept_bytes(model, ids)
    said = lora_memory.memory(Gemma4TextConfig(**options), 0, ids.numel())
    assert found == pytest.approx(said.kept, rel=0.02)


def test_table() -> None:
    for line in lora_memory.page().splitlines()[2:]:
        assert line in README, f"README lacks {line}"
    assert re.search(r"bench/lora_memory\.py", README)
