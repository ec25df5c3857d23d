"""A weight of four or eight bits a number, in the order in which the kernels read it.

w[n, d] = number(code[n, d]) · scale · row_scale[n], of which a scale or a row scale may be absent.

Its dtypes say what it is:

    codes                      numbers                scales
    uint8, two codes each      code - 8               bfloat16 or float16, each for 32 columns
    uint8, two codes each      e2m1                   float8_e4m3fn, each for 16 columns
    uint8, two codes each      e2m1                   float8_e8m0fnu, each for 32 columns
    int8 or float8_e4m3fn      the dtype's            bfloat16 or float16, each for 32 columns
    int8 or float8_e4m3fn      the dtype's            float32, each for a tile
    uint8, int8, float8_e4m3fn code - 8 or as above   none

Weight [N, D] lies in tiles of 16 rows and 64 columns, [N / 16, D / 64] of them. A lane of a warp
owns rows r and r + 8 of a tile, r = lane / 4, and of each half of 32 columns the 8 that begin with
lane % 4 · 8: what it must have of the matrix operand of `mma.m16n8k16`, up to an order of columns
that both operands share. Four bits: codes [..., 512], of each lane 16 bytes, [half, r or r + 8, 4
bytes], in which columns 0 2 4 6 1 3 5 7 stand from the lowest four bits up, so that a shift and a
mask give two neighbours in the halves of a word. Eight bits: codes [..., 1024], [half, lane, r or
r + 8, 8 bytes]. Scales of a tile, [..., 32] or [..., 64]: [r, r or r + 8, columns].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .reference.common import check_same_device, check_shape

Words: TypeAlias = npt.NDArray[np.signedinteger]

ROWS, COLUMNS = 16, 64  # of a tile
CODES = (torch.uint8, torch.int8, torch.float8_e4m3fn)
HALF_SCALES = (torch.bfloat16, torch.float16)
# Columns that share a scale, by its dtype; float32 is a tile's.
GROUPS = {
    torch.bfloat16: 32,
    torch.float16: 32,
    torch.float8_e4m3fn: 16,
    torch.float8_e8m0fnu: 32,
}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*_E2M1, *(-value for value in _E2M1)])


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, D], or [E, N, D] of experts, as the module's docstring says.

    codes [..., N / 16, D / 64, 512 or 1024]; scales [..., N / 16, D / 64, 32 or 64], or float32
    [..., N / 16, D / 64]; row_scales [..., N] float32.
    """

    codes: Tensor
    scales: Tensor | None = None
    row_scales: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (..., N, D)."""
        *experts, rows, columns, _ = self.codes.shape
        return (*experts, rows * ROWS, columns * COLUMNS)

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.codes, self.scales, self.row_scales

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str) -> "PackedWeight":
        return self._each(lambda part: part.to(device))

    def __getitem__(self, expert: int) -> "PackedWeight":
        """One expert's weight."""
        return self._each(lambda part: part[expert])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PackedWeight":
        scales, row_scales = (None if p is None else change(p) for p in self.parts[1:])
        return PackedWeight(change(self.codes), scales, row_scales)

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of a weight [N, D], float32; both are multiples of 16, or end is N."""
        tiles = slice(begin // ROWS, -(-end // ROWS))
        scales = None if self.scales is None else self.scales[tiles]
        if scales is not None and scales.dtype in GROUPS:
            scales = _untiled_scales(scales)
        elif scales is not None:
            scales = scales.repeat_interleave(ROWS, 0)
        row_scales = None if self.row_scales is None else self.row_scales[begin:end]
        return _values(_untiled_codes(self.codes[tiles]), scales, row_scales)

    def at(self, indices: Tensor) -> Tensor:
        """The rows [T, D] of a weight [N, D] at indices [T], float32."""
        tile, r, hi = indices // ROWS, indices % 8, indices % ROWS // 8
        codes = self.codes.view(torch.uint8)
        if self.codes.dtype == torch.uint8:
            lanes = codes.unflatten(-1, (8, 4, 2, 2, 4))[tile, :, r, :, :, hi]
            # Now [T, D / 64, lane % 4, half, 4 bytes].
            raw = _columns(lanes).transpose(2, 3).flatten(1)
        else:
            lanes = codes.unflatten(-1, (2, 8, 4, 2, 8))[tile, :, :, r, :, hi]
            raw = lanes.flatten(1).view(self.codes.dtype)
        scales = self.scales
        if scales is not None and scales.dtype in GROUPS:
            small = scales.view(torch.uint8) if scales.itemsize == 1 else scales
            scales = small.unflatten(-1, (8, 2, -1))[tile, :, r, hi].flatten(1).view(scales.dtype)
        elif scales is not None:
            scales = scales[tile]
        row_scales = None if self.row_scales is None else self.row_scales[indices]
        return _values(raw, scales, row_scales)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight itself; products are made in float32 and rounded once."""
        if self.codes.ndim == 4:
            return torch.stack([self[e].dense(dtype) for e in range(len(self.codes))])
        return self.rows(0, self.shape[0]).to(dtype)


Weight: TypeAlias = Tensor | PackedWeight


def pack(
    codes: Tensor, scales: Tensor | None = None, row_scales: Tensor | None = None
) -> PackedWeight:
    """Packs codes [..., N, D] that lie in rows: uint8 of four bits each, int8 or float8_e4m3fn; or
    int32 [..., N, D / 8], eight codes of four bits each, the lowest bits first.

    scales [..., N, D / 32 or 16], or float32 [..., N / 16, D / 64]; row_scales [..., N] float32.
    Raises ValueError where N is no multiple of 16, D none of 64, or the parts do not go together.
    """
    words = _words(codes)
    rows, columns = words.shape[-2], words.shape[-1] * 8
    if rows % ROWS or columns % COLUMNS or not rows or not columns:
        raise ValueError(
            f"a packed weight must have rows in multiples of {ROWS} and columns in multiples of "
            f"{COLUMNS}, got {[*words.shape[:-2], rows, columns]}"
        )
    four = words.dtype == np.int32
    words = words.reshape(-1, rows // ROWS, 2, 8, columns // COLUMNS, 2, 4)
    _, t, hi, r, c, half, q = range(7)
    order = (t, c, r, q, half, hi) if four else (t, c, half, r, q, hi)
    tiles = torch.from_numpy(np.ascontiguousarray(words.transpose(0, *order)))
    tiles = tiles.flatten(3).view(torch.uint8 if four else codes.dtype)
    packed = tiles.view(*codes.shape[:-2], *tiles.shape[1:]).to(codes.device)
    if scales is not None and scales.dtype in GROUPS:
        each = COLUMNS // GROUPS[scales.dtype]
        raw = scales.cpu().contiguous().view(torch.uint8 if scales.itemsize == 1 else torch.int16)
        *lead, height, groups = scales.shape
        split = raw.numpy().reshape(-1, height // ROWS, 2, 8, groups // each, each)
        tiles = torch.from_numpy(np.ascontiguousarray(split.transpose(0, 1, 4, 3, 2, 5)))
        tiles = tiles.view(*lead, height // ROWS, groups // each, ROWS * each)
        scales = tiles.view(scales.dtype).to(scales.device)
    weight = PackedWeight(packed, scales, row_scales)
    check("weight", *weight.parts)
    return weight


def _words(codes: Tensor) -> Words:
    """What a lane has of a row, 8 columns a word: [..., N, D / 8]. (numpy shifts whole vectors.)"""
    if codes.dtype in (torch.int8, torch.float8_e4m3fn):
        return codes.cpu().contiguous().view(torch.int64).numpy()
    if codes.dtype == torch.uint8:
        codes = halves(codes).view(torch.int32)
    # From 0 1 2 3 4 5 6 7 to 0 2 1 3 4 6 5 7, and by bytes on to 0 2 4 6 1 3 5 7.
    words: Words = codes.cpu().numpy().copy()
    for bits, mask in ((4, 0x00F000F0), (8, 0x0000FF00)):
        unlike = words >> bits
        unlike ^= words
        unlike &= mask
        words ^= unlike
        unlike <<= bits
        words ^= unlike
    return words


def halves(codes: Tensor) -> Tensor:
    """Codes [..., n] of four bits, two a byte [..., n / 2], the first one in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def group_scales(scale: Tensor, columns: int) -> tuple[Tensor | None, Tensor | None] | None:
    """Scales [N, n] of equal groups of a row's columns as scales and row scales that `pack` takes;
    None where groups are no multiples of 32 columns or their scales are of no 16-bit dtype."""
    groups = scale.shape[1]
    if groups == 1:
        return None, scale[:, 0].float()
    if scale.dtype not in HALF_SCALES or columns % (groups * GROUPS[scale.dtype]):
        return None
    return scale.repeat_interleave(columns // groups // GROUPS[scale.dtype], 1), None


def check(name: str, codes: Tensor, scales: Tensor | None, row_scales: Tensor | None) -> None:
    """TypeError or ValueError where these are no packed weight, in the words of an op's check."""
    if codes.dtype not in CODES:
        raise TypeError(
            f"{name} must hold codes in uint8, int8 or float8_e4m3fn, got {codes.dtype}"
        )
    four = codes.dtype == torch.uint8
    if codes.ndim not in (3, 4) or codes.shape[-1] != (512 if four else 1024):
        size = 512 if four else 1024
        raise ValueError(f"{name} must be [..., N / 16, D / 64, {size}], got {list(codes.shape)}")
    *tiles, _ = codes.shape
    if scales is not None:
        allowed = (*HALF_SCALES, *((torch.float8_e4m3fn, torch.float8_e8m0fnu) if four else ()))
        allowed = allowed if four else (*allowed, torch.float32)
        if scales.dtype not in allowed:
            raise TypeError(
                f"{name}_scales must be {' or '.join(map(str, allowed))} for codes in "
                f"{codes.dtype}, got {scales.dtype}"
            )
        group = GROUPS.get(scales.dtype)
        want = tiles if group is None else [*tiles, ROWS * COLUMNS // group]
        check_shape(f"{name}_scales", scales, tuple(want))
        check_same_device(f"{name}_scales", scales, name, codes)
    if row_scales is not None:
        if row_scales.dtype != torch.float32:
            raise TypeError(f"{name}_row_scales must be float32, got {row_scales.dtype}")
        check_shape(f"{name}_row_scales", row_scales, (*tiles[:-2], tiles[-2] * ROWS))
        check_same_device(f"{name}_row_scales", row_scales, name, codes)


def untiled(weight: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """Codes [..., N, D] in rows and scales as `pack` takes them: its inverse."""
    scales = weight.scales
    if scales is not None and scales.dtype in GROUPS:
        scales = _untiled_scales(scales)
    return _untiled_codes(weight.codes), scales


def _untiled_codes(codes: Tensor) -> Tensor:
    *lead, rows, columns, _ = codes.shape
    shape = (*lead, rows * ROWS, columns * COLUMNS)
    n = len(lead)
    t, c = n, n + 1
    if codes.dtype == torch.uint8:
        raw = _columns(codes.unflatten(-1, (8, 4, 2, 2, 4)))  # [..., r, q, half, hi, column]
        r, q, half, hi, j = (n + 2 + i for i in range(5))
    else:
        raw = codes.view(torch.uint8).unflatten(-1, (2, 8, 4, 2, 8))
        half, r, q, hi, j = (n + 2 + i for i in range(5))
    raw = raw.permute(*range(n), t, hi, r, c, half, q, j).reshape(shape)
    return raw if codes.dtype == torch.uint8 else raw.view(codes.dtype)


def _columns(words: Tensor) -> Tensor:
    """The eight codes [..., 8] of a word's four bytes [..., 4], in the order of their columns."""
    halves = torch.stack([words & 15, words >> 4], -1)  # columns 0 2, 4 6, 1 3 and 5 7
    return halves.flatten(-2).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)


def _untiled_scales(scales: Tensor) -> Tensor:
    """[..., N / 16, D / 64, 16 n] to [..., N, D / 64 n]."""
    raw = scales.view(torch.uint8) if scales.itemsize == 1 else scales
    raw = raw.unflatten(-1, (8, 2, -1))
    n = raw.ndim - 5
    raw = raw.permute(*range(n), n, n + 3, n + 2, n + 1, n + 4)
    raw = raw.flatten(-2).flatten(-4, -2)
    return raw.contiguous().view(scales.dtype)


def _values(codes: Tensor, scales: Tensor | None, row_scales: Tensor | None) -> Tensor:
    """What codes and scales in rows stand for, [N, D] float32."""
    if codes.dtype != torch.uint8:
        values = codes.float()
    elif scales is None or scales.dtype in HALF_SCALES:
        values = codes.float() - 8
    else:
        values = E2M1.to(codes.device)[codes.int()]
    if scales is not None:
        values = values.unflatten(-1, (scales.shape[-1], -1)) * scales.float()[..., None]
        values = values.flatten(-2)
    return values if row_scales is None else values * row_scales[:, None]


def cat(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat, of dtypes that it does not know too."""
    if parts[0].itemsize > 1:
        return torch.cat(list(parts))
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
