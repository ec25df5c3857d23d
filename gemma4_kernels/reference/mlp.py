"""Twin and check of `ops/mlp.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import check_floating, check_like, check_shape, finite

__all__ = ["geglu", "geglu_backward"]


def check_geglu(gate_up: Tensor) -> None:
    check_floating("gate_up", gate_up)
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2 != 0:
        raise ValueError(
            f"gate_up must end in an even width, gate then up, got {list(gate_up.shape)}"
        )


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return finite(F.gelu(gate, approximate="tanh") * up).contiguous()


def check_geglu_backward(grad: Tensor, gate_up: Tensor) -> None:
    check_geglu(gate_up)
    check_like("grad", grad, "gate_up", gate_up)
    check_shape("grad", grad, (*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def geglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.cat(gelu_mul_backward(grad, *gate_up.chunk(2, -1)), -1)


def gelu_mul_backward(grad: Tensor, gate: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Of finite(gelu_tanh(gate) other): what was held at fp16's largest number passes nothing."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    dy, x, factor = (t.to(dtype) for t in (grad, gate, other))
    gelu = F.gelu(x, approximate="tanh")
    if grad.dtype == torch.float16:
        dy = dy.masked_fill((gelu * factor).abs() > torch.finfo(torch.float16).max, 0.0)
    d_gate = torch.ops.aten.gelu_backward(dy * factor, x, approximate="tanh")
    return d_gate.to(gate.dtype), (dy * gelu).to(other.dtype)
