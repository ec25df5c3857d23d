"""Weights of small integers or floats with a scale for each tensor, row, group or block.

compressed-tensors (pack-quantized, int-quantized, float-quantized, nvfp4, mxfp4), ModelOpt's NVFP4,
fp8 files with `weight_scale_inv`, torchao, bitsandbytes' int8 and Google's mobile files.
"""

import math
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from gemma4_kernels.packed import COLUMNS, E2M1, ROWS

from .weight import Packed, Quants, codes, grouped, nibbles, spread

FLOATS = ("F32", "BF16", "F16")


class GroupedInts(Packed):
    """w = (code - 2^(bits-1) - zero) scale: codes in words, `weight_packed` [N, words]."""

    @cached_property  # it stands in the file
    def shape(self) -> tuple[int, ...]:
        self.expect("weight_shape", ("I64", "I32"), (2,))
        return tuple(self.read("weight_shape").tolist())

    @property
    def bits(self) -> int:
        words, columns = self.parts["weight_packed"].shape[1], self.shape[1]
        fitting = (bits for bits in (4, 8, 2) if -(-columns * bits // 32) == words)
        return next(fitting, 0)

    def check(self) -> None:
        rows, columns = self.shape
        packed = self.expect_matrix("weight_packed", ("I32",))
        if packed[0] != rows or not self.bits:
            wanted = f"hold [{rows}, {columns}] codes of 2, 4 or 8 bits, as weight_shape says"
            self.refuse("weight_packed", wanted, list(packed))
        scale = self.expect("weight_scale", FLOATS)
        groups = scale.shape[-1] if scale.shape else 0
        if scale.shape != (rows, groups) or not self.group_size(columns, groups):
            wanted = f"hold scales of {rows} rows and groups of their {columns} columns"
            self.refuse("weight_scale", wanted, list(scale.shape))
        if "weight_zero_point" in self.parts:
            words = -(-rows * self.bits // 32)
            self.expect("weight_zero_point", ("I32",), (words, groups))
        if "weight_g_idx" in self.parts:
            self.expect("weight_g_idx", ("I32", "I64"), (columns,))

    def rows(self, begin: int, end: int, columns: int) -> Tensor:
        bits = self.bits
        values = codes(self.read("weight_packed", begin, end), bits)[:, :columns].float()
        scale = self.numbers("weight_scale", begin, end)
        # Codes and zero points are both stored more by half their range.
        zero = self.zero(begin, end)
        zero = None if zero is None else zero.float()
        if "weight_g_idx" in self.parts:
            group = self.group_index("weight_g_idx", scale.shape[1])
            values -= 2 ** (bits - 1) if zero is None else zero[:, group]
            return values.mul_(scale[:, group])
        size = self.group_size(columns, scale.shape[1])
        values -= 2 ** (bits - 1) if zero is None else spread(zero, size, columns)
        return grouped(values, scale, size)

    def zero(self, begin: int, end: int) -> Tensor | None:
        """Zero points [n, groups] of rows, which are packed along the rows."""
        if "weight_zero_point" not in self.parts:
            return None
        each = 32 // self.bits
        words = self.read("weight_zero_point", begin // each, -(-end // each))
        return codes(words.T.contiguous(), self.bits).T[: end - begin]

    def quants(self, begin: int, end: int, columns: int) -> Quants | None:
        groups = self.parts["weight_scale"].shape[1]
        if not self.in_order("weight_g_idx", groups) or self.bits == 2:
            return None
        self.numbers("weight_scale", begin, end)
        scales = self.group_scales(self.read("weight_scale", begin, end), columns)
        words, zero = self.read("weight_packed", begin, end), self.zero(begin, end)
        if scales is None or (zero is not None and self.bits == 8):
            return None
        if zero is not None:
            size = self.group_size(columns, groups)
            code = codes(words, 4).view(torch.int8) - spread(zero.view(torch.int8), size, columns)
        else:
            code = words if self.bits == 4 else (codes(words, 8) ^ 128).view(torch.int8)
        return code, *scales


class Scaled(Packed):
    """w = (q - zero) scale, one q an element; block scales by rows and columns."""

    WEIGHTS: ClassVar = ("weight", "_weight_qdata")
    SCALES: ClassVar = ("weight_scale", "weight_scale_inv", "_weight_scale", "SCB")

    @property
    def weight(self) -> str:
        return next(role for role in self.WEIGHTS if role in self.parts)

    @property
    def scale(self) -> str:
        return next(role for role in self.SCALES if role in self.parts)

    @property
    def zero(self) -> str | None:
        return next((role for role in self.parts if role.endswith("weight_zero_point")), None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[self.weight].shape

    @property
    def kind(self) -> str:
        """What one scale is for."""
        rows, columns = self.shape
        shape = self.parts[self.scale].shape
        height, width = self.options.block
        if math.prod(shape) == 1:
            return "tensor"
        if shape in ((rows,), (rows, 1)):
            return "row"
        if shape == (-(-rows // height), -(-columns // width)):
            return "block"
        if len(shape) == 2 and shape[0] == rows and self.group_size(columns, shape[1]):
            return "group"
        return ""

    def check(self) -> None:
        self.expect_matrix(self.weight, ("I8", "F8_E4M3", "F8_E5M2"))
        scale = self.expect(self.scale, FLOATS)
        if not self.kind:
            wanted = f"be a scale of the tensor {list(self.shape)}, its rows, groups or blocks"
            self.refuse(self.scale, wanted, list(scale.shape))
        if self.zero is not None:
            self.expect(self.zero, ("I8", "I32", "I64", "F32"), scale.shape)

    @property
    def step(self) -> int:
        return self.options.block[0]

    def rows(self, begin: int, end: int, columns: int) -> Tensor:
        values = self.read(self.weight, begin, end).float()
        self.check_finite(self.weight, values)
        scale = self._spread(self.numbers(self.scale), begin, end, columns)
        if self.zero is not None:
            values -= self._spread(self.read(self.zero).float(), begin, end, columns)
        if self.scale == "SCB":
            scale = scale / 127
        return values.mul_(scale)

    def quants(self, begin: int, end: int, columns: int) -> Quants | None:
        height, width = self.options.block
        scale, q = self.numbers(self.scale), self.read(self.weight, begin, end)
        if q.dtype == torch.float8_e5m2 or (self.zero and bool(self.read(self.zero).any())):
            return None
        if q.dtype == torch.float8_e4m3fn and bool((q.view(torch.uint8) & 127 == 127).any()):
            self.refuse(self.weight, "hold finite numbers", "nan")
        if self.scale == "SCB":
            scale = scale / 127
        if self.kind == "group":
            scales = self.group_scales(self.read(self.scale, begin, end), columns)
            return None if scales is None else (q, *scales)
        if self.kind == "row":
            return q, None, scale.view(-1)[begin:end]
        if self.kind == "tensor":
            return q, None, scale.view(1).repeat(end - begin)
        if height % ROWS or width % COLUMNS:
            return None
        of_row = torch.arange(begin, end, ROWS) // height
        of_column = torch.arange(0, columns, COLUMNS) // width
        return q, scale[of_row[:, None], of_column], None

    def _spread(self, scale: Tensor, begin: int, end: int, columns: int) -> Tensor:
        """Of each element of the rows [begin, end), or one for all."""
        height, width = self.options.block
        if self.kind == "tensor":
            return scale.view(1, 1)
        if self.kind == "row":
            return scale.view(-1, 1)[begin:end]
        if self.kind == "group":
            return spread(scale[begin:end], self.group_size(columns, scale.shape[1]), columns)
        scale = scale[begin // height : -(-end // height)].repeat_interleave(width, 1)
        return scale.repeat_interleave(height, 0)[: end - begin, :columns]


class Fp4(Packed):
    """w = e2m1 (scale / global), or e2m1 (scale scale_2), or e2m1 2^(scale - 127)."""

    @property
    def weight(self) -> str:
        return "weight_packed" if "weight_packed" in self.parts else "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[self.weight].shape
        return (*shape[:-1], 2 * shape[-1])

    @property
    def group(self) -> int:
        return 16 if self.parts["weight_scale"].dtype == "F8_E4M3" else 32

    def check(self) -> None:
        self.expect_matrix(self.weight, ("U8",))
        rows, columns = self.shape
        self.expect("weight_scale", ("F8_E4M3", "U8", "F8_E8M0"), (rows, -(-columns // self.group)))
        for role in ("weight_global_scale", "weight_scale_2"):
            if role in self.parts:
                self.expect(role, ("F32",), (), (1,))

    def rows(self, begin: int, end: int, columns: int) -> Tensor:
        values = E2M1[nibbles(self.read(self.weight, begin, end)).int()]
        if self.parts["weight_scale"].dtype != "F8_E4M3":
            exponent = self.read("weight_scale", begin, end).view(torch.uint8).float() - 127
            if bool((exponent == 128).any()):
                self.refuse("weight_scale", "hold finite numbers", "nan")
            return grouped(values, torch.exp2(exponent), self.group)
        scale = self.numbers("weight_scale", begin, end)
        whole = self._divisor()
        scale = scale * self.numbers("weight_scale_2") if whole is None else scale / whole
        return grouped(values, scale, self.group)

    def quants(self, begin: int, end: int, columns: int) -> Quants | None:
        code = self.read(self.weight, begin, end).view(torch.int32)
        scale = self.read("weight_scale", begin, end)
        if self.group == 32:
            scale = scale.view(torch.uint8)
            if bool((scale == 255).any()):
                self.refuse("weight_scale", "hold finite numbers", "nan")
            return code, scale.view(torch.float8_e8m0fnu), None
        self.check_finite("weight_scale", scale.float())
        whole = self._divisor()
        factor = self.numbers("weight_scale_2") if whole is None else 1 / whole
        return code, scale, factor.view(1).repeat(end - begin)

    def _divisor(self) -> Tensor | None:
        """Of all scales; None where there is a factor instead."""
        if "weight_global_scale" not in self.parts:
            return None
        whole = self.numbers("weight_global_scale")
        if not bool(whole.all()):
            self.refuse("weight_global_scale", "be a divisor", 0)
        return whole


class LowBits(Packed):
    """w = (code - 2^(bits-1)) scale of the row; how many bits, the model's width says."""

    @property
    def weight(self) -> str:
        return "weight" if "weight" in self.parts else "embedding_quantized"

    @property
    def scale(self) -> str:
        return "weight_scale" if self.weight == "weight" else "embedding_scale"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[self.weight].shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        rows, width = self.shape
        return len(shape) == 2 and rows == shape[0] and 8 * width in (2 * shape[1], 4 * shape[1])

    def check(self) -> None:
        rows, _ = self.expect_matrix(self.weight, ("U8",))
        self.expect(self.scale, FLOATS, (rows, 1), (rows,))

    def rows(self, begin: int, end: int, columns: int) -> Tensor:
        data = self.read(self.weight, begin, end)
        bits = data.shape[1] * 8 // columns
        scale = self.numbers(self.scale, begin, end).view(-1, 1)
        return (codes(data, bits).float() - 2 ** (bits - 1)) * scale

    def quants(self, begin: int, end: int, columns: int) -> Quants | None:
        data = self.read(self.weight, begin, end)
        scale = self.numbers(self.scale, begin, end).view(-1)
        if data.shape[1] * 2 == columns:
            return data.view(torch.int32), None, scale
        return codes(data, 2) + (8 - 2), None, scale  # four bits stand for 8 less
