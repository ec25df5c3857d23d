"""The memory of a step that trains LoRA: no more than plain transformers' with grouped_mm takes."""

import peft
import pytest
import torch
import transformers
from support import tiny
from torch import nn

from gemma4.measure import peak_memory

# The experts' tensors are what counts, as in the released model.
OPTIONS = tiny.MOE | dict(
    num_hidden_layers=2,
    layer_types=[tiny.S, tiny.F],
    num_experts=16,
    top_k_experts=2,
    moe_intermediate_size=128,
)
ADAPTERS = {
    "frozen experts": dict(target_modules=["q_proj", "o_proj"]),
    "LoRA on experts": dict(
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    ),
}


def peak(model: nn.Module, adapters: dict) -> int:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **adapters)
    model = peft.get_peft_model(model.bfloat16(), config).train()
    ids = tiny.ids(16, 64)  # 128 assignments an expert; of 8,192 tokens 26B has 512

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    step()  # what is made once
    return peak_memory(step, torch.device("cpu"))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_step_with_adapters(kind: str) -> None:
    config = transformers.Gemma4TextConfig(**OPTIONS)
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    plain = peak(transformers.Gemma4ForCausalLM(config), ADAPTERS[kind])
    ours = peak(tiny.tiny(OPTIONS), ADAPTERS[kind])
    print(f"{kind}: {ours / plain:.3f} of {plain / 1e6:.2f} MB")
    assert ours <= plain
