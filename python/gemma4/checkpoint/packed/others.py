"""Weights that are stored turned or flattened: GPTQ, AWQ, bitsandbytes' four bits."""

import json
import math
from abc import abstractmethod
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ...files import short
from .scaled import FLOATS
from .weight import Packed, Quants, codes, nibbles


class Turned(Packed):
    """w[out, in] = (q - z) scale of the group of `in`: `scales` [groups, N], `qzeros` beside it."""

    step = 0  # rows are the columns of what is stored

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a code."""

    @property
    def groups(self) -> int:
        return self.parts["scales"].shape[0]

    def check_sides(self, rows: int, words: int, columns: int) -> None:
        scales = self.expect("scales", FLOATS)
        if len(scales.shape) != 2 or scales.shape[1] != rows or not self.groups:
            self.refuse("scales", f"hold groups of {rows} scales", list(scales.shape))
        self.expect("qzeros", ("I32",), (self.groups, words))
        if "g_idx" in self.parts:
            self.expect("g_idx", ("I32", "I64"), (columns,))
        elif columns % self.groups:
            self.refuse("scales", f"divide {columns} columns into groups", self.groups)

    def group(self, columns: int) -> Tensor:
        """The group of each column."""
        if "g_idx" not in self.parts:
            return torch.arange(columns) // (columns // self.groups)
        return self.group_index("g_idx", self.groups)

    @abstractmethod
    def stored(self) -> tuple[Tensor, Tensor]:
        """Codes [D, N] as bytes and zero points [groups, N] as integers."""

    def rows(self, begin: int, end: int, columns: int) -> Tensor:
        code, zero = self.stored()
        group, scale = self.group(columns), self.numbers("scales")
        return ((code.float() - zero.float()[group]) * scale[group]).T[begin:end]

    def quants(self, begin: int, end: int, columns: int) -> Quants | None:
        if columns % self.groups or not self.in_order("g_idx", self.groups):
            return None
        self.numbers("scales")
        scales = self.group_scales(self.read("scales").T.contiguous(), columns)
        code, zero = self.stored()
        code, in_middle = code.T.contiguous(), bool((zero == 2 ** (self.bits - 1)).all())
        if scales is None or not (in_middle or self.bits == 4):
            return None
        if not in_middle:
            each = columns // self.groups
            code = code.view(torch.int8) - zero.to(torch.int8).T.repeat_interleave(each, 1)
        elif self.bits == 8:
            code = (code ^ 128).view(torch.int8)
        return code, *scales


class Gptq(Turned):
    """`qweight` [D bits / 32, N], codes along D; `qzeros` [groups, N bits / 32]."""

    @property
    def bits(self) -> int:
        return 32 * self.parts["qzeros"].shape[-1] // max(self.parts["scales"].shape[-1], 1)

    @property
    def shape(self) -> tuple[int, ...]:
        words, rows = self.expect("qweight", ("I32",)).shape
        return rows, words * 32 // self.bits

    def check(self) -> None:
        for role in ("qweight", "qzeros", "scales"):
            self.expect_matrix(role, ("I32", *FLOATS))
        if self.bits not in (2, 4, 8):
            self.refuse("qzeros", "hold codes of 2, 4 or 8 bits", f"{self.bits} bits")
        rows, columns = self.shape
        self.check_sides(rows, rows * self.bits // 32, columns)

    def stored(self) -> tuple[Tensor, Tensor]:
        code = codes(self.read("qweight").T.contiguous(), self.bits).T
        return code, codes(self.read("qzeros"), self.bits).int() + self.options.zero_offset


class Awq(Turned):
    """`qweight` [D, N / 8], eight columns a word in an order of their own."""

    bits = 4
    ORDER: ClassVar = (0, 4, 1, 5, 2, 6, 3, 7)

    @property
    def shape(self) -> tuple[int, ...]:
        columns, words = self.expect("qweight", ("I32",)).shape
        return 8 * words, columns

    def check(self) -> None:
        self.expect_matrix("qweight", ("I32",))
        rows, columns = self.shape
        self.check_sides(rows, rows // 8, columns)

    def stored(self) -> tuple[Tensor, Tensor]:
        code, zero = (
            codes(self.read(role), 4).unflatten(1, (-1, 8))[..., self.ORDER].flatten(1)
            for role in ("qweight", "qzeros")
        )
        return code, zero.int()


class Nf4(Packed):
    """w = map[code] absmax of the block, over the matrix as one row; the high half of a byte first.

    absmax itself may be packed: nested_map[byte] nested_absmax of the block + offset.
    """

    STATE: ClassVar = "weight.quant_state.bitsandbytes__"

    @property
    def state(self) -> str:
        return next(role for role in self.parts if role.startswith(self.STATE))

    @cached_property  # it stands in the file
    def said(self) -> dict[str, object]:
        try:
            said = json.loads(bytes(self.read(self.state).tolist()))
            return {name: said[name] for name in said}
        except (ValueError, TypeError, RecursionError):
            self.refuse(self.state, "hold a JSON object", "something else")

    def number(self, name: str) -> int:
        value = self.said.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(self.state, f"give {name} as a whole number", short(value))
        return value

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.said.get("shape")
        if (
            not isinstance(shape, list)
            or len(shape) != 2
            or not all(isinstance(size, int) and 0 < size < 2**31 for size in shape)
        ):
            self.refuse(self.state, "give the shape of a matrix", short(shape))
        return tuple(shape)

    def check(self) -> None:
        part = self.expect(self.state, ("U8",))
        if part.size > 4096 or len(part.shape) != 1:
            self.refuse(self.state, "be a short text", f"{part.size} bytes")
        count = math.prod(self.shape)
        self.expect("weight", ("U8",), (-(-count // 2), 1), (-(-count // 2),))
        self.expect("weight.quant_map", ("F32",), (16,))
        blocks = -(-count // self.number("blocksize"))
        if "weight.nested_absmax" not in self.parts:
            self.expect("weight.absmax", ("F32",), (blocks,))
            return
        self.expect("weight.absmax", ("U8",), (blocks,))
        outer = -(-blocks // self.number("nested_blocksize"))
        self.expect("weight.nested_absmax", ("F32",), (outer,))
        self.expect("weight.nested_quant_map", ("F32",), (256,))

    def absmax(self, begin: int, end: int) -> Tensor:
        """Of the blocks [begin, end)."""
        if "weight.nested_absmax" not in self.parts:
            return self.numbers("weight.absmax", begin, end)
        size = self.number("nested_blocksize")
        outer = self.numbers("weight.nested_absmax", begin // size, -(-end // size))
        code = self.read("weight.absmax", begin, end).int()
        nested = self.numbers("weight.nested_quant_map")[code]
        each = outer.repeat_interleave(size)[begin % size :][: end - begin]
        offset = self.said.get("nested_offset", 0.0)
        if not isinstance(offset, int | float) or not math.isfinite(offset):
            self.refuse(self.state, "give nested_offset as a number", short(offset))
        return nested * each + offset

    def rows(self, begin: int, end: int, columns: int) -> Tensor:
        first, last, size = begin * columns, end * columns, self.number("blocksize")
        # A multiple of 128 rows begins with a whole byte, but not always with a whole block.
        data = self.read("weight", first // 2, -(-last // 2)).flatten()
        values = self.numbers("weight.quant_map")[nibbles(data, True).int()][: last - first]
        scale = self.absmax(first // size, -(-last // size)).repeat_interleave(size)
        return (values * scale[first % size :][: last - first]).view(end - begin, columns)
