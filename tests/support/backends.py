"""Where an op is called: on which device, through which functions. What tests and benches share."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import gemma4_kernels
from gemma4_kernels import opset

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# KB of shared memory that a block may have, and whether there is wgmma: what kernels depend on.
CARDS = {
    "99 KB": (99, False),
    "163 KB": (163, False),
    "227 KB": (227, False),
    "Hopper": (227, True),
}


@dataclass(frozen=True)
class Backend:
    """The device of the tensors and the module whose functions are called."""

    name: str
    device: str
    ops: ModuleType = gemma4_kernels

    def to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def randn(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> Tensor:
        return self.to((torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype))

    def weight(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A norm weight; far enough from 1 that a dropped or shifted one shows."""
        return self.randn(*shape, dtype=dtype, mean=1.0, std=0.3)

    def nan(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.to(torch.full(shape, float("nan"), dtype=dtype))

    def int32(self, *values: int) -> Tensor:
        return self.to(torch.tensor(values, dtype=torch.int32))


EAGER = Backend("eager", "cpu")


def in_dtypes(arguments: dict[str, Any], **dtypes: torch.dtype) -> dict[str, Any]:
    """The arguments with some of them, where they are given, in a dtype of their own."""
    cast = {n: arguments[n].to(d) for n, d in dtypes.items() if arguments[n] is not None}
    return arguments | cast


def function(op: str) -> Callable[..., Any]:
    """The public function, or of an op that is a gradient the op itself."""
    return getattr(gemma4_kernels, op, None) or opset.OPS[op].registered
