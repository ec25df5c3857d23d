"""Kernels for the tests of the check: the emulated ones, of which some are wrong, each its own way.

In a module of its own, for the process that runs them imports it by name.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import emulated
import torch
from torch import Tensor


def right() -> dict[str, Callable[..., Any]]:
    """Under one schedule, as a GPU runs them once."""
    del emulated.SCHEDULES[1:]
    compiled = emulated.ops().library.compiled

    def kernel(name: str) -> Callable[..., Any]:
        return lambda *arguments: compiled(name, *arguments)

    return {name: kernel(name) for name in emulated.ops_with_kernels()}


def one_column(y: Tensor) -> Tensor:
    y[..., 3 % y.shape[-1]] *= 1.02
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
    "add_rms_norm": not_a_number,
    "moe_norm": unwritten_row,
    "geglu": from_memory,
    "softcap": trap,
    "ple_gate": hang,
    "moe_route": refuse,
}


def wrong() -> dict[str, Callable[..., Any]]:
    kernels = right()
    kernels |= {op: first_of(kernels[op], fault) for op, fault in FAULTS.items()}
    kernels["ple_embed"] = into_arguments(kernels["ple_embed"])
    kernels["qkv_norm_rope_cache"] = lambda *a: first_of(right()["qkv_norm_rope"], lambda q: q)(
        *a[:8]
    )[0]  # writes no cache
    return kernels


def none() -> dict[str, Callable[..., Any]]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}
