"""README's table of what weights take, from the configs of the released models."""

import re
from pathlib import Path

import pytest
import torch

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig
from gemma4.presets import RELEASED
from gemma4.quantize import EXPERTS, LINEAR

README = (Path(__file__).parents[2] / "README.md").read_text()
TABLES = ("model.embed_tokens.weight", "model.embed_tokens_per_layer.weight")
# Bytes of an element of a quantised matrix: codes, and a bf16 scale for 32 of them, or an fp32 one
# for a row, which is next to nothing.
SIZES = {"bf16": 2, "w4a16": 4.5 / 8, "w8a16": 1}


def gigabytes(name: str, element: float, head: bool = False) -> tuple[float, float]:
    """In memory, and read for a token."""
    config = Gemma4TextConfig.preset(name)
    with torch.device("meta"):
        tensors = Gemma4ForCausalLM(config).state_dict()
    memory = token = 0.0
    for tensor, w in tensors.items():
        experts = EXPERTS.fullmatch(tensor)
        packed = (experts or LINEAR.fullmatch(tensor)) and element != 2
        assert not packed or (w.shape[-1] % 64 == 0 and w.shape[-2] % 16 == 0), tensor
        size = w.numel() * (element if packed else 2)
        memory += size
        if experts:
            size *= config.top_k_experts / config.num_experts
        token += 0 if tensor == TABLES[1] or (head and tensor == TABLES[0]) else size
    own = tensors[TABLES[0]].numel() if head else 0
    return (memory + own) / 1e9, (token + own) / 1e9


@pytest.mark.parametrize("name", RELEASED)
def test_table(name: str) -> None:
    row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", README, re.MULTILINE)
    assert row, f"README has no row of {name}"
    made = [gigabytes(name, SIZES[kind]) for kind in ("bf16", "w8a16", "w4a16")]
    made.append(gigabytes(name, SIZES["w4a16"], head=True))
    assert [cell.strip() for cell in row[1].split("|")] == [f"{m:.1f}, {t:.2f}" for m, t in made]
