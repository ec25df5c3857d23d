"""The gated activation of the MLP."""

from torch import Tensor

from ..opset import Op, new
from ..reference import mlp as reference

_geglu = Op(
    "geglu(Tensor gate_up) -> Tensor",
    reference.geglu,
    check=reference.check_geglu,
    outputs=lambda gate_up: new(gate_up, *gate_up.shape[:-1], gate_up.shape[-1] // 2),
)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate, approximate="tanh") · up, with gate and up the halves of the last dimension.

    gate_up [..., 2F], gate first, of a floating dtype. Returns [..., F] in it; in fp16 a product
    past its largest number, 65504, is that number, with its sign.
    """
    return _geglu(gate_up)
