"""A decoding step compiled for the CPU, where a step is hundreds of small operators."""

import functools
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4_kernels import opset
from gemma4_kernels.reference.traced import TRACED

from .cache import Cache

if TYPE_CHECKING:
    from .decode import Decoder

# Of one process: each model, dtype and batch size takes one.
MOST_STEPS = 64


def prepare(cache: Cache) -> None:
    """For steps that are to be compiled; raises ValueError for another device than the CPU, and
    RuntimeError where there is no C++ compiler."""
    if cache.device.type != "cpu":
        raise ValueError(f"compile is for a CPU, got {cache.device}: a GPU runs a CUDA graph")
    if cache.kv_dtype is not None:
        raise ValueError(f"compile takes no cache in fp8, got kv_dtype {cache.kv_dtype!r}")
    import torch._inductor.config as inductor

    names = [name for name in inductor.cpp.cxx if name]
    if not any(map(shutil.which, names)):
        raise RuntimeError(f"compile needs a C++ compiler, and there is no {' or '.join(names)}")
    for layer, k in cache.k.items():
        for store in (k, cache.v[layer]):
            # Compiled attention multiplies all slots, and what it does not see by 0: not by NaN.
            for row, length in zip(store, cache.lengths, strict=True):
                row[length:] = 0
            if not cache.is_ring(layer):
                torch._dynamo.maybe_mark_dynamic(store, 1)


def step(decoder: "Decoder", ids_B: Tensor) -> Tensor:
    """`decoder.forward(ids_B)`, compiled at the first call for such a model and batch.

    A step must have run before: it has asked which modules are plain, and its answers are built in.
    """
    import torch._dynamo.config as dynamo

    with opset.showing(TRACED), dynamo.patch(recompile_limit=MOST_STEPS):
        return _compiled()(decoder, ids_B)


@functools.cache
def _compiled() -> Callable[["Decoder", Tensor], Tensor]:
    """One for all decoders: what was compiled for one serves the next, too."""
    from .decode import Decoder

    return torch.compile(Decoder.forward, fullgraph=True)
