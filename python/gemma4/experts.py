"""The experts of a layer, and the router that chooses among them.

Shape letters as in layers.py.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from gemma4_kernels import ops
from gemma4_kernels.fusion import is_plain
from gemma4_kernels.packed import PackedWeight, Weight
from gemma4_kernels.packed_linear import PackedParameter, product

from .config import Gemma4TextConfig
from .modules import GELUTanh, UnscaledRMSNorm, linear


class Router(nn.Module):
    """Chooses each token's experts by its raw residual."""

    PARTS: ClassVar = {"norm": UnscaledRMSNorm, "proj": nn.Linear}

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        num, self.top_k, _ = config.expert_sizes
        self.norm = UnscaledRMSNorm(config.rms_norm_eps)
        self.proj = linear(config.hidden_size, num, config)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(num))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All experts' probabilities [T, E]; the chosen ones' weights and numbers [T, K]."""
        scaled = self.norm(x_TD) * self.scale * self.scale.shape[0] ** -0.5
        logits_TE = self.proj(scaled)
        weights_TK, experts_TK = ops.moe_route(logits_TE, self.per_expert_scale, self.top_k)
        return logits_TE.softmax(-1, dtype=torch.float32), weights_TK, experts_TK.long()

    def route(self, scaled_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts from the normed and scaled residual, as `moe_norm` makes it."""
        return ops.moe_route(self.proj(scaled_TD), self.per_expert_scale, self.top_k)


class Experts(nn.Module):
    """The experts' weights, [E, 2F, D] gate rows first and [E, D, F].

    A packed one is a module, and no longer called a projection: adapters of the linear layers of
    that name would take it for one.
    """

    PARTS: ClassVar = {
        "act_fn": GELUTanh,
        **dict.fromkeys(("gate_up_packed", "down_packed"), PackedParameter),
    }

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        num, _, expert_width = config.expert_sizes
        self.num_experts, width = num, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(num, width, expert_width))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=config.initializer_range)
        self.act_fn = GELUTanh()

    @property
    def weights(self) -> tuple[Weight, Weight]:
        """gate_up and down."""
        return self._weight("gate_up"), self._weight("down")

    def _weight(self, name: str) -> Weight:
        held = self._modules.get(f"{name}_packed")
        weight: Weight = getattr(self, f"{name}_proj") if held is None else held()
        return weight

    def pack(self, name: str, weight: PackedWeight) -> None:
        """Puts a packed weight in the place of the parameter `name`."""
        delattr(self, name)
        setattr(self, name.replace("_proj", "_packed"), PackedParameter(weight))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        gate_up, down = self.weights
        if is_plain(self.act_fn, GELUTanh):
            return ops.moe_experts(x_TD, gate_up, down, experts_TK, weights_TK)
        out_TD = torch.zeros_like(x_TD)
        for expert in experts_TK.unique().tolist():
            tokens, places = (experts_TK == expert).nonzero(as_tuple=True)
            gate, up = product(x_TD[tokens], gate_up[expert]).chunk(2, -1)
            part = product(self.act_fn(gate) * up, down[expert])
            part = part * weights_TK[tokens, places, None]
            out_TD = out_TD.index_add(0, tokens, part.to(out_TD.dtype))
        return out_TD
