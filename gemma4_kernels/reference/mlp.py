"""Twin and check of `ops/mlp.py`."""

import torch.nn.functional as F
from torch import Tensor

from .common import check_floating, finite

__all__ = ["geglu"]


def check_geglu(gate_up: Tensor) -> None:
    check_floating("gate_up", gate_up)
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2 != 0:
        raise ValueError(
            f"gate_up must end in an even width, gate then up, got {list(gate_up.shape)}"
        )


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return finite(F.gelu(gate, approximate="tanh") * up).contiguous()
