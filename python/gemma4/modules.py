"""Building blocks of the model: norm, linear, packed projections, rotary frequencies."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_kernels import ops

from .config import FULL, SLIDING, Gemma4TextConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class PackedLinear(nn.Module):
    """Several projections of one input as one matrix; the state dict shows them apart.

    The parts appear under their own names beside this module (`q_proj.weight`), as views, and are
    joined again on load, so checkpoints keep transformers' names and nothing is held twice.
    """

    def __init__(self, parent: nn.Module, parts: dict[str, int], config: Gemma4TextConfig):
        super().__init__()
        self.parts = parts
        rows = sum(parts.values())
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        attention_bias = config.attention_bias and "q_proj" in parts
        self.bias = nn.Parameter(torch.zeros(rows)) if attention_bias else None
        parent.register_state_dict_post_hook(_split_packed)
        parent.register_load_state_dict_pre_hook(_join_packed)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


# Functions and not methods, so that a copied or pickled model does not drag along the first one.
def _packed(parent: nn.Module, prefix: str) -> Iterator[tuple[str, list[str], list[int]]]:
    """(packed name, names of its parts, their rows) of each tensor packed under `parent`."""
    for child, module in parent.named_children():
        if isinstance(module, PackedLinear):
            for kind, _ in module.named_parameters():
                names = [f"{prefix}{part}.{kind}" for part in module.parts]
                yield f"{prefix}{child}.{kind}", names, list(module.parts.values())


def _split_packed(parent: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for packed, names, rows in _packed(parent, prefix):
        state.update(zip(names, state.pop(packed).split(rows), strict=True))


def _join_packed(parent: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for packed, names, _rows in _packed(parent, prefix):
        if all(name in state for name in names):
            state[packed] = torch.cat([state.pop(name) for name in names])


class RotaryFrequencies(nn.Module):
    """inv_freq [C / 2] of each layer kind: fp32 whatever the model's dtype, in no state dict.

    default: theta^(-2i / C). proportional: the same for the first partial_rotary_factor · C / 2
    pairs (the exponent divides by the whole head size), 0 for the rest, which do not turn.
    """

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        self.config = config
        self._fill(torch.get_default_device())

    def _fill(self, device: torch.device) -> None:
        self.tables = {kind: self._table(kind).to(device) for kind in (SLIDING, FULL)}

    def _table(self, kind: str) -> Tensor:
        rope, size = self.config.rope_parameters[kind], self.config.head_size(kind)
        pairs = size // 2
        if rope["rope_type"] == "proportional":
            pairs = int(rope.get("partial_rotary_factor", 1.0) * size // 2)
        # In fp32 from the start, as the reference does: the last bit decides far positions.
        exponent = torch.arange(0, 2 * pairs, 2, dtype=torch.float32, device="cpu") / size
        turning = 1.0 / rope["rope_theta"] ** exponent / rope.get("factor", 1.0)
        return F.pad(turning, (0, size // 2 - pairs))

    def _apply(self, fn, recurse=True):
        # A cast or a move of the model: follow the device, never the dtype.
        self._fill(fn(torch.empty(0, device=self.tables[FULL].device)).device)
        return self

    def __getitem__(self, kind: str) -> Tensor:
        return self.tables[kind]


def linear(inputs: int, outputs: int, config: Gemma4TextConfig, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(linear.weight, std=config.initializer_range)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
