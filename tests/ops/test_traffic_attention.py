"""What the kernels of attention ask of memory and of the tensor cores, counted by the emulator.

No product, and no key, beyond those the tiles cannot do without.
"""

import pytest
import torch
from support import backward_cases, cases, emulated
from support.backends import BF16, CARDS
from support.marks import emulated_backend
from support.small_calls import prefill
from support.traffic import check_sites

from gemma4_kernels import opset
from gemma4_kernels.e4m3 import E4M3


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_prefill_work(counted, on_card, card, head_dim):
    """Four heads share the keys; nothing is masked, so every product is useful."""
    (smem_kb, hopper), backend = CARDS[card], on_card(card)
    tile = counted.attention_tile(head_dim, 384, smem_kb * 1024, hopper)
    tokens, heads, keys = 96, 4, 128
    arguments = prefill(backend, tokens, keys, heads, head_dim)
    with emulated.one_schedule():
        backend.ops.attention_prefill(**arguments, causal=False)

    counts, rows = counted.counts(), tokens * heads
    assert counts.mma == 2 * (rows // 16) * (keys // 16) * (head_dim // 16) * 2
    blocks = rows / tile["rows"]
    assert blocks.is_integer()
    asked = {b.name: b.read_bytes + b.written_bytes for b in counts.buffers}
    assert asked["q"] == asked["out"] == arguments["q"].nbytes
    assert asked["k"] == asked["v"] == blocks * arguments["k"].nbytes
    check_sites(counts)


BACKWARD_ROWS = {  # of the tile, by head_dim and KB of shared memory
    **{(64, kb): 64 for kb in (99, 227)},
    **{(128, kb): 64 for kb in (99, 227)},
    (256, 99): 64,
    (256, 227): 64,
    (512, 99): 16,
    (512, 227): 32,
}


@pytest.mark.parametrize("case", BACKWARD_ROWS, ids=str)
def test_prefill_backward_work(counted, on_card, case):
    """Seven products and not one more, on tiles that are full; what a block owns is read once, the
    rest once for each block."""
    head_dim, smem_kb = case
    backend = on_card(f"{smem_kb} KB")
    tokens, heads, keys = 64, 2, 128
    forward = prefill(backend, tokens, keys, heads, head_dim) | dict(scale=0.1, causal=False)
    arguments = backward_cases.attention_prefill_backward(backend, forward)
    counted.reset_counts()
    with emulated.one_schedule():
        backward = opset.OPS["attention_prefill_backward"]
        opset.kernels.call(backward, tuple(arguments.values()))

    counts, rows = counted.counts(), tokens * heads
    assert counts.launches == 3
    assert counts.mma == 7 * (rows // 16) * (keys // 16) * (head_dim // 16) * 2
    asked = dict.fromkeys((b.name for b in counts.buffers), 0)
    for buffer in counts.buffers:
        asked[buffer.name] += buffer.read_bytes + buffer.written_bytes
    own, q, k = BACKWARD_ROWS[case], arguments["q"].nbytes, arguments["k"].nbytes
    assert asked["q"] == (1 + keys / own) * q
    assert asked["out"] == q
    assert asked["grad_out"] == asked["q"] + asked["out"]
    assert asked["k"] == asked["v"] == (1 + rows / own) * k
    assert asked["grad_q"] == q
    assert asked["grad_k"] == asked["grad_v"] == k
    check_sites(counts, exempt=("lse", "grad_lse", "delta"))


@pytest.mark.parametrize("layout", ["rows", "ring", "pages"])
@pytest.mark.parametrize("head_dim", [256, 512])
def test_decode_work(counted, layout, head_dim):
    """Each visible key is read once for all the heads that share it, and no other."""
    backend = emulated_backend()
    batch, heads, kv_heads, length, window = 2, 16, 2, 600, 512 if layout == "ring" else 0
    slots, lengths = 528 if layout == "ring" else 640, [length] * batch
    arguments = cases.attention_decode(
        backend, lengths, slots, heads, kv_heads, head_dim, dtype=BF16
    )
    if layout == "pages":
        for name in ("k_cache", "v_cache"):
            arguments[name] = arguments[name].view(-1, 64, kv_heads, head_dim)
        order = torch.randperm(batch * slots // 64)
        arguments["block_table"] = order.int().view(batch, -1)
    with emulated.one_schedule():
        backend.ops.attention_decode(**arguments, window=window, ring=layout == "ring")
    counts = counted.counts()
    visible = (window or length) * batch * kv_heads * head_dim * 2
    asked = {b.name: b.read_bytes for b in counts.buffers[: len(counts.buffers) // 2]}
    assert asked["k"] == asked["v"] == visible
    check_sites(counts, exempt=("seq_lens", "block_table", "partial_lse", "lse"))


@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("layout", ["rows", "ring", "pages"])
@pytest.mark.parametrize("head_dim", [256, 512])
def test_qkv_decode_work(counted, layout, head_dim, dtype):
    """One launch; of the cache every visible key is read once, and the newest written once, in e4m3
    with a scale each. Each split of the keys reads q for itself."""
    backend = emulated_backend()
    batch, heads, kv_heads, length, window = 2, 16, 2, 600, 512 if layout == "ring" else 0
    slots, lengths = 528 if layout == "ring" else 640, [length] * batch
    sizes = lengths, slots, heads, kv_heads, head_dim
    arguments = cases.qkv_attention_decode(backend, *sizes, dtype=BF16, packed=False)
    if layout == "pages":
        for name in ("k_cache", "v_cache"):
            arguments[name] = arguments[name].view(-1, 64, kv_heads, head_dim)
        order = torch.randperm(batch * slots // 64)
        arguments["block_table"] = order.int().view(batch, -1)
    if dtype == E4M3:
        arguments = cases.in_e4m3(backend, arguments)
    with emulated.one_schedule():
        backend.ops.qkv_attention_decode(**arguments, window=window, ring=layout == "ring")
    counts = counted.counts()
    assert counts.launches == 1
    keys, new = (window or length) * batch * kv_heads, batch * kv_heads
    asked = {b.name: (b.read_bytes, b.written_bytes) for b in counts.buffers}
    size = head_dim * dtype.itemsize
    assert asked["k_cache"] == asked["v_cache"] == (keys * size, new * size)
    if dtype == E4M3:
        assert asked["k_scales"] == asked["v_scales"] == (keys * 4, new * 4)
        assert keys * (size + 4) <= 1.03 * keys * size
    splits = 3  # two blocks for each of the card's 3 multiprocessors
    assert asked["q"][0] == splits * batch * heads * head_dim * 2
    assert asked["out"][1] == batch * heads * head_dim * 2
    small = {"seq_lens", "block_table", "positions", "inv_freq", "counters", "partial_lse"}
    check_sites(counts, exempt=small | {"k_scales", "v_scales"})


PLANS = {  # head_dim, rows, KB of shared memory, Hopper: rows, keys and column warps of the tile
    (64, 1000, 99, False): (64, 64, 1),
    (128, 1000, 64, False): (64, 64, 1),
    (256, 8, 64, False): (16, 32, 4),
    (256, 1000, 99, False): (64, 32, 2),
    (256, 1000, 163, False): (64, 32, 1),
    (256, 1000, 227, False): (64, 32, 1),
    (512, 16, 99, False): (16, 32, 4),
    (512, 17, 99, False): (48, 16, 2),
    (512, 1000, 163, False): (64, 32, 2),
    (512, 1000, 227, False): (64, 32, 2),
    (256, 16, 227, True): (16, 32, 4),
    (256, 64, 227, True): (64, 32, 1),
    (256, 65, 227, True): (128, 64, 1),
    (512, 16, 227, True): (16, 32, 4),
    (512, 17, 227, True): (64, 32, 2),
}


@pytest.mark.parametrize("case", PLANS, ids=str)
def test_plan(counted, case):
    head_dim, rows, smem_kb, hopper = case
    tile = counted.attention_tile(head_dim, rows, smem_kb * 1024, hopper)
    assert (tile["rows"], tile["keys"], tile["column_warps"]) == PLANS[case]
    assert tile["smem_bytes"] <= smem_kb * 1024 and tile["threads"] <= 256


@pytest.mark.parametrize(
    ("head_dim", "smem_kb", "sentence"),
    [
        (512, 64, "no tile of head_dim 512 fits in 65536 bytes"),
        (96, 227, "head_dim 64, 128, 256 and 512, got 96"),
    ],
)
def test_no_plan(counted, head_dim, smem_kb, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        counted.attention_tile(head_dim, 1000, smem_kb * 1024)
