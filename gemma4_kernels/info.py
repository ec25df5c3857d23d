"""Says what this installation is made of."""

from typing import Any

import torch

from . import opset
from .extension import BUILD


def build_info() -> dict[str, Any]:
    """What this installation is made of.

    Returns a dict: `version`, `torch` (its version), `cuda` (True if the compiled kernels are
    loaded), `reason` (why they are not, or None), `archs` (what they are compiled for, as nvcc
    names it), `kernels` (the ops that have one; the others run their eager twins), `toolkit` (the
    CUDA version they are compiled with), `abi_target` (the oldest torch that they load under),
    `device` (the GPU's name, or None).
    """
    from . import __version__

    return {
        "version": __version__,
        "torch": torch.__version__,
        "cuda": BUILD.reason is None,
        "reason": BUILD.reason,
        "archs": list(BUILD.archs),
        "kernels": sorted(opset.kernels.names),
        "toolkit": BUILD.toolkit,
        "abi_target": BUILD.abi_target,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
