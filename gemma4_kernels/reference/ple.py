"""Twins and checks of `ops/ple.py`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import check_floating, check_integral, check_same_device, check_shape, finite
from .mlp import gelu_mul_backward
from .norm import rms_norm

__all__ = ["ple_embed", "ple_gate", "ple_gate_backward"]


def check_ple_embed(ids: Tensor, table: Tensor, projected: Tensor, weight: Tensor) -> None:
    check_integral("ids", ids)
    if ids.ndim != 1:
        raise ValueError(f"ids must be [T], got {list(ids.shape)}")
    check_floating("table", table)
    check_floating("projected", projected)
    shaped = table.ndim == 2 and weight.ndim == 1 and weight.shape[0] > 0
    if not shaped or table.shape[1] % weight.shape[0] != 0:
        raise ValueError(
            f"table must be [V, L * P] and weight [P], got {list(table.shape)} and "
            f"{list(weight.shape)}"
        )
    check_floating("weight", weight)
    check_same_device("weight", weight, "projected", projected)
    check_same_device("ids", ids, "projected", projected)
    if not table.is_cpu:
        check_same_device("table", table, "projected", projected)
    check_shape("projected", projected, (ids.shape[0], table.shape[1]))


def ple_embed(
    ids_T: Tensor, table: Tensor, projected: Tensor, weight: Tensor, eps: float
) -> Tensor:
    ids_T = ids_T.long()
    known = (ids_T >= 0) & (ids_T < table.shape[0])
    if not table.shape[0]:
        table = table.new_zeros(1, table.shape[1])
    rows = F.embedding(torch.where(known, ids_T, 0).to(table.device), table)
    rows = rows.to(projected.device).masked_fill(~known[:, None], 0.0)
    # The factor is rounded to the table's dtype first, as the reference's embedding does.
    scale = torch.tensor(math.sqrt(weight.shape[0]), dtype=table.dtype)
    tokens_TLP = (rows * scale).unflatten(1, (-1, weight.shape[0]))
    context_TLP = rms_norm(projected.view(tokens_TLP.shape), weight, eps)
    return (context_TLP + tokens_TLP) * 2.0**-0.5


def check_ple_gate(gate: Tensor, ple: Tensor, layer: int) -> None:
    check_floating("gate", gate)
    check_floating("ple", ple)
    check_same_device("ple", ple, "gate", gate)
    if gate.ndim != 2:
        raise ValueError(f"gate must be [T, P], got {list(gate.shape)}")
    if ple.ndim != 3 or ple.shape[0] != gate.shape[0] or ple.shape[2] != gate.shape[1]:
        raise ValueError(
            f"ple must be [{gate.shape[0]}, L, {gate.shape[1]}], got {list(ple.shape)}"
        )
    if not (0 <= layer < ple.shape[1]):
        raise ValueError(f"layer must lie in 0..L-1 = {ple.shape[1] - 1}, got {layer}")


def ple_gate(gate_TP: Tensor, ple_TLP: Tensor, layer: int) -> Tensor:
    return finite(F.gelu(gate_TP, approximate="tanh") * ple_TLP[:, layer]).contiguous()


def check_ple_gate_backward(grad: Tensor, gate: Tensor, ple: Tensor, layer: int) -> None:
    check_ple_gate(gate, ple, layer)
    check_same_device("grad", grad, "gate", gate)
    check_shape("grad", grad, gate.shape)
    dtype = torch.promote_types(gate.dtype, ple.dtype)
    if grad.dtype != dtype:
        raise TypeError(f"grad must hold {dtype}, as the op's result does, got {grad.dtype}")


def ple_gate_backward(
    grad_TP: Tensor,
    gate_TP: Tensor,
    ple_TLP: Tensor,
    layer: int,
    wants_gate: bool,
    wants_ple: bool,
) -> tuple[Tensor, Tensor]:
    d_gate, d_slice = gelu_mul_backward(grad_TP, gate_TP, ple_TLP[:, layer])
    d_gate = d_gate if wants_gate else gate_TP.new_empty(0)
    return d_gate, d_slice if wants_ple else ple_TLP.new_empty(0)
