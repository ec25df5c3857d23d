"""What the linear layers ask of memory and of the tensor cores, counted by the emulator."""

import pytest
import torch
from support import cases, emulated
from support.backends import BF16
from support.marks import emulated_backend
from support.traffic import check_sites

from gemma4_kernels.packed import PackedWeight

LINEARS = {  # tokens, columns, what comes with them: of each model's linear layers in a step
    "E2B q, k, v": (1, 1536, {"residual", "norm_weight"}),
    "E2B down": (1, 12288, set()),
    "E4B o": (1, 4096, set()),
    "E4B gate and up": (4, 2560, {"residual", "norm_weight", "gated"}),
    "E4B PLE gate": (1, 2560, {"residual", "factor"}),
    "E4B PLE projection": (8, 256, set()),
    "12B o": (1, 8192, set()),
    "12B down": (2, 15360, set()),
    "26B dense down": (16, 2112, set()),
    "26B gate and up": (14, 2816, {"residual", "norm_weight", "gated"}),
    "31B q, k, v": (7, 5376, {"residual", "norm_weight"}),
    "31B down": (1, 21504, set()),
}


@pytest.mark.parametrize("case", LINEARS)
def test_linear_small_work(counted, case):
    """Weights are read once, in whole sectors; no product too many, no bank twice."""
    (tokens, width, parts), backend = LINEARS[case], emulated_backend()
    arguments = cases.linear_small(backend, tokens, width, 48, *parts, dtype=BF16)
    weight = arguments["weight"]
    with emulated.one_schedule():
        backend.ops.linear_small(**arguments)
    counts = counted.counts()
    (read,) = [b for b in counts.buffers if b.name == "weight"]
    assert counts.launches == 1
    assert read.read_bytes == weight.nbytes == 32 * read.sectors_touched
    batches = -(-width // 1024)  # of 8 warps, which take two lines of 64 columns each
    assert counts.mma == weight.shape[0] // 8 * batches * 1024 // 16
    # Eight rows of y, and of the factor, are half a sector.
    check_sites(counts, exempt=("y", "factor", "scale"))


PACKED_LINEARS = {  # tokens, width, rows, what comes with it, codes, scales
    "E4B q, k, v": (1, 2560, 48, {"residual", "norm_weight"}, torch.uint8, BF16),
    "E4B gate and up": (8, 2560, 32, {"residual", "norm_weight", "gated"}, torch.uint8, BF16),
    "26B dense down": (16, 2112, 48, set(), torch.uint8, torch.float8_e4m3fn),
    "26B expert": (1, 704, 48, set(), torch.uint8, torch.float8_e8m0fnu),
    "31B down": (1, 21504, 16, set(), torch.int8, BF16),
    "12B o": (8, 8192, 32, set(), torch.float8_e4m3fn, None),
}


def on_sectors(weight):
    """Beginning where a card's memory would: on a sector."""

    def moved(part):
        room = torch.empty(part.nbytes + 32, dtype=torch.uint8)
        begin = -room.data_ptr() % 32
        there = room[begin : begin + part.nbytes].view(part.dtype).view(part.shape)
        return there.copy_(part)

    return PackedWeight(*(None if part is None else moved(part) for part in weight.parts))


def packed_bytes(counts):
    """What was asked for of a packed weight, in whole sectors: lanes share scales."""
    parts = [site for site in counts.sites if site.buffer.startswith("weight")]
    return sum(32 * site.sectors for site in parts)


@pytest.mark.parametrize("case", PACKED_LINEARS)
def test_linear_small_packed_work(counted, case):
    """Codes and scales are read once, in whole sectors, by loads of 16 bytes; no bank twice."""
    tokens, width, rows, parts, codes, scales = PACKED_LINEARS[case]
    backend, form = emulated_backend(), dict(codes=codes, scales=scales)
    arguments = cases.linear_small(
        backend, tokens, width, rows, *parts, dtype=BF16, form=form | {"row_scales": False}
    )
    weight = arguments["weight"] = on_sectors(arguments["weight"])
    with emulated.one_schedule():
        backend.ops.linear_small(**arguments)
    counts = counted.counts()
    assert counts.launches == 1
    (read,) = [b for b in counts.buffers if b.name == "weight"]
    assert read.read_bytes == weight.codes.nbytes
    floor = weight.codes.nbytes + (0 if scales is None else weight.scales.nbytes)
    rows_read = 0 if weight.row_scales is None else weight.row_scales.nbytes
    assert packed_bytes(counts) <= 1.03 * floor + 2 * rows_read
    eights = -(-tokens // 8)
    assert counts.mma == weight.shape[0] // 16 * width // 16 * eights
    # Sixteen rows of y are a sector, which no one store fills.
    check_sites(counts, exempt=("y", "weight_row_scales"))


def test_linear_packed_tiles_work(counted):
    """Weights are read once for each tile of 128 tokens, and no bank twice."""
    backend = emulated_backend()
    arguments = cases.linear_packed(backend, 256, 192, 384, dtype=BF16)
    weight = arguments["weight"] = on_sectors(arguments["weight"])
    with emulated.one_schedule():
        backend.ops.linear_packed(**arguments)
    counts = counted.counts()
    assert packed_bytes(counts) == 2 * weight.nbytes
    assert counts.mma == 256 // 16 * 384 // 8 * 192 // 16
    check_sites(counts)
