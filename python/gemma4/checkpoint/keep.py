"""Quantised weights that stay so: read into tiles, and put into the model for dense ones."""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from gemma4_kernels.packed import COLUMNS, GROUPS, HALF_SCALES, ROWS, PackedWeight, pack
from gemma4_kernels.packed_linear import PackedEmbedding, PackedLinear

from ..experts import Experts, Router
from ..modules import ScaledEmbedding
from .packed import Packed

SCALES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e8m0fnu: "e8m0",
}


def can_be_kept(model: nn.Module, name: str) -> bool:
    """Whether the model multiplies by, or looks up in, the tensor of this name and does no more."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path.rpartition(".")[0])
    module = model.get_submodule(path)
    if type(module) is Experts:
        return True
    # A router's few rows are read by an op that takes them dense.
    kinds = (nn.Linear, ScaledEmbedding)
    return leaf == "weight" and type(module) in kinds and type(parent) is not Router


def read(
    sources: Iterable[tuple[Packed, int]],
    shape: tuple[int, ...],
    device: torch.device,
    pinned: bool = False,
) -> PackedWeight | None:
    """A weight [..., N, D] of sources, each the rows from a number on; None where no packed form
    holds its numbers, or it has no whole tiles.

    No more than a piece for each thread is in memory beside what becomes of it.
    """
    rows, columns = shape[-2:]
    if rows % ROWS or columns % COLUMNS:
        return None
    pieces = []
    for source, first in sources:
        count = math.prod(source.shape[:-1])
        if count % ROWS:
            return None
        pieces += [(source, first, *ends) for ends in source.pieces(count, columns, ROWS)]

    def made(source: Packed, begin: int, end: int) -> PackedWeight | None:
        quants = source.quants(begin, end, columns)
        return None if quants is None else pack(*quants)

    source, first, begin, end = pieces[0]
    piece = made(source, begin, end)
    if piece is None:
        return None
    whole = _like(piece, shape, device, pinned)
    _put(whole, piece, first + begin, first + end)

    def put(job: tuple[Packed, int, int, int]) -> bool:
        source, first, begin, end = job
        piece = made(source, begin, end)
        if piece is None or _form(piece) != _form(whole):
            return False
        _put(whole, piece, first + begin, first + end)
        return True

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return whole if all(pool.map(put, pieces[1:])) else None


def _form(weight: PackedWeight) -> list[torch.dtype | None]:
    return [None if part is None else part.dtype for part in weight.parts]


def _like(
    piece: PackedWeight, shape: tuple[int, ...], device: torch.device, pinned: bool
) -> PackedWeight:
    """Memory for a weight of the form of `piece`."""
    *lead, rows, columns = shape
    tiles = (*lead, rows // ROWS, columns // COLUMNS)

    def empty(part: Tensor | None, *sizes: int) -> Tensor | None:
        if part is None:
            return None
        return torch.empty(sizes, dtype=part.dtype, device=device, pin_memory=pinned)

    codes = empty(piece.codes, *tiles, piece.codes.shape[-1])
    assert codes is not None
    scales = None if piece.scales is None else empty(piece.scales, *tiles, *piece.scales.shape[2:])
    return PackedWeight(codes, scales, empty(piece.row_scales, *lead, rows))


def _put(whole: PackedWeight, piece: PackedWeight, begin: int, end: int) -> None:
    """Rows [begin, end), counted over all experts."""
    tiles = slice(begin // ROWS, end // ROWS)
    experts = whole.codes.ndim - 3
    for target, part in zip(whole.parts[:2], piece.parts[:2], strict=True):
        if target is not None and part is not None:
            flat = target.flatten(0, experts)
            flat[tiles].view(torch.uint8).copy_(part.view(torch.uint8))
    if whole.row_scales is not None and piece.row_scales is not None:
        whole.row_scales.flatten()[begin:end] = piece.row_scales


def install(model: nn.Module, name: str, weight: PackedWeight, dtype: torch.dtype) -> None:
    """Puts a packed weight where the tensor of this name is."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Experts):
        module.pack(leaf, weight)
        return
    parent, _, own = path.rpartition(".")
    new: nn.Module
    if isinstance(module, ScaledEmbedding):
        new = PackedEmbedding(weight, dtype, module.scale)
    else:
        assert isinstance(module, nn.Linear)
        new = PackedLinear(weight, module.bias)
    setattr(model.get_submodule(parent), own, new)


def form_of(weight: PackedWeight) -> str:
    """In words: what its numbers are and what scales they have."""
    codes, scales, row_scales = weight.parts
    if codes.dtype != torch.uint8:
        number = "int8" if codes.dtype == torch.int8 else "fp8"
    else:
        number = "int4" if scales is None or scales.dtype in HALF_SCALES else "fp4"
    parts = []
    if scales is not None:
        each = "tiles" if scales.dtype == torch.float32 else f"{GROUPS[scales.dtype]} columns"
        parts.append(f"{SCALES[scales.dtype]} scales of {each}")
    if row_scales is not None:
        parts.append("scales of rows")
    return f"{number} with {' and '.join(parts)}" if parts else number
