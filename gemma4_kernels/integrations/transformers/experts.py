"""What transformers calls for a layer's experts."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ... import ops
from ...fusion import why_not_plain
from . import base


class Experts(Protocol):
    """A module of transformers that holds all experts of a layer."""

    act_fn: nn.Module
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor, /) -> Tensor: ...


def experts(
    module: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls for a layer's experts: the op, or one of its own functions."""
    chosen = instead_of_op(module)
    if chosen is None:
        return ops.moe_experts(
            hidden_states, module.gate_up_proj, module.down_proj, top_k_index, top_k_weights
        )
    function, _ = chosen
    return function(module, hidden_states, top_k_index, top_k_weights)


def instead_of_op(module: Experts) -> tuple[Callable[..., Tensor], str] | None:
    """The function of transformers that runs these experts where the op does not, and why.

    The op computes down(gelu_tanh(gate x) · up x), gate and up in one tensor [E, 2F, D], gate
    first, and calls no activation.
    """
    grouped_mm = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    usual = getattr(module, "has_gate", True) and getattr(module, "is_concatenated", True)
    if not usual or getattr(module, "has_bias", False) or getattr(module, "is_transposed", False):
        return grouped_mm, "are laid out otherwise"
    why = why_not_plain(module.act_fn, base.TanhGELU)
    if not _fit_grouped_mm(module.gate_up_proj, module.down_proj):
        # Decorated by transformers to come here.
        original = vars(type(module).forward)["__wrapped__"]
        return None if why is None else (original, f"act_fn {why}")
    if why is not None:
        return grouped_mm, f"act_fn {why}"
    return None if base.takes_ops(module.down_proj) else (grouped_mm, "no kernels")


def _fit_grouped_mm(*weights: Tensor) -> bool:
    """Whether torch's takes them: no float64, rows of whole 16 bytes alone."""
    return all(
        w.dtype != torch.float64 and w.shape[-1] * w.element_size() % 16 == 0 and w.is_contiguous()
        for w in weights
    )
