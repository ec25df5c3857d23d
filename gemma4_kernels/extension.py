"""Finds the compiled CUDA library and says which build it is, or why there is none."""

from typing import Any

import torch

# The eager twins serve every device until a compiled library registers CUDA kernels over them.
_REASON = "this build holds no compiled CUDA kernels; every op runs its eager twin"


def build_info() -> dict[str, Any]:
    """What this installation is made of.

    Returns a dict: `version`, `torch` (its version), `cuda` (True if compiled kernels are in use),
    `reason` (why they are not, or None), `archs` (compiled compute capabilities), `device` (the
    GPU's name, or None).
    """
    from . import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "version": __version__,
        "torch": torch.__version__,
        "cuda": False,
        "reason": _REASON,
        "archs": [],
        "device": device,
    }
