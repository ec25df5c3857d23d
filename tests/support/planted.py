"""Kernels for the tests of the check: the emulated ones, of which some are wrong, each its own way.

In a module of its own, for the process that runs them imports it by name.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import emulated


def right() -> dict[str, Callable[..., Any]]:
    kernels = emulated.kernels()
    return {name: getattr(kernels.ops, name) for name in kernels.names}


def one_column(y: Tensor) -> Tensor:
    y[..., 3 % y.shape[-1]] *= 1.1
    return y


def not_a_number(y: Tensor) -> Tensor:
    y[-1, -1] = torch.nan
    return y


def unwritten_row(y: Tensor) -> Tensor:
    made = torch.empty_like(y)
    made[:-1] = y[:-1]
    return made


def from_memory(y: Tensor) -> Tensor:
    """Right where memory happens to hold NaN."""
    return y.where(torch.empty_like(y).isnan(), 2 * y)


def trap(y: Tensor) -> Tensor:
    os.abort()


def hang(y: Tensor) -> Tensor:
    time.sleep(600)


def refuse(y: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more lines")


def first_of(kernel: Callable[..., Any], change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def changed(*arguments: Any) -> Any:
        y = kernel(*arguments)
        return (change(y[0]), *y[1:]) if isinstance(y, tuple) else change(y)

    return changed


def into_arguments(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Writes one element too many, into an input that lies behind."""

    def changed(*arguments: Any) -> Any:
        y = kernel(*arguments)
        arguments[1].view(-1)[0] += 1
        return y

    return changed


FAULTS = {
    "rms_norm": one_column,
    "attention_decode": one_column,
    "add_rms_norm": not_a_number,
    "moe_norm": unwritten_row,
    "geglu": from_memory,
    "moe_experts": torch.Tensor.float,
    "moe_route": lambda weights: weights.flip(0),
    "softcap": trap,
    "softcap_argmax": refuse,
    "ple_gate": hang,
}
# What the check says of those that return, and of two that write where they may not, or do not.
WRONG = {
    "rms_norm": r"gives a wrong result 0: \S+ and not \S+ at \[0, 3\], 3 of 231 values are off$",
    "add_rms_norm": r"gives a wrong result 0: nan and not \S+ at \[2, 76\], 1 of 231 values",
    "moe_norm": r"gives a wrong result 0: nan and not \S+ at \[2, 0\], 77 of 231 values",
    "geglu": "gives other bits in a second run, or where memory held something else",
    "attention_decode": r"gives a wrong result 0: \S+ and not \S+ at \[\d, 0, \d, 3\], ",
    "moe_experts": r"gives a wrong result 0: torch.float32 \[1, 72\] and not torch.bfloat16 \[1",
    "ple_embed": r"gives a wrong table: \S+ and not \S+ at \[0, 0\], 1 of 770 values are off",
    "qkv_norm_rope_cache": r"gives a wrong k_cache: nan and not \S+ at \[0, 1, 0, 0\], 96 of 384",
    "moe_route": r"gives a wrong result 0: \S+ and not \S+ at \[0, ",
}


def wrong() -> dict[str, Callable[..., Any]]:
    kernels = right()
    kernels |= {op: first_of(kernels[op], fault) for op, fault in FAULTS.items()}
    kernels["ple_embed"] = into_arguments(kernels["ple_embed"])
    without_cache = kernels["qkv_norm_rope"]
    kernels["qkv_norm_rope_cache"] = lambda *arguments: without_cache(*arguments[:8])[0]
    return kernels


def none() -> dict[str, Callable[..., Any]]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}
