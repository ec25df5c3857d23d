"""No kernel may become worse than the committed report says: fewer resident blocks, narrower
accesses, a smaller share of tensor instructions, more bytes, sectors, wavefronts or products.

After a change that means to, `python bench/static_report.py` writes the report anew.
"""

import copy
import dataclasses
import json
import math
import re

import compiled
import estimates
import limits
import pytest
import static_report
import tile_work
import token_cost
import torch
from support import emulated, small_calls
from support.backends import CARDS
from support.marks import emulated_backend, needs_compiler

from gemma4.config import FULL, SLIDING

COMMITTED = json.loads(static_report.RESULT.read_text())


@pytest.mark.slow
def test_compiled(kernels):
    rows = static_report.compiled_rows(kernels, static_report.launches())
    committed = {"compiled": COMMITTED["compiled"]}
    assert static_report.worse({"compiled": rows}, committed) == []


@pytest.mark.slow
def test_counted():
    committed = {"counted": COMMITTED["counted"]}
    assert static_report.worse({"counted": static_report.counted_rows()}, committed) == []


@pytest.mark.parametrize(
    "table, change, sentence",
    [
        ("compiled", {"stack_bytes": 16}, "16 bytes of stack"),
        ("compiled", {"blocks": 0}, "0 resident blocks"),
        ("compiled", {"load_bits": [32]}, r"load_bits \[32\]"),
        ("compiled", {"loop": [1, 10**6]}, "0.0% tensor"),
        ("compiled", {"arch": "sm_999"}, "not in the committed report"),
        ("counted", {"bytes_over_floor": 9.0}, "bytes_over_floor 9.0"),
        ("counted", {"sectors_over_ideal": 9.0}, "sectors_over_ideal 9.0"),
        ("counted", {"wavefronts_over_ideal": 9.0}, "wavefronts_over_ideal 9.0"),
        ("counted", {"mma_over_useful": 9.0}, "mma_over_useful 9.0"),
        ("counted", {"case": "another"}, "not in the committed report"),
    ],
)
def test_what_is_worse_is_named(table, change, sentence):
    """The attention kernel and case that the report names are those that were made worse."""
    fresh = copy.deepcopy(COMMITTED)
    before = static_report.worse(fresh, COMMITTED)
    key = {"compiled": "kernel", "counted": "case"}[table]
    row = next(
        r
        for r in fresh[table]
        if r[key].startswith("attention") and r.get("arch", "sm_80") == "sm_80"
    )
    name = row[key]
    row.update(change)
    found = [line for line in static_report.worse(fresh, COMMITTED) if line not in before]
    assert any(re.search(sentence, line) for line in found)
    assert any(line.startswith((name, change.get("case", name))) for line in found)


@pytest.mark.parametrize("tokens, keys, window", [(7, 7, 0), (7, 7, 3), (3, 9, 4), (9, 9, 20)])
def test_visible_pairs(tokens, keys, window):
    pairs = [
        (i, j)
        for i in range(keys - tokens, keys)
        for j in range(keys)
        if j <= i and (not window or i - j < window)
    ]
    assert limits.visible_pairs(tokens, keys, window) == len(pairs)


@pytest.mark.parametrize(
    "registers, threads, smem_kb, arch, blocks",
    [
        (255, 128, 64, "sm_90a", 2),  # 227 KB less 1 KB a block would hold 3, registers hold 2
        (168, 384, 0, "sm_90a", 1),
        (32, 256, 0, "sm_80", 8),
        (32, 256, 0, "sm_120", 6),
        (128, 256, 80, "sm_80", 2),
        (128, 256, 144, "sm_120", 0),
        (16, 32, 0, "sm_100", 32),
    ],
)
def test_resident_blocks(registers, threads, smem_kb, arch, blocks):
    kernel = compiled.Kernel("any", arch, registers=registers)
    assert kernel.blocks(threads, smem_kb * 1024) == blocks


@needs_compiler
def test_launches_are_counted():
    """Under the name that the compiler's report gives the kernel."""
    gate_up = torch.randn(3, 2 * 77, dtype=torch.bfloat16)
    (launch,) = static_report.run("geglu", {"gate_up": gate_up}).launched
    name = compiled.plain_name(emulated.kernel_names()[launch.kernel])
    assert name == "gelu_mul_kernel<bf16, bf16, 1>" and name in {
        r["kernel"] for r in COMMITTED["compiled"]
    }
    assert (launch.threads, launch.smem_bytes) == (256, 0)


@pytest.mark.parametrize("window", [0, 40])
def test_the_work_of_an_estimate_is_the_kernels(window):
    """The emulator counts as many products as the estimate's walk over tiles has."""
    heads, head_dim, n = 4, 256, 96
    b = emulated_backend()
    inputs = small_calls.prefill(b, n, n, heads, head_dim)
    counts = static_report.run("attention_prefill", inputs | {"window": window})
    tile = emulated.control().attention_tile(head_dim, n * heads, 227 * 1024)
    walked = sum(tile_work.tiles_walked(n, n, tile["rows"] // heads, tile["keys"], window))
    of_one = tile["rows"] * tile["keys"] * head_dim * 4
    assert counts.mma * static_report.MMA_FLOP == walked * of_one


@pytest.mark.parametrize("card", ["99 KB", "227 KB", "Hopper"])
@pytest.mark.parametrize("head_dim", [256, 512])
def test_shared_bytes_of_an_estimate_are_the_kernels(on_card, card, head_dim):
    """The emulator counts as many wavefronts of 128 bytes as the estimate has for each tile of
    keys, but for those that find 16 keys' addresses with 192 threads."""
    b, (smem_kb, hopper) = on_card(card), CARDS[card]
    tile = emulated.control().attention_tile(head_dim, 4 * 96, smem_kb * 1024, hopper)

    def wavefronts(keys: int) -> int:
        inputs = small_calls.prefill(b, 96, keys, 4, head_dim)
        counts = static_report.run("attention_prefill", inputs | {"causal": False})
        return sum(site.wavefronts for site in counts.sites)

    more = wavefronts(256) - wavefronts(128)
    tiles = 128 / tile["keys"] * 4 * 96 / tile["rows"]
    offsets = 8 * tile["keys"] / 128  # written, 8 bytes a key
    expected = tile_work.shared_bytes(tile, head_dim, hopper) / 128 + offsets
    assert more / tiles == pytest.approx(expected, rel=0.01 if tile["threads"] == 192 else 0)


def test_floors_of_known_shapes():
    """Two that were worked out by hand: a windowed layer of 16 heads, the experts of one token."""
    flop = limits.attention_flop("26B-A4B", "sliding_attention", 8192, 8192)
    assert flop == 4 * 16 * 256 * (8192 * 1024 - 1024 * 1023 // 2)
    assert limits.moe_bytes("26B-A4B", 1) == pytest.approx(95.2e6, rel=1e-3)
    # In four bits and a 16-bit scale for 32, 8 x 3 x 2816 x 704 numbers; in e4m3, 2 x 2 heads of
    # 512 bytes and a scale for each of 1,000 keys, and q and out.
    experts = 8 * 3 * 2816 * 704 * 18 / 32 + 2 * 2 * 2816
    assert limits.moe_bytes("26B-A4B", 1, packed=True) == pytest.approx(experts)
    keys = 2 * 2 * 1000 * 516 + 2 * 16 * 512 * 2
    assert limits.attention_bytes("26B-A4B", FULL, 1, 1000, coded=True) == keys


def test_experts_from_l2_worked_out_by_hand():
    """576 tiles of 128 assignments copy an expert each, 65,536 assignments their rows of 2,816 for
    11 column tiles and of 704 for 22: 12.94 GB."""
    tiles = {"tensor": {"HGMMA.64x128x16": 12}, "loop": [12, 300], "inner_loop": [0, 0]}
    row = estimates.moe_tiles_estimate(8192, tiles | {"blocks": 2})
    moved = 576 * 3 * 2816 * 704 * 2 + 65536 * 2 * (11 * 2816 + 22 * 704)
    assert row["bound_by"] == "l2" and row["l2_us"] == round(moved / 5.5e6, 1) == 2353.0


def test_blocks_take_turns():
    """Two at a time: 3 and 2, then 2 behind the second, then 1 behind the first."""
    assert estimates.makespan([3, 2, 2, 1], 2) == 4


def test_what_waves_cost():
    """A full wave of blocks that hide each other takes the bound; one block more takes a wave more;
    alone, a block waits in each iteration, and begins and ends by itself."""
    n, block = 132 * 2, estimates.BLOCK
    full = estimates.in_waves(1.0, [5] * n, 2, True)
    assert full == pytest.approx(1 + block)
    more = estimates.in_waves(1.0, [5] * (n + 1), 2, True)
    assert more == pytest.approx(2 * n / (n + 1) + block)
    alone = estimates.in_waves(1.0, [5] * 132, 1, True)
    assert alone == pytest.approx(1 + 5 * estimates.L2_READ + block)


def test_estimates_are_above_their_bounds_and_floors():
    for row in COMMITTED["estimates"]:
        bound = row[f"{row['bound_by']}_us"]
        assert row["estimate_us"] >= max(bound, row["floor_us"]) and row["moved_by"], row


@pytest.mark.slow
def test_the_estimates_are_those_of_the_committed_kernels():
    """What --estimates writes."""
    emulated.ops()
    made = static_report.estimate_rows(COMMITTED["compiled"])
    assert json.loads(json.dumps(made)) == COMMITTED["estimates"]


def test_a_token_worked_out_by_hand():
    """E4B's 9.288 GB of weights and 66 MB of keys at 88 % of 3 TB/s, 301 launches of 0.8 µs."""
    step = token_cost.Step("E4B", 1024, 301, {SLIDING: 0, FULL: 0})
    hopper = token_cost.CARDS[0]
    assert 1 / step.seconds(hopper, 0.8e-6) == pytest.approx(264.3, abs=0.1)
    assert 1 / step.floor(hopper) == pytest.approx(320.7, abs=0.1)
    # Turns count where they take longer than the keys: here in all 42 layers.
    slow = dataclasses.replace(step, turns={SLIDING: 10, FULL: 10})
    keys = step.all_key_bytes / 2.64e12
    assert slow.seconds(hopper, 0) - step.seconds(hopper, 0) == pytest.approx(42 * 13e-6 - keys)


def test_tokens_follow_from_what_was_counted():
    cards = {card.name: card for card in token_cost.CARDS}
    for row in COMMITTED["tokens"]:
        walked = dict(zip((SLIDING, FULL), row["turns"], strict=True))
        step = token_cost.Step(row["model"], row["keys"], row["launches"], walked)
        assert token_cost.row(step, cards[row["card"]]) == row
    fitting = {(r["model"], r["card"]) for r in COMMITTED["tokens"] if r["tok_s"]}
    assert ("31B", "H100 SXM") in fitting and ("E4B", "RTX 4090") in fitting
    assert not {("26B-A4B", "RTX 5090"), ("31B", "RTX 4090")} & fitting


@pytest.mark.parametrize("kind", [SLIDING, FULL])
def test_turns_are_the_longest_blocks(kind):
    """Of a block's share of the products that the emulator counts when all keys are there."""
    card, keys = token_cost.CARDS[0], 512
    b, c = emulated_backend(), limits.MODELS["E2B"]

    def products(keys: int) -> tuple[int, int]:
        inputs = small_calls.decode(b, keys, c.num_attention_heads, c.head_size(kind))
        counts = static_report.run("attention_decode", inputs)
        return counts.mma, counts.launched[0].blocks

    tile = emulated.control().attention_tile(c.head_size(kind), 8, card.smem_kb * 1024)["keys"]
    of_one, _ = products(tile)
    settings = emulated.control().settings
    before, settings.sm_count = settings.sm_count, card.multiprocessors
    mma, blocks = products(keys)
    found = token_cost.turns("E2B", kind, keys, card)
    settings.sm_count = before
    assert found == math.ceil(mma / of_one / blocks) + (blocks > 1)
