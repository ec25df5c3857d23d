"""Bytes of a training step: what a call counts, and the committed page."""

import re

import step_bytes
import torch


def test_what_a_call_moves() -> None:
    x, row = torch.zeros(4, 8), torch.zeros(8)
    table, ids = torch.zeros(1000, 8), torch.zeros(3, dtype=torch.long)
    with step_bytes.Moved().watching() as moved:
        wide = row.expand(4, 8)  # a view moves nothing, and repeats nothing that is read
        torch.add(x, wide)
        torch.mm(x, x.T)
        torch.empty(100)
        torch.zeros(4)
        torch.embedding(table, ids)
    assert moved.bytes["add"] == 4 * (32 + 8 + 32)
    assert moved.bytes["products"] == 4 * (32 + 32 + 16)
    assert moved.bytes["zeros"] == 4 * 4
    assert moved.bytes["embedding"] == 2 * 3 * 8 * 4 + 3 * 8
    assert moved.bytes["empty"] == 0


def test_the_committed_page() -> None:
    """Of the model with the fewest layers; where PEFT did less than the floor says, a number would
    be negative."""
    section, page = (
        step_bytes.section("26B-A4B"),
        step_bytes.RESULT.read_text(encoding="utf-8"),
    )
    assert section in page and "| -" not in section.replace("| ---", "")
    found = re.findall(r"## (\S+): (\S+) times the floor, with LoRA (\S+) \((\S+) without", page)
    assert [name for name, *_ in found] == list(step_bytes.MODELS)
    assert all(float(ratio) <= 1.25 for _, *ratios in found for ratio in ratios)
