"""What a decoding step launches, counted on the emulated kernels."""

import re

import launches
import pytest
from support import emulated
from support.marks import needs_compiler

from gemma4 import Gemma4TextConfig
from gemma4.presets import RELEASED

pytestmark = [pytest.mark.slow, needs_compiler]
MOST = {"E2B": 7, "E4B": 7, "12B": 5, "26B-A4B": 6, "31B": 5}


@pytest.fixture(autouse=True)
def _multiprocessors(monkeypatch):
    emulated.ops()
    monkeypatch.setattr(emulated.control().settings, "sm_count", launches.MULTIPROCESSORS)


@pytest.mark.parametrize("name", RELEASED)
def test_a_layer_is_few_launches(name):
    """And the total is that of all layers, and of what stands before and behind them; under the
    plug-in too, whose first layer of a kind makes what all of it read, and whose last closes."""
    words = launches.line(name).split()
    assert words[0] == name
    counts = dict(zip(words[1::2], words[2::2], strict=True))
    kinds = Gemma4TextConfig.preset(name).layer_types
    # The head with its norm; the choice of a token; positions and lengths.
    assert int(counts["final"]) <= 3
    least, most = int(counts["first"]) + int(counts["final"]), 0
    for kind in ("sliding", "full"):
        layers = sum(found.startswith(kind) for found in kinds)
        low, high = (int(n) for n in (re.findall(r"\d+", counts[kind]) * 2)[:2])
        assert high <= MOST[name]
        fewest, more = (int(n) for n in (re.findall(r"\d+", counts[f"plugin-{kind}"]) * 2)[:2])
        assert fewest <= MOST[name] and more <= MOST[name] + 3
        most += layers * max(low, high)
        least += layers * min(low, high)
    assert int(counts["plugin-total"]) <= int(counts["total"]) + 40
    assert least <= int(counts["total"]) <= most + int(counts["first"]) + int(counts["final"])
