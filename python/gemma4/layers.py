"""A decoder layer of Gemma 4 and its parts: attention and feed-forward; experts are in experts.py.

Everything works on packed tokens (see layout.py) and speaks to `gemma4_kernels` for all that is not
a matrix product. Submodules stand under transformers' names. A fused op takes the place of some of
them while they are plain (see `gemma4_kernels.fusion`); the others are called, and see [B, S, ...].
A module with a `packed` method is called only if it is not plain itself.

Each norm that opens a branch is computed by the op that closes the branch before it, across layers
too, so a layer takes and returns the residual x and, if it was made, its normed form y.

Shape letters: B rows, S columns of the padded batch, T packed tokens, D model width, H query
heads, G KV heads, C head channels, F feed-forward width, E experts, K experts per token, P PLE
width, L layers.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from gemma4_kernels import ops
from gemma4_kernels.common import cosines_and_sines, gelu_mul
from gemma4_kernels.fusion import is_plain
from gemma4_kernels.joined import products
from gemma4_kernels.packed_linear import LINEAR, product

from .config import FULL, Gemma4TextConfig
from .experts import Experts, Router
from .layout import Layout
from .modules import GELUTanh, RMSNorm, UnscaledRMSNorm, linear, rotated
from .steps import DecodePlan, Keys, PackedPlan

# The layout of the last columns, and which of the packed tokens these are.
Tail = tuple[Layout, Tensor]


class Attention(nn.Module):
    """Sliding or full attention."""

    PARTS: ClassVar = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), LINEAR),
        **dict.fromkeys(("q_norm", "k_norm"), RMSNorm),
        "v_norm": UnscaledRMSNorm,
    }

    def __init__(self, config: Gemma4TextConfig, index: int):
        super().__init__()
        self.kind = kind = config.layer_types[index]
        self.layer_idx, self.eps = index, config.rms_norm_eps
        self.head_dim = config.head_size(kind)
        self.owner = config.kv_owner(index)
        others = range(index + 1, config.num_hidden_layers)
        self.shares_kv = any(config.kv_owner(other) == index for other in others)
        self.causal = not config.bidirectional
        self.window, self.window_right = config.window(kind)
        width, bias = config.hidden_size, config.attention_bias
        rows = config.num_attention_heads * self.head_dim
        kv_rows = config.kv_heads(kind) * self.head_dim
        self.q_proj = linear(width, rows, config, bias)
        self.q_norm = RMSNorm(self.head_dim, self.eps)
        if self.owner == index:
            k_eq_v = config.attention_k_eq_v and kind == FULL
            self.k_norm = RMSNorm(self.head_dim, self.eps)
            self.v_norm = UnscaledRMSNorm(self.eps)
            self.k_proj = linear(width, kv_rows, config, bias)
            self.v_proj = None if k_eq_v else linear(width, kv_rows, config, bias)
        self.o_proj = linear(rows, width, config, bias)

    def forward(self, hidden_states: Tensor, *, plan: PackedPlan) -> tuple[Tensor, None]:
        """[B, S, D] to ([B, S, D], no attention weights)."""
        layout = plan.layout
        return layout.unpack(self.packed(layout.pack(hidden_states), plan)), None

    def packed(self, y_TD: Tensor, plan: PackedPlan, tail: Tail | None = None) -> Tensor:
        """tail: keys are made for all tokens, and attended to by the last columns alone."""
        out_THC = self.attend(self._project(y_TD, plan), y_TD.dtype, plan, tail)
        return plan.call(self.o_proj, LINEAR, out_THC.flatten(1))

    def attend(
        self,
        parts: tuple[Tensor, Tensor | None, Tensor | None],
        dtype: torch.dtype,
        plan: PackedPlan,
        tail: Tail | None = None,
    ) -> Tensor:
        """What is between the projections, of an input of this dtype, and `o_proj`: [T, H, C]."""
        q, k, v = parts
        if plan.rotation is None and self._norms_are_plain(plan):
            q_weight, k_weight = self.q_norm.weight, None if k is None else self.k_norm.weight
            if isinstance(plan, DecodePlan) and plan.attends(self.owner, q):
                norms = q_weight, k_weight, plan.inv_freq[self.kind], self.eps
                return plan.attend(self.owner, q, k, v, *norms, self.window)
            q, keys = self._norm_and_rotate(q, k, v, plan)
        else:
            q, keys = self._call_norms(q, k, v, plan, dtype)
        if self.shares_kv:
            # A recomputing checkpoint must not replace what later layers were given.
            plan.keys.setdefault(self.layer_idx, keys)
        layout = plan.layout
        if tail is not None:
            layout, chosen = tail
            q = q[chosen]
        return keys.attend(q, layout, self.causal, self.window, self.window_right)

    @property
    def linears(self) -> list[nn.Linear]:
        """Of q, k and v: no v where k gives it, q alone where keys are borrowed."""
        if self.owner != self.layer_idx:
            return [self.q_proj]
        return [self.q_proj, self.k_proj] + ([] if self.v_proj is None else [self.v_proj])

    def _project(
        self, y_TD: Tensor, plan: PackedPlan
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q [T, H, C], k and v [T, G, C], what there is of them."""
        one = plan.joined(*self.linears) if len(self.linears) > 1 else None
        if one is not None:
            return self.split(product(y_TD, *one))
        made = products(y_TD, *self.linears)
        if made is None:
            made = [plan.call(part, LINEAR, y_TD) for part in self.linears]
        return _three([self._heads(part) for part in made])

    def split(self, qkv_TN: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The joined product's parts, as heads."""
        sizes = [part.out_features // self.head_dim for part in self.linears]
        return _three(self._heads(qkv_TN).split(sizes, 1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.head_dim))

    def _norms_are_plain(self, plan: PackedPlan) -> bool:
        return plan.plain(self.q_norm, RMSNorm) and (
            self.owner != self.layer_idx
            or (plan.plain(self.k_norm, RMSNorm) and plan.plain(self.v_norm, UnscaledRMSNorm))
        )

    def _norm_and_rotate(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, plan: PackedPlan
    ) -> tuple[Tensor, Keys]:
        q_weight, inv_freq = self.q_norm.weight, plan.inv_freq[self.kind]
        if k is None:
            positions = plan.layout.positions
            q, _, _ = ops.qkv_norm_rope(
                q, None, None, q_weight, None, positions, inv_freq, self.eps
            )
            return q, plan.keys[self.owner]
        k_weight = self.k_norm.weight
        return plan.write(self.layer_idx, q, k, v, q_weight, k_weight, inv_freq, self.eps)

    def _call_norms(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, plan: PackedPlan, dtype: torch.dtype
    ) -> tuple[Tensor, Keys]:
        """The same, module by module; angles in `dtype`, as in transformers."""
        layout = plan.layout
        if plan.rotation is not None:
            cos, sin = plan.rotation[self.kind]
        else:
            cos, sin = cosines_and_sines(layout.positions, plan.inv_freq[self.kind], dtype)
        made = q.dtype
        q = rotated(plan.call(self.q_norm, RMSNorm, q), cos, sin).to(made)
        if k is None:
            return q, plan.keys[self.owner]
        v = plan.call(self.v_norm, UnscaledRMSNorm, k if v is None else v)
        k = rotated(plan.call(self.k_norm, RMSNorm, k), cos, sin).to(made)
        return q, plan.store(self.layer_idx, k, v)


def _three(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    q, k, v, *_ = [*parts, None, None]
    assert q is not None
    return q, k, v


class MLP(nn.Module):
    """down(gelu_tanh(gate x) · up x)."""

    PARTS: ClassVar = {
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), LINEAR),
        "act_fn": GELUTanh,
    }

    def __init__(self, config: Gemma4TextConfig, index: int):
        super().__init__()
        width = config.mlp_width(index)
        self.gate_proj = linear(config.hidden_size, width, config)
        self.up_proj = linear(config.hidden_size, width, config)
        self.down_proj = linear(width, config.hidden_size, config)
        self.act_fn = GELUTanh()

    def forward(self, x: Tensor) -> Tensor:
        made = products(x, self.gate_proj, self.up_proj)
        gate, up = (self.gate_proj(x), self.up_proj(x)) if made is None else made
        if is_plain(self.act_fn, GELUTanh):
            return self.down_proj(gelu_mul(gate, up))
        return self.down_proj(self.act_fn(gate) * up)

    def packed(self, y_TD: Tensor, plan: PackedPlan) -> Tensor:
        one = plan.joined(self.gate_proj, self.up_proj)
        if one is None:
            return self.forward(y_TD)
        return self.down_proj(ops.geglu(product(y_TD, *one)))


class DecoderLayer(nn.Module):
    """Attention, feed-forward (with experts beside it), PLE gate and layer scalar."""

    layer_scalar: Tensor
    PARTS: ClassVar = {
        "self_attn": Attention,
        "mlp": MLP,
        "router": Router,
        "experts": Experts,
        **dict.fromkeys(
            (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
                "pre_feedforward_layernorm_2",
                "post_feedforward_layernorm_1",
                "post_feedforward_layernorm_2",
                "post_per_layer_input_norm",
            ),
            RMSNorm,
        ),
        "per_layer_input_gate": LINEAR,
        "per_layer_projection": LINEAR,
        "act_fn": GELUTanh,
    }

    def __init__(self, config: Gemma4TextConfig, index: int):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config, index)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_feedforward_layernorm = RMSNorm(width, eps)
        self.post_feedforward_layernorm = RMSNorm(width, eps)
        self.register_buffer("layer_scalar", torch.ones(1))
        self.ple_width = config.hidden_size_per_layer_input
        if self.ple_width:
            self.act_fn = GELUTanh()
            self.per_layer_input_gate = linear(width, self.ple_width, config)
            self.per_layer_projection = linear(self.ple_width, width, config)
            self.post_per_layer_input_norm = RMSNorm(width, eps)
        self.has_experts = config.enable_moe_block
        if self.has_experts:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = RMSNorm(width, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(width, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(width, eps)

    def forward(
        self, hidden_states: Tensor, per_layer_input: Tensor | None = None, *, plan: PackedPlan
    ) -> Tensor:
        """[B, S, D], and [B, S, P] of a model with PLE, to [B, S, D]."""
        layout = plan.layout
        ple = None if per_layer_input is None else (layout.pack(per_layer_input).unsqueeze(1), 0)
        x_TD, _ = self.packed(layout.pack(hidden_states), None, ple, plan)
        return layout.unpack(x_TD)

    def packed(
        self,
        x_TD: Tensor,
        y_TD: Tensor | None,
        ple: tuple[Tensor, int] | None,
        plan: PackedPlan,
        next_norm: nn.Module | None = None,
        tail: Tail | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x after the layer, and next_norm(x) if that came with it.

        y: input_layernorm(x), if it is there already. ple: the per-layer inputs [T, L, P] and which
        of them is this layer's. tail: keys are made for all tokens, everything after them for the
        last columns alone.
        """
        if y_TD is None:
            y_TD = plan.call(self.input_layernorm, RMSNorm, x_TD)
        if plan.plain(self.self_attn, Attention):
            attended = self.self_attn.packed(y_TD, plan, tail)
        else:
            layout = plan.layout
            attended, *_ = self.self_attn(hidden_states=layout.unpack(y_TD), plan=plan)
            attended = layout.pack(attended)
        if tail is not None:
            x_TD = x_TD[tail[1]]
            ple = None if ple is None else (ple[0][tail[1]], ple[1])
        x_TD, y_TD = self._close(
            attended, x_TD, self.post_attention_layernorm, plan, self.pre_feedforward_layernorm
        )
        if y_TD is None:
            y_TD = plan.call(self.pre_feedforward_layernorm, RMSNorm, x_TD)
        if plan.whole(self.mlp, MLP):
            branch_TD = self.mlp.packed(y_TD, plan)
        else:
            branch_TD = plan.layout.call(self.mlp, y_TD)
        if self.has_experts:
            branch_TD = self.with_experts(x_TD, branch_TD, plan)
        closing = self.post_feedforward_layernorm
        if self.ple_width:
            x_TD, _ = self._close(branch_TD, x_TD, closing, plan)
            gate_TP = plan.call(self.per_layer_input_gate, LINEAR, x_TD)
            gated_TP = self._gated(gate_TP, ple, plan)
            branch_TD = plan.call(self.per_layer_projection, LINEAR, gated_TP)
            closing = self.post_per_layer_input_norm
        return self._close(branch_TD, x_TD, closing, plan, next_norm, self.layer_scalar)

    @staticmethod
    def _close(
        branch_TD: Tensor,
        x_TD: Tensor,
        post_norm: nn.Module,
        plan: PackedPlan,
        next_norm: nn.Module | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x = (x + post_norm(branch)) scale, and next_norm(x) where one op can make both."""
        if not plan.plain(post_norm, RMSNorm):
            x_TD = x_TD + plan.call(post_norm, RMSNorm, branch_TD)
            return (x_TD if scale is None else x_TD * scale), None
        next_weight = None
        if next_norm is not None and plan.plain(next_norm, RMSNorm, x_TD.device):
            next_weight = next_norm.weight
        return ops.add_rms_norm(
            branch_TD, x_TD, post_norm.weight, next_weight, scale, post_norm.eps
        )

    def with_experts(self, x_TD: Tensor, dense_TD: Tensor, plan: PackedPlan) -> Tensor:
        """norm_1(dense) + norm_2(experts); the router reads the raw residual."""
        norm = self.pre_feedforward_layernorm_2
        if (
            plan.plain(norm, RMSNorm)
            and plan.whole(self.router, Router)
            and plan.whole(self.experts, Experts)
        ):
            y_TD, scaled_TD = ops.moe_norm(x_TD, norm.weight, self.router.scale, norm.eps)
            weights_TK, experts_TK = self.router.route(scaled_TD)
            routed_TD = self.experts(y_TD, experts_TK, weights_TK)
        else:
            # In transformers these see the rows of the padded batch, flattened.
            layout = plan.layout
            rows = layout.unpack(x_TD).flatten(0, 1)
            _, weights, experts = self.router(rows)
            routed = self.experts(norm(rows), experts, weights)
            routed_TD = layout.pack(routed.unflatten(0, layout.shape))
        dense_TD = plan.call(self.post_feedforward_layernorm_1, RMSNorm, dense_TD)
        both_TD, _ = self._close(routed_TD, dense_TD, self.post_feedforward_layernorm_2, plan)
        return both_TD

    def _gated(self, gate_TP: Tensor, ple: tuple[Tensor, int] | None, plan: PackedPlan) -> Tensor:
        assert ple is not None  # every layer of a model with PLE is given its inputs
        ple_TLP, index = ple
        if plan.plain(self.act_fn, GELUTanh):
            return ops.ple_gate(gate_TP, ple_TLP, index)
        return plan.layout.call(self.act_fn, gate_TP) * ple_TLP[:, index]


def call_layer(
    layer: nn.Module,
    x_TD: Tensor,
    y_TD: Tensor | None,
    ple: tuple[Tensor, int] | None,
    plan: PackedPlan,
    next_norm: nn.Module | None = None,
    tail: Tail | None = None,
) -> tuple[Tensor, None]:
    """The same of a layer that is not plain: it is called, and takes and returns x alone."""
    layout = plan.layout
    inputs = None if ple is None else layout.unpack(ple[0][:, ple[1]])
    return layout.pack(layer(layout.unpack(x_TD), inputs, plan=plan)), None
