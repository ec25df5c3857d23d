"""Building blocks of the model: norms, embedding, activation and rotary embedding."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_kernels import ops
from gemma4_kernels.common import cosines_and_sines
from gemma4_kernels.packed_linear import PackedEmbedding

from .config import FULL, SLIDING, Gemma4TextConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class UnscaledRMSNorm(nn.Module):
    """Without a weight: of values, and of what the router reads."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, None, self.eps)


class ScaledEmbedding(nn.Embedding):
    """A table whose rows come out times `scale`, rounded to the table's dtype first."""

    def __init__(self, rows: int, width: int, scale: float, std: float):
        super().__init__(rows, width)
        nn.init.normal_(self.weight, std=std)
        self.scale = scale

    @property
    def embed_scale(self) -> Tensor:
        """Under transformers' name: adapters of an embedding look for it."""
        return torch.tensor(self.scale)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(self.scale, dtype=self.weight.dtype)


# What an embedding of the model may be.
EMBEDDING: tuple[type[nn.Embedding], ...] = (ScaledEmbedding, PackedEmbedding)


class GELUTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class RotaryEmbedding(nn.Module):
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        # A cast or a move of the model: follow the device, never the dtype.
        self._fill(fn(torch.empty(0, device=self.tables[FULL].device)).device)
        return self

    def __getitem__(self, kind: str) -> Tensor:
        return self.tables[kind]

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, S, C] in x's dtype; fused ops take inv_freq and positions."""
        return cosines_and_sines(position_ids, self.tables[layer_type], x.dtype)


def rotated(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Each pair (i, i + C/2) of a head turned by its angle."""
    first, second = x_THC.chunk(2, -1)
    return x_THC * cos_TC[:, None] + torch.cat([-second, first], -1) * sin_TC[:, None]


def linear(inputs: int, outputs: int, config: Gemma4TextConfig, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(linear.weight, std=config.initializer_range)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
