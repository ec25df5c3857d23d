"""What the arguments of small calls are drawn from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from ..e4m3 import to_e4m3
from ..packed import pack

HOST = torch.device("cpu")
EPS = 1e-6
Arguments = tuple[Any, ...]  # in the order of the op's schema


@dataclass
class Draw:
    """Random tensors in one dtype; the same ones on whatever device."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def others(self) -> list[torch.dtype]:
        """What x may meet: its own dtype, and fp32 as under autocast."""
        return list(dict.fromkeys((self.dtype, torch.float32)))

    @property
    def pairs(self) -> Iterator[tuple[torch.dtype, torch.dtype]]:
        """The dtypes of a residual or a table, and of the weights, which are no narrower."""
        return combinations_with_replacement(self.others, 2)

    def randn(
        self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * std + mean
        return x.to(self.device, dtype or self.dtype)

    def weight(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.randn(width, mean=1.0, std=0.3, dtype=dtype)

    def strided(self, *shape: int, std: float = 1.0) -> Tensor:
        """Rows that do not lie side by side."""
        width = shape[-1]
        wide = torch.full((*shape[:-1], width + 16), torch.nan, dtype=self.dtype).to(self.device)
        wide[..., :width] = self.randn(*shape, std=std)
        return wide[..., :width]

    def ints(self, *values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)


def packed_weight(draw: Draw, *shape: int, eight: bool) -> list[Tensor]:
    """int4, or float8_e4m3fn, with scales of both kinds; what a schema has of it."""
    *rows, width = shape
    codes = torch.randint(16, shape, generator=draw.generator, dtype=torch.uint8)
    if eight:
        codes = torch.randn(shape, generator=draw.generator).to(torch.float8_e4m3fn)
    each = torch.rand((*rows, width // 32), generator=draw.generator).to(torch.bfloat16)
    row = torch.rand(rows, generator=draw.generator) * width**-0.5
    parts = pack(codes, each, row).parts
    return [part.to(draw.device) for part in parts if part is not None]


def coded(caches: list[Tensor]) -> tuple[Tensor, ...]:
    """Caches in e4m3, and their scales."""
    codes, scales = zip(*map(to_e4m3, caches), strict=True)
    return *codes, *scales
