"""ggml's blocks: neighbouring values of a row with the scales that they share.

Each function takes blocks [M, bytes] and gives their values [M, values] in float32, which equal
what ggml itself makes of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemma4_kernels.packed import E2M1

from ..packed.weight import Packed, Quants

_IQ4 = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32
)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number that begins at a byte of each block, [M, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """The low halves of bytes [..., n], and then the high ones."""
    data = data.contiguous()  # or every operator below walks in strides
    return torch.cat([data & 15, data >> 4], -1)


def _fifth_bits(data: Tensor) -> Tensor:
    """Bit j of four bytes as the fifth bit of value j, [M, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (data[..., None] >> shifts & 1).flatten(1) << 4


def _signed(code: Tensor, half: int) -> Tensor:
    """code - half in float32. (Operators on two dtypes at once are ten times as slow.)"""
    return code.view(torch.int8).sub_(half).float()


def q4_0(x: Tensor) -> Tensor:
    return _signed(_nibbles(x[:, 2:]), 8).mul_(_half(x, 0))


def q4_1(x: Tensor) -> Tensor:
    return _nibbles(x[:, 4:]).float().mul_(_half(x, 0)).add_(_half(x, 2))


def q5_0(x: Tensor) -> Tensor:
    return _signed(_nibbles(x[:, 6:]) | _fifth_bits(x[:, 2:6]), 16).mul_(_half(x, 0))


def q5_1(x: Tensor) -> Tensor:
    code = _nibbles(x[:, 8:]) | _fifth_bits(x[:, 4:8])
    return code.float().mul_(_half(x, 0)).add_(_half(x, 2))


def q8_0(x: Tensor) -> Tensor:
    return x[:, 2:].view(torch.int8).float().mul_(_half(x, 0))


def iq4_nl(x: Tensor) -> Tensor:
    return _half(x, 0) * _IQ4[_nibbles(x[:, 2:]).int()]


def mxfp4(x: Tensor) -> Tensor:
    return torch.exp2(x[:, :1].float() - 127) * E2M1[_nibbles(x[:, 1:]).int()]


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits each, out of twelve bytes: [M, 8] both."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat([low & 63, high & 15 | low >> 6 << 4], 1)
    least = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], 1)
    return scale, least


def _k(x: Tensor, code: Tensor) -> Tensor:
    """d scale code - dmin least, for codes [M, 8, 32]."""
    scale, least = _six_bits(x[:, 4:16])
    d, least = _half(x, 0) * scale, _half(x, 2) * least
    return code.float().mul_(d[..., None]).sub_(least[..., None]).flatten(1)


def _k_codes(data: Tensor) -> Tensor:
    """Of each 32 bytes the low halves and then the high ones: [M, 8, 32]."""
    return _nibbles(data.unflatten(1, (4, 32))).view(-1, 8, 32)


def q4_k(x: Tensor) -> Tensor:
    return _k(x, _k_codes(x[:, 16:]))


def q5_k(x: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    return _k(x, _k_codes(x[:, 48:]) | (x[:, None, 16:48] >> shifts & 1) << 4)


def q6_k(x: Tensor) -> Tensor:
    low = _nibbles(x[:, :128].unflatten(1, (2, 64))).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = x[:, 128:192].view(-1, 2, 1, 32) >> shifts & 3
    code = _signed(low | high << 4, 32).view(-1, 16, 16)
    scale = _half(x, 208) * x[:, 192:208].view(torch.int8)
    return code.mul_(scale[..., None]).flatten(1)


def _words(data: Tensor) -> Tensor:
    """Words of eight codes, [M, 4], of which the first 16 stand in the low halves of 16 bytes.

    In numpy, which shifts whole vectors where torch goes number by number.
    """
    pairs = np.ascontiguousarray(data.numpy()).view(np.uint16)  # the second byte is the high one
    words = np.empty((len(pairs), 16), np.uint8)
    shifted = pairs >> 4
    words[:, :8] = (pairs & 0x0F) | (shifted & 0xF0)
    words[:, 8:] = (shifted & 0x0F) | (pairs >> 8 & 0xF0)
    return torch.from_numpy(words.view(np.int32))


def _d(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16)[:, :1].contiguous()


# Codes and scales of blocks, [M, words or values] and [M, 1], for what the kernels multiply.
QUANTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "Q4_0": lambda x: (_words(x[:, 2:]), _d(x)),
    "Q5_0": lambda x: (
        (_nibbles(x[:, 6:]) | _fifth_bits(x[:, 2:6])).view(torch.int8) - 16,
        _d(x),
    ),
    "Q8_0": lambda x: (x[:, 2:].contiguous().view(torch.int8), _d(x)),
    "IQ4_NL": lambda x: (_IQ4.to(torch.int8)[_nibbles(x[:, 2:]).int()], _d(x)),
    "MXFP4": lambda x: (_words(x[:, 1:]), x[:, :1].contiguous().view(torch.float8_e8m0fnu)),
}

# By ggml's number: the name, values and bytes of a block, and what it holds.
Unpack = Callable[[Tensor], Tensor]
BLOCKS: dict[int, tuple[str, int, int, Unpack]] = {
    2: ("Q4_0", 32, 18, q4_0),
    3: ("Q4_1", 32, 20, q4_1),
    6: ("Q5_0", 32, 22, q5_0),
    7: ("Q5_1", 32, 24, q5_1),
    8: ("Q8_0", 32, 34, q8_0),
    12: ("Q4_K", 256, 144, q4_k),
    13: ("Q5_K", 256, 176, q5_k),
    14: ("Q6_K", 256, 210, q6_k),
    20: ("IQ4_NL", 32, 18, iq4_nl),
    39: ("MXFP4", 32, 17, mxfp4),
}
_BY_NAME = {name: (size, unpack) for name, _, size, unpack in BLOCKS.values()}


@dataclass(frozen=True)
class Blocks(Packed):
    """A tensor of blocks along its last dimension, its only part named after their type."""

    sizes: tuple[int, ...] = ()

    step = 1

    @property
    def kind(self) -> str:
        return next(iter(self.parts))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def check(self) -> None:
        self.expect(self.kind, ("U8",))

    def rows(self, begin: int, end: int, columns: int) -> Tensor:
        block_bytes, unpacked = _BY_NAME[self.kind]
        blocks = self.read(self.kind, begin, end).view(-1, block_bytes)
        values = unpacked(blocks).view(end - begin, columns)
        self.check_finite(self.kind, values)
        return values

    def quants(self, begin: int, end: int, columns: int) -> Quants | None:
        if self.kind not in QUANTS:
            return None
        block_bytes, _ = _BY_NAME[self.kind]
        code, scale = QUANTS[self.kind](self.read(self.kind, begin, end).view(-1, block_bytes))
        self.check_finite(self.kind, scale.float())
        return code.view(end - begin, -1), scale.view(end - begin, -1), None
