"""Packed weights of every form, and in float64 what they say."""

import torch
from torch import Tensor

from gemma4_kernels.packed import E2M1, PackedWeight, pack, untiled

BF16, FP16, E4M3, E8M0 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e8m0fnu
FORMS = [
    *((torch.uint8, scale) for scale in (BF16, FP16, E4M3, E8M0, None)),
    *(
        (codes, scale)
        for codes in (torch.int8, E4M3)
        for scale in (BF16, FP16, torch.float32, None)
    ),
]


def draw(codes_dtype, scales_dtype, *shape: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Codes and scales in rows, and row scales."""
    generator = torch.Generator().manual_seed(3)
    *lead, rows, columns = shape

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) + 0.1

    if codes_dtype == torch.uint8:
        codes = integers(0, 16, *shape).to(torch.uint8)
    elif codes_dtype == torch.int8:
        codes = integers(-128, 128, *shape).to(torch.int8)
    else:
        codes = (normal(*shape) * 50).to(E4M3)
    scales = None
    if scales_dtype == torch.float32:
        scales = normal(*lead, rows // 16, columns // 64)
    elif scales_dtype == E8M0:
        scales = integers(120, 130, *lead, rows, columns // 32).to(torch.uint8).view(E8M0)
    elif scales_dtype is not None:
        group = 16 if scales_dtype == E4M3 else 32
        scales = normal(*lead, rows, columns // group).abs().to(scales_dtype)
    return codes, scales, normal(*lead, rows)


def formula(codes: Tensor, scales: Tensor | None, row_scales: Tensor | None) -> Tensor:
    """The weight in float64, element by element."""
    if codes.dtype != torch.uint8:
        w = codes.double()
    elif scales is not None and scales.dtype in (E4M3, E8M0):
        w = E2M1.double()[codes.long()]
    else:
        w = codes.double() - 8
    *_, rows, columns = w.shape
    n, d = torch.arange(rows)[:, None], torch.arange(columns)
    if scales is not None:
        if scales.dtype == torch.float32:
            w = w * scales.double()[..., n // 16, d // 64]
        else:
            group = 16 if scales.dtype == E4M3 else 32
            w = w * scales.to(torch.float64)[..., n, d // group]
    return w if row_scales is None else w * row_scales.double()[..., None]


def weight(
    *shape: int,
    codes: torch.dtype = torch.uint8,
    scales: torch.dtype | None = BF16,
    row_scales: bool = False,
    std: float | None = None,
) -> PackedWeight:
    """A weight [..., N, D] whose numbers have this deviation, D^-1/2 unless given."""
    drawn, scales_, rows = draw(codes, scales, *shape)
    std = std or shape[-1] ** -0.5
    few = None if scales_ is None else scales_[..., : 1 if scales == torch.float32 else 16, :]
    size = formula(drawn[..., :16, :], few, None).std().item()
    rows = rows * (std / size)
    if scales_ is None or scales_.dtype == E8M0 or row_scales:
        return pack(drawn, scales_, rows)
    return pack(drawn, (scales_.float() * (std / size)).to(scales_.dtype))


def dense(weight: PackedWeight) -> Tensor:
    """In float64."""
    return formula(*untiled(weight), weight.row_scales)
