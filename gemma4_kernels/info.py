"""Says what this installation is made of."""

from typing import Any

import torch

from . import opset
from .check import record
from .extension import BUILD, covers


def build_info() -> dict[str, Any]:
    """What this installation is made of.

    Returns a dict: `version`, `torch` (its version), `cuda` (True if the compiled kernels are
    loaded), `reason` (why they are not, or None), `archs` (what they are compiled for, as nvcc
    names it), `kernels` (the ops that have one; the others run their eager twins), `toolkit` (the
    CUDA version they are compiled with), `abi_target` (the oldest torch that they load under),
    `device` (the GPU's name, or None), `checked` (what `gemma4 check` said of the kernels on it, or
    None where there are none for it).
    """
    from . import __version__

    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    return {
        "version": __version__,
        "torch": torch.__version__,
        "cuda": BUILD.reason is None,
        "reason": BUILD.reason,
        "archs": list(BUILD.archs),
        "kernels": sorted(opset.kernels.names),
        "toolkit": BUILD.toolkit,
        "abi_target": BUILD.abi_target,
        "device": torch.cuda.get_device_name(gpu) if gpu else None,
        "checked": record.summary(gpu) if gpu and covers(gpu) else None,
    }
