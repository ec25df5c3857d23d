"""A quantised weight, whatever its format: where it lies, what it must have, how it is unpacked."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

from gemma4_kernels.packed import group_scales

from .. import tensorfile
from ..tensorfile import Entry

# Of float32 values, unpacked at once: the allocator hands such pieces out again, where large ones
# are new memory each time, and most of the time would go into the kernel's zeros.
PIECE_BYTES = 2**20
# Codes, scales and row scales in rows, as `gemma4_kernels.packed.pack` takes them.
Quants: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Options:
    """What a config says of its quantised weights that their tensors leave open."""

    method: str = "unknown"
    # Of scales that stand for blocks of rows and columns.
    block: tuple[int, int] = (128, 128)
    # Columns that share a scale, where a config gives them: one size, or several in one file.
    groups: tuple[int, ...] = ()
    # GPTQ's first format stores each zero point less one.
    zero_offset: int = 1


@dataclass(frozen=True)
class Packed(ABC):
    """A weight [N, D] that `parts` of a checkpoint make, by the ends of their names."""

    name: str
    parts: dict[str, Entry]
    options: Options = field(repr=False)

    def __post_init__(self) -> None:
        self.check()

    @property
    def file(self) -> Path:
        return next(iter(self.parts.values())).file

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return sum(part.size for part in self.parts.values())

    @property
    def step(self) -> int:
        """Rows that can be unpacked by themselves come in multiples of it; 0: only all of them."""
        return 128

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the unpacked weight, as far as the file says it."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.shape == shape

    @abstractmethod
    def check(self) -> None:
        """ValueError, naming the tensor, where the parts do not go together."""

    @abstractmethod
    def rows(self, begin: int, end: int, columns: int) -> Tensor:
        """Rows [begin, end) of the weight, float32."""

    def quants(self, begin: int, end: int, columns: int) -> Quants | None:
        """The same numbers in a form that the kernels multiply, one form for all rows; None where
        there is none that holds them. begin and end are multiples of 16."""
        return None

    def pieces(self, rows: int, columns: int, least: int = 1) -> Iterator[tuple[int, int]]:
        """All rows by turns, as many as are unpacked at once, a multiple of `least`."""
        each = math.lcm(self.step, least) if self.step else rows
        step = max(PIECE_BYTES // (4 * max(columns, 1)) // max(each, 1), 1) * each
        for begin in range(0, rows, max(step, 1)):
            yield begin, min(begin + step, rows)

    def group_size(self, columns: int, groups: int) -> int:
        """Of columns that share a scale; 0 if there is none that makes as many groups."""
        for size in (*self.options.groups, columns // max(groups, 1)):
            if size and -(-columns // size) == groups:
                return size
        return 0

    def expect(self, role: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> Entry:
        """The part, if it is there in one of these dtypes and, if any are given, shapes."""
        part = self.parts.get(role)
        if part is None:
            raise ValueError(f"{self.file}: {self.name} lacks its tensor {role}")
        if part.dtype not in dtypes:
            self.refuse(role, f"be {' or '.join(dtypes)}", part.dtype)
        if shapes and part.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            self.refuse(role, f"have shape {wanted}", list(part.shape))
        return part

    def expect_matrix(self, role: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
        """The part's two sizes."""
        shape = self.expect(role, dtypes).shape
        if len(shape) != 2:
            self.refuse(role, "have two dimensions", list(shape))
        return shape[0], shape[1]

    def group_index(self, role: str, groups: int) -> Tensor:
        """The group of each column, where they are out of order."""
        index = self.read(role).long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
            self.refuse(role, f"number the {groups} groups", "one past them")
        return index

    def group_scales(
        self, scale: Tensor, columns: int
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """As `gemma4_kernels.packed.group_scales`; None too where the last group is short."""
        groups = scale.shape[1]
        if groups > 1 and self.group_size(columns, groups) * groups != columns:
            return None
        return group_scales(scale, columns)

    def in_order(self, role: str, groups: int) -> bool:
        """Whether columns lie in the order of their groups: what says otherwise may be absent."""
        if role not in self.parts:
            return True
        index = self.group_index(role, groups)
        return bool((index == torch.arange(len(index)) // -(-len(index) // groups)).all())

    def refuse(self, role: str, requirement: str, got: object) -> NoReturn:
        part = self.parts[role]
        raise ValueError(f"{part.file}: tensor {part.name} must {requirement}, got {got}")

    def read(self, role: str, begin: int = 0, end: int | None = None) -> Tensor:
        return tensorfile.read_rows(self.parts[role], begin, end)

    def numbers(self, role: str, begin: int = 0, end: int | None = None) -> Tensor:
        """The same in float32; ValueError where one of them is not finite."""
        values = self.read(role, begin, end).float()
        self.check_finite(role, values)
        return values

    def check_finite(self, role: str, values: Tensor) -> None:
        # One fast pass: what is not finite makes the sum so, and weights do not overflow it.
        if not math.isfinite(float(values.sum())):
            self.refuse(role, "hold finite numbers", "nan or inf")

    def fill(self, target: Tensor) -> None:
        """Unpacks the weight into `target`, of its shape and any dtype and device."""
        target = target.view(-1, target.shape[-1])
        rows, columns = target.shape
        for begin, end in self.pieces(rows, columns):
            target[begin:end] = self.rows(begin, end, columns)


def nibbles(data: Tensor, high_first: bool = False) -> Tensor:
    """The halves [..., 2 n] of bytes [..., n], the low one first."""
    wide = data.to(torch.int16)
    low, high = (wide >> 4, wide & 15) if high_first else (wide & 15, wide >> 4)
    return (low | high << 8).view(torch.uint8)  # two bytes of a little-endian number


def codes(data: Tensor, bits: int) -> Tensor:
    """The numbers of 2, 4 or 8 bits in integers, the lowest bits first, as bytes."""
    data = data.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    if bits == 4:
        return nibbles(data)
    return torch.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)


def grouped(values: Tensor, scale: Tensor, size: int) -> Tensor:
    """values [N, D] times their groups' scales [N, n], in place."""
    rows, columns = values.shape
    if columns != size * scale.shape[1]:
        return values.mul_(spread(scale, size, columns))
    return values.view(rows, -1, size).mul_(scale[..., None]).view(rows, columns)


def spread(scale: Tensor, size: int, columns: int) -> Tensor:
    """A scale a group [..., n] as one a column [..., columns]; the last group may be short."""
    return scale.repeat_interleave(size, -1)[..., :columns]
