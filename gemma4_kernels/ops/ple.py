"""Per-layer embeddings."""

import torch
from torch import Tensor

from ..opset import Args, Gradient, NoGradient, Op, new
from ..reference import ple as reference


def _embedded(table: Tensor, projected: Tensor, weight: Tensor) -> Tensor:
    tokens, columns = projected.shape
    width = weight.shape[0]
    dtype = torch.promote_types(projected.dtype, table.dtype)
    return new(projected, tokens, columns // width, width, dtype=dtype)


def _embed_unserved(table: Tensor, projected: Tensor) -> str | None:
    if table.dtype not in (projected.dtype, torch.float32):
        return f"the table is {table.dtype} beside {projected.dtype}"
    if table.device != projected.device and not (table.is_cpu and table.is_pinned()):
        return f"the table is on {table.device}, not pinned"
    return None


_ple_embed = Op(
    "ple_embed(Tensor ids, Tensor table, Tensor projected, Tensor weight, float eps) -> Tensor",
    reference.ple_embed,
    check=reference.check_ple_embed,
    outputs=_embedded,
    main="projected",
    beside=("table", "weight"),
    unserved=_embed_unserved,
)


def ple_embed(
    ids: Tensor, table: Tensor, projected: Tensor, weight: Tensor, eps: float = 1e-6
) -> Tensor:
    """Per-layer embeddings: (rms_norm(projected, weight) + √P table[ids]) / √2.

    ids [T] integers; table [V, L P], projected [T, L P] and weight [P], each of a floating dtype;
    eps as in `rms_norm`.
    The table may stay in host memory (a kernel reads its rows in place if it is pinned, else the
    eager twin gathers them on the host). An id outside 0..V - 1 reads nothing and adds a zero row.
    Returns [T, L, P] in the dtype that table and projected promote to.
    """
    return _ple_embed(ids, table, projected, weight, eps)


_ple_gate_backward = Op(
    "ple_gate_backward(Tensor grad, Tensor gate, Tensor ple, int layer, bool wants_gate,"
    " bool wants_ple) -> (Tensor, Tensor)",
    reference.ple_gate_backward,
    check=reference.check_ple_gate_backward,
    outputs=lambda gate, ple, wants_gate, wants_ple: (
        new(gate, *gate.shape) if wants_gate else new(gate, 0),
        new(ple, *gate.shape) if wants_ple else new(ple, 0),
    ),
    main="gate",
    beside=("ple",),
    gradient=NoGradient("second derivatives are not offered"),
)


def _gate_gradients(
    kept: Args, wanted: tuple[bool, ...], grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of ple a tensor as large as it is, zeros but for the layer: who has all layers differentiated
    gives each a ple of one layer (`ple.unbind(1)`), whose gradients are put together once."""
    if grad is None:
        return None, None, None
    _, ple, layer = kept
    wants_gate, wants_ple, _ = wanted
    d_gate, d_slice = _ple_gate_backward.registered(grad, *kept, wants_gate, wants_ple)
    d_ple = d_slice[:, None] if wants_ple else None
    if d_ple is not None and ple.shape[1] > 1:
        d_ple = torch.zeros_like(ple)
        d_ple[:, layer] = d_slice
    return d_gate if wants_gate else None, d_ple, None


_ple_gate = Op(
    "ple_gate(Tensor gate, Tensor ple, int layer) -> Tensor",
    reference.ple_gate,
    check=reference.check_ple_gate,
    outputs=lambda gate, ple: new(
        gate, *gate.shape, dtype=torch.promote_types(gate.dtype, ple.dtype)
    ),
    beside=("ple",),
    gradient=Gradient(lambda inputs, output: inputs, _gate_gradients, in_eager=False),
)


def ple_gate(gate: Tensor, ple: Tensor, layer: int) -> Tensor:
    """gelu(gate, approximate="tanh") · ple[:, layer].

    gate [T, P]; ple [T, L, P], from `ple_embed`; layer in 0..L - 1. Returns [T, P] in the dtype
    that both promote to; in fp16 a product past its largest number, 65504, is that number, with its
    sign.
    """
    return _ple_gate(gate, ple, layer)
