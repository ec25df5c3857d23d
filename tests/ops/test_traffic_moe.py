"""What the experts ask of memory and of the tensor cores, counted by the emulator."""

import pytest
import torch
from support import cases, emulated
from support.backends import BF16, FP32, in_dtypes
from support.marks import emulated_backend
from support.traffic import check_sites, lines_with

from gemma4_kernels.packed import PackedWeight

# The counts that find a block its tile, and the few values that say where results belong.
MOE_SMALL = ("offsets", "order", "experts", "weights")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 8, 12, 60])
def test_moe_experts_few_work(counted, tokens, dtype):
    """Of each touched expert every weight is read once, and nothing of the others."""
    backend = emulated_backend()
    arguments = cases.moe_experts(backend, tokens, 64, 4, 576, 192, dtype=BF16)
    arguments = in_dtypes(arguments, gate_up=dtype, down=dtype)
    with emulated.one_schedule():
        backend.ops.moe_experts(**arguments)
    counts, touched = counted.counts(), arguments["experts"].unique().numel()
    assert counts.launches == 3
    read = 0
    for buffer in counts.buffers:
        if buffer.name in ("gate_up", "down"):
            expert = arguments[buffer.name][0]
            assert buffer.read_bytes in (0, touched * expert.nbytes)
            assert 32 * buffer.sectors_touched == buffer.read_bytes
            read += buffer.read_bytes
    assert read == 3 * touched * 576 * 192 * dtype.itemsize
    # Which rows of the products meet is the router's choice.
    after_the_loop = lines_with("moe/moe_stream.cuh", "smem.product[")
    check_sites(counts, MOE_SMALL, after_the_loop)


def packed_parts(arguments, touched):
    """The bytes of each part of packed weights, of experts as many as are touched; the parts are
    moved to where sectors begin."""
    floor = {}
    for name in {"gate_up", "down", "dense"} & arguments.keys():
        arguments[name] = PackedWeight(*map(torch.clone, arguments[name].parts))
        ends = "", "_scales", "_row_scales"
        for end, part in zip(ends, arguments[name].parts, strict=True):
            floor[name + end] = part.nbytes if name == "dense" else part[0].nbytes * touched
    return floor


def check_packed(counts, floor):
    """Each code is asked for once, and sectors of scales come once."""
    read, came = dict.fromkeys(floor, 0), dict.fromkeys(floor, 0)
    for buffer in counts.buffers:
        if buffer.name in floor:
            read[buffer.name] += buffer.read_bytes
            came[buffer.name] += 32 * buffer.sectors_touched
    for name in floor:
        assert name.endswith("scales") or read[name] == floor[name]
    assert sum(came.values()) <= 1.03 * sum(floor.values())


FOUR, EIGHT = {"row_scales": True}, {"codes": torch.int8, "row_scales": True}


@pytest.mark.parametrize("form", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("tokens", [1, 12, 60])
def test_packed_experts_few_work(counted, tokens, form):
    backend = emulated_backend()
    arguments = cases.moe_experts(backend, tokens, 32, 4, 576, 192, dtype=BF16, form=form)
    floor = packed_parts(arguments, arguments["experts"].unique().numel())
    with emulated.one_schedule():
        backend.ops.moe_experts(**arguments)
    counts = counted.counts()
    assert counts.launches == 3
    check_packed(counts, floor)
    after_the_loop = lines_with("moe/moe_stream.cuh", "smem.product[")
    check_sites(counts, (*MOE_SMALL, *(n for n in floor if "scales" in n)), after_the_loop)


@pytest.mark.parametrize("form", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
def test_packed_experts_small_work(counted, form):
    backend = emulated_backend()
    sizes = 1, 32, 4, 576, 192, 320
    arguments = cases.moe_experts_small(backend, *sizes, dtype=BF16, form=form)
    floor = packed_parts(arguments, touched=4)
    with emulated.one_schedule():
        backend.ops.moe_experts_small(**arguments)
    counts = counted.counts()
    assert counts.launches == 2
    check_packed(counts, floor)


def test_packed_experts_many_work(counted):
    """Codes are asked for once a tile of tokens, and the tile they become meets no bank twice."""
    backend = emulated_backend()
    arguments = cases.moe_experts(backend, 200, 2, 1, 128, 64, dtype=BF16, form=FOUR)
    arguments["experts"][:] = 1
    floor = packed_parts(arguments, touched=1)
    with emulated.one_schedule():
        backend.ops.moe_experts(**arguments)
    counts = counted.counts()
    assert counts.launches == 4
    read = dict.fromkeys(("gate_up", "down"), 0)
    for buffer in counts.buffers:
        if buffer.name in read:
            read[buffer.name] += buffer.read_bytes
    assert read == {name: 4 * floor[name] for name in read}
    check_sites(counts, (*MOE_SMALL, *(n for n in floor if "scales" in n)))


@pytest.mark.parametrize(("tokens", "rows"), [(128, 64), (256, 128)])
def test_moe_experts_many_work(counted, tokens, rows):
    """Tiles that are full do no product too many, and no copy or matrix load meets a bank twice."""
    backend = emulated_backend()
    num_experts = 2 if rows == 128 else 4
    arguments = cases.moe_experts(backend, tokens, num_experts, 1, 128, 64, dtype=BF16)
    arguments["experts"][:] = 1
    with emulated.one_schedule():
        backend.ops.moe_experts(**arguments)
    counts = counted.counts()
    assert counts.launches == 4
    products = 3 * tokens * 128 * 64
    assert counts.mma == products // (16 * 8 * 16)
    weights = {b.name: 0 for b in counts.buffers}
    for buffer in counts.buffers:
        weights[buffer.name] += buffer.read_bytes
    for name in ("gate_up", "down"):
        assert weights[name] == tokens // rows * 2 * arguments[name][1].numel()
    check_sites(counts, exempt=MOE_SMALL)


def test_moe_experts_padding_work(counted):
    """Of an expert's last tile, warps that hold no token do no product."""
    backend = emulated_backend()
    arguments = cases.moe_experts(backend, 150, 2, 1, 128, 64, dtype=BF16)
    arguments["experts"][:] = 1
    with emulated.one_schedule():
        backend.ops.moe_experts(**arguments)
    assert counted.counts().mma == 3 * 160 * 128 * 64 // (16 * 8 * 16)


@pytest.mark.parametrize("tokens", [1, 9])
def test_moe_open_work(counted, tokens):
    """Both weights are read once, in whole sectors, in one launch."""
    backend = emulated_backend()
    arguments = cases.moe_open(backend, tokens, 1088, 48, 32, dtype=BF16)
    with emulated.one_schedule():
        backend.ops.moe_open(**arguments)
    counts = counted.counts()
    assert counts.launches == 1
    read = {b.name: (b.read_bytes, 32 * b.sectors_touched) for b in counts.buffers}
    for name in ("gate_up", "router"):
        assert read[name] == (arguments[name].nbytes,) * 2
    assert counts.mma == (2 * 48 + 32) // 8 * 2 * 1024 // 16
    check_sites(counts, exempt=("hidden", "logits"))


@pytest.mark.parametrize("tokens", [1, 9])
def test_moe_experts_small_work(counted, tokens):
    """Of each touched expert, and of the dense product, every weight is read once: two launches."""
    backend = emulated_backend()
    arguments = cases.moe_experts_small(backend, tokens, 64, 4, 576, 192, 320, dtype=BF16)
    with emulated.one_schedule():
        backend.ops.moe_experts_small(**arguments)
    counts = counted.counts()
    assert counts.launches == 2
    routing = (arguments[name] for name in ("logits", "per_expert_scale", "k"))
    touched = backend.ops.moe_route(*routing)[1].unique().numel()
    expected = {name: touched * arguments[name][0].nbytes for name in ("gate_up", "down")}
    expected["dense"] = arguments["dense"].nbytes
    read = dict.fromkeys(expected, 0)
    for buffer in counts.buffers:
        if buffer.name in read:
            assert 32 * buffer.sectors_touched == buffer.read_bytes
            read[buffer.name] += buffer.read_bytes
    assert read == expected
    # Which rows of the products and of the order meet is the router's choice.
    routed = lines_with("moe/moe_stream.cuh", "smem.product[")
    routed += lines_with("moe/moe_experts_small.cuh", "choice.order[before]")
    small = (*MOE_SMALL, "chosen", "chosen_weights", "logits", "per_expert_scale", "dense_y")
    check_sites(counts, small, routed)
