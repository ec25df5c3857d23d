"""torch's own products of packed weights on a CPU, where kernels of ours do not run.

y = x Wᵀ for x in bf16, which they are made for (in fp32 they are slower than a dense product): of
four-bit codes less 8 with scales of groups or rows, and of int8 with scales of rows. Their scales
are bf16, so that a fp16 or fp32 one is rounded as a dense bf16 weight is. They want the codes in an
order of their own: a copy as large as the weight, made once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import COLUMNS, HALF_SCALES, ROWS, PackedWeight, untiled

# Rows put into torch's order at once, by way of 32 bits a code; it works on 64 at a time at most.
PIECE_ROWS = 1024


@dataclass(frozen=True)
class TorchProduct:
    """A weight as torch multiplies it; group: columns that share a scale, 0 if a row does."""

    weight: Tensor
    scales: Tensor
    group: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] in bf16 to [T, N]."""
        if self.group:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, self.weight, self.group, self.scales
            )
        return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes


def torch_multiplies(weight: PackedWeight) -> bool:
    """Whether there is a product for the weight's form."""
    codes, scales, row_scales = weight.parts
    if codes.dtype == torch.int8:
        return scales is None and row_scales is not None
    return codes.dtype == torch.uint8 and (scales is None or scales.dtype in HALF_SCALES)


def torch_product(weight: PackedWeight) -> TorchProduct | None:
    """The weight [N, D] for torch's products, None where there is none for its form."""
    codes, scales, row_scales = weight.parts
    if not torch_multiplies(weight):
        return None
    if codes.dtype == torch.int8:
        assert row_scales is not None  # it is multiplied
        return TorchProduct(untiled(weight)[0], row_scales.bfloat16(), 0)
    rows, columns = weight.shape
    group = 32 if scales is not None else 128 if columns % 128 == 0 else COLUMNS
    ordered, groups = [], []
    for begin in range(0, rows, PIECE_ROWS):
        tiles = slice(begin // ROWS, (begin + PIECE_ROWS) // ROWS)
        piece = PackedWeight(codes[tiles], None if scales is None else scales[tiles])
        code, scale = untiled(piece)
        ordered.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(code.int(), 1))
        shape = len(code), columns // group
        each = torch.ones(shape) if scale is None else scale.float()
        if row_scales is not None:
            each = each * row_scales[begin : begin + PIECE_ROWS, None]
        groups.append(each.bfloat16())
    scale_DN = torch.cat(groups).T
    both = torch.stack([scale_DN, torch.zeros_like(scale_DN)], -1)  # and what 8 stands for
    return TorchProduct(torch.cat(ordered), both.contiguous(), group)
