"""What a decoding step launches, counted on the emulated kernels."""

import re

import launches
import pytest
from support import emulated
from support.marks import needs_compiler

from gemma4 import Gemma4TextConfig
from gemma4.presets import RELEASED

pytestmark = [pytest.mark.slow, needs_compiler]
# The merge of a long context's splits is one of a layer's.
MOST = {"E2B": 9, "E4B": 9, "12B": 7, "26B-A4B": 8, "31B": 7}


@pytest.fixture(autouse=True)
def _multiprocessors(monkeypatch):
    emulated.ops()
    monkeypatch.setattr(emulated.control().settings, "sm_count", launches.MULTIPROCESSORS)


@pytest.mark.parametrize("name", RELEASED)
def test_a_layer_is_few_launches(name):
    """And the total is that of all layers, and of what stands before and behind them."""
    words = launches.line(name).split()
    assert words[0] == name
    counts = dict(zip(words[1::2], words[2::2], strict=True))
    kinds = Gemma4TextConfig.preset(name).layer_types
    least, most = int(counts["first"]) + int(counts["final"]), 0
    for kind in ("sliding", "full"):
        layers = sum(found.startswith(kind) for found in kinds)
        low, high = (int(n) for n in (re.findall(r"\d+", counts[kind]) * 2)[:2])
        assert high <= MOST[name]
        most += layers * max(low, high)
        least += layers * min(low, high)
    assert least <= int(counts["total"]) <= most + int(counts["first"]) + int(counts["final"])
