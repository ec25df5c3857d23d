"""Per-layer embeddings."""

import torch
from torch import Tensor

from ..opset import Op, new
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


_ple_gate = Op(
    "ple_gate(Tensor gate, Tensor ple, int layer) -> Tensor",
    reference.ple_gate,
    check=reference.check_ple_gate,
    outputs=lambda gate, ple: new(
        gate, *gate.shape, dtype=torch.promote_types(gate.dtype, ple.dtype)
    ),
    beside=("ple",),
)


def ple_gate(gate: Tensor, ple: Tensor, layer: int) -> Tensor:
    """gelu(gate, approximate="tanh") · ple[:, layer].

    gate [T, P]; ple [T, L, P], from `ple_embed`; layer in 0..L - 1. Returns [T, P] in the dtype
    that both promote to; in fp16 a product past its largest number, 65504, is that number, with its
    sign.
    """
    return _ple_gate(gate, ple, layer)
