"""The gated activation of the MLP."""

from torch import Tensor

from ..opset import Gradient, NoGradient, Op, new
from ..reference import mlp as reference

_geglu_backward = Op(
    "geglu_backward(Tensor grad, Tensor gate_up) -> Tensor",
    reference.geglu_backward,
    check=reference.check_geglu_backward,
    outputs=lambda gate_up: new(gate_up, *gate_up.shape),
    main="gate_up",
    gradient=NoGradient("second derivatives are not offered"),
)

_geglu = Op(
    "geglu(Tensor gate_up) -> Tensor",
    reference.geglu,
    check=reference.check_geglu,
    outputs=lambda gate_up: new(gate_up, *gate_up.shape[:-1], gate_up.shape[-1] // 2),
    gradient=Gradient(
        lambda inputs, output: inputs,
        lambda kept, wanted, grad: (
            None if grad is None else _geglu_backward.registered(grad, *kept),
        ),
        in_eager=False,
    ),
)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate, approximate="tanh") · up, with gate and up the halves of the last dimension.

    gate_up [..., 2F], gate first, of a floating dtype. Returns [..., F] in it; in fp16 a product
    past its largest number, 65504, is that number, with its sign.
    """
    return _geglu(gate_up)
