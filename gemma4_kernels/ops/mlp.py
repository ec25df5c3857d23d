"""The gated activation of the MLP."""

from torch import Tensor

from .. import checks, reference
from ..opset import Op, new

_geglu = Op(
    "geglu(Tensor gate_up) -> Tensor",
    reference.geglu,
    check=checks.geglu,
    outputs=lambda gate_up: new(gate_up, *gate_up.shape[:-1], gate_up.shape[-1] // 2),
)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate, approximate="tanh") · up, with gate and up the halves of the last dimension.

    gate_up [..., 2F], gate first. Returns [..., F].
    """
    return _geglu(gate_up)
