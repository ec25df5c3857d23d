"""The modules of a Gemma 4 text model, as subclasses whose forward takes these ops off the CPU.

Where an op stands in for modules, it does so while these are plain, as `fusion` has it, and one by
one: a hook on one norm leaves the other ops of its layer as they are. What is called is called as
transformers calls it, in its order and with its shapes.

The rotary embedding is read by every layer. `qkv_norm_rope` turns by positions and frequencies, so
cosines and sines are made where something else reads them, and only there.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from ... import ops, opset
from ...common import cosines_and_sines, gelu_mul
from ...fusion import is_plain, why_not_plain, why_seen
from . import base

Positions = tuple[Tensor, Tensor]


class RMSNorm(gemma4.Gemma4RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not base.takes_ops(hidden_states):
            return super().forward(hidden_states)
        return ops.rms_norm(hidden_states, self.weight if self.with_scale else None, self.eps)


def why_not_read(
    norm: gemma4.Gemma4RMSNorm,
    device: torch.device | None,
    eps: float | None = None,
    scaled: bool = True,
) -> str | None:
    """Why an op may not stand in for a norm (with this eps, with a weight or without), or None."""
    reason = why_not_plain(norm, RMSNorm, device)
    if reason is None and (norm.with_scale is not scaled or eps not in (None, norm.eps)):
        return f"has with_scale {norm.with_scale} and eps {norm.eps}"
    return reason


def _close(
    branch: Tensor,
    residual: Tensor,
    post: gemma4.Gemma4RMSNorm,
    following: gemma4.Gemma4RMSNorm | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """residual' = (residual + post(branch)) scale, and following(residual'): one op at best."""
    weight, device = None, residual.device
    if why_not_read(post, device) is None:
        if following is not None and why_not_read(following, device, post.eps) is None:
            weight, following = following.weight, None
        x, y = ops.add_rms_norm(branch, residual, post.weight, weight, scale, post.eps)
    else:
        x, y = residual + post(branch), None
        if scale is not None:
            x *= scale
    return x, y if following is None else following(x)


def _close_into_gate(
    branch: Tensor,
    residual: Tensor,
    post: gemma4.Gemma4RMSNorm,
    linear: nn.Module,
    factor: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """residual' = residual + post(branch), and gelu(linear(residual')) factor: one op of so few
    tokens as a kernel serves, None for more and where the modules are to be called."""
    device, shape = residual.device, residual.shape
    if not is_plain(linear, nn.Linear, device) or why_not_read(post, device) is not None:
        return None
    x, old, times = (t.flatten(0, -2) for t in (branch, residual, factor))
    opening = old, post.weight, None, None, times, None, None, None
    args = (x, linear.weight, None, None, *opening, post.eps, False)
    trained = opset.needs_grad(*args) or torch.is_autocast_enabled(device.type)
    if linear.bias is not None or trained or not opset.OPS["linear_small"].pays(args):
        return None
    y, new_residual = ops.linear_small(
        x, linear.weight, residual=old, post_weight=post.weight, factor=times, eps=post.eps
    )
    assert new_residual is not None  # as a residual was given
    return new_residual.view(shape), y.view(factor.shape)


class MLP(gemma4.Gemma4TextMLP):
    def forward(self, x: Tensor) -> Tensor:
        if not base.takes_ops(x):
            return super().forward(x)
        gate = self.gate_proj(x)
        if is_plain(self.act_fn, base.TanhGELU):
            return self.down_proj(gelu_mul(gate, self.up_proj(x)))
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class RotaryEmbedding(gemma4.Gemma4TextRotaryEmbedding):
    """Cosines and sines, or, while the text model says that its layers alone read them, positions
    [.., N, 1] and frequencies [1, N, C/2], shaped so that they can be sliced alike."""

    read_by_layers_alone = False

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> Positions:
        if not (self.read_by_layers_alone and base.takes_ops(x)):
            return super().forward(x, position_ids, layer_type)
        inv_freq = getattr(self, f"{layer_type}_inv_freq").float()
        return position_ids[..., None], inv_freq.expand(1, position_ids.shape[-1], -1)


def _are_positions(position_embeddings: Positions | None) -> TypeGuard[Positions]:
    return position_embeddings is not None and not position_embeddings[0].is_floating_point()


def _cosines(position_embeddings: Positions, x: Tensor) -> Positions:
    """What transformers' rotary embedding would have made."""
    positions, inv_freq = position_embeddings
    return cosines_and_sines(positions[..., 0], inv_freq, x.dtype)


def why_cosines(model: gemma4.Gemma4TextModel) -> str | None:
    """Why the rotary embedding of a text model makes cosines and sines for all layers, or None."""
    reason = why_not_plain(model.rotary_emb, RotaryEmbedding)
    if reason is not None:
        return f"rotary_emb {reason}"
    for number, layer in enumerate(model.layers):
        reason = why_seen(layer, DecoderLayer)
        if reason is not None:
            return f"layers.{number} {reason}"
    return None


def before_model(model: gemma4.Gemma4TextModel, _: object) -> None:
    """A hook of the text model. It is no subclass: transformers knows what a model can record
    (hidden states, router logits) by the name of its class."""
    rotary = model.rotary_emb
    if type(rotary) is RotaryEmbedding and why_cosines(model) is None:
        rotary.read_by_layers_alone = True


def after_model(model: gemma4.Gemma4TextModel, *_: object) -> None:
    rotary = model.rotary_emb
    if type(rotary) is RotaryEmbedding:
        rotary.read_by_layers_alone = False


class Attention(gemma4.Gemma4TextAttention):
    """Goes by what the rotary embedding made, not by its own device: in a model that is spread
    over several the two may differ."""

    def why_unfused(self, device: torch.device | None) -> str | None:
        """Why the norms are called and not read by `qkv_norm_rope`, or None."""
        eps = None
        for name in ("q_norm",) if self.is_kv_shared_layer else ("q_norm", "k_norm", "v_norm"):
            norm: gemma4.Gemma4RMSNorm = getattr(self, name)
            reason = why_not_read(norm, device, eps, name != "v_norm")
            if reason is not None:
                return f"{name} {reason}"
            eps = norm.eps
        return None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Positions,
        attention_mask: Tensor | None,
        shared_kv_states: dict[str, tuple[Tensor, Tensor]],
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        tokens, positions = hidden_states.shape[1], position_embeddings[0].shape[1]
        if positions not in (1, tokens):
            raise ValueError(
                f"position_ids must be as many as the tokens, {tokens}, or one for all of them, "
                f"got {positions}"
            )
        fused = _are_positions(position_embeddings)
        if fused and self.why_unfused(hidden_states.device) is not None:
            position_embeddings, fused = _cosines(position_embeddings, hidden_states), False
        if not fused:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, shared_kv_states, **kwargs
            )
        # The cache's name until transformers 5.23, and from then on.
        cache = kwargs.pop("past_key_values", None)
        cache = kwargs.pop("cache", cache)
        shape, head_dim, kind = hidden_states.shape[:-1], self.head_dim, self.layer_type
        assert kind is not None
        positions_T = position_embeddings[0].expand(*shape, 1).flatten()
        inv_freq = position_embeddings[1][0, 0]

        def heads(projection: nn.Module) -> Tensor:
            return projection(hidden_states).reshape(positions_T.shape[0], -1, head_dim)

        q, q_norm = heads(self.q_proj), self.q_norm
        q_weight, eps = q_norm.weight, q_norm.eps
        if self.is_kv_shared_layer:
            q, _, _ = ops.qkv_norm_rope(q, None, None, q_weight, None, positions_T, inv_freq, eps)
            key, value = shared_kv_states[kind]
        else:
            k, v_proj = heads(self.k_proj), self.v_proj
            v = None if v_proj is None else heads(v_proj)
            q, made_k, made_v = ops.qkv_norm_rope(
                q, k, v, q_weight, self.k_norm.weight, positions_T, inv_freq, eps
            )
            assert made_k is not None and made_v is not None  # as k is
            key = made_k.view(*shape, -1, head_dim).transpose(1, 2)
            value = made_v.view(*shape, -1, head_dim).transpose(1, 2)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        if self.store_full_length_kv:
            shared_kv_states[kind] = key, value
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, gemma4.eager_attention_forward
        )
        out, weights = attend(
            self,
            q.view(*shape, -1, head_dim).transpose(1, 2),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.reshape(*shape, -1)), weights


class Router(gemma4.Gemma4TextRouter):
    # transformers' returns three as well, and says that it returns two.
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        if not base.takes_ops(hidden_states):
            return super().forward(hidden_states)  # type: ignore[return-value]
        scaled = self.norm(hidden_states) * self.scale * self.scalar_root_size
        scores = self.proj(scaled)
        top_k = self.config.top_k_experts
        assert top_k is not None  # a model with a router has experts
        weights, index = ops.moe_route(scores, self.per_expert_scale, top_k)
        return F.softmax(scores, dim=-1, dtype=torch.float32), weights, index.long()


# Of a layer, after those that it takes itself: their order, should one be given without its name.
ATTENTION_ARGUMENTS = ("shared_kv_states", "position_embeddings", "attention_mask", "position_ids")


class DecoderLayer(gemma4.Gemma4TextDecoderLayer):
    """Each norm that closes a branch, its residual and the norm that opens the next are one op."""

    def forward(
        self,
        hidden_states: Tensor,
        per_layer_input: Tensor | None = None,
        *args: object,
        **kwargs: Any,
    ) -> Tensor:
        kwargs |= zip(ATTENTION_ARGUMENTS, args, strict=False)
        turns = kwargs.get("position_embeddings")
        if _are_positions(turns) and why_seen(self.self_attn, Attention) is not None:
            kwargs["position_embeddings"] = _cosines(turns, hidden_states)
        if not base.takes_ops(hidden_states):
            return super().forward(hidden_states, per_layer_input, **kwargs)
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **kwargs)
        x, y = _close(
            attended,
            hidden_states,
            self.post_attention_layernorm,
            self.pre_feedforward_layernorm,
        )
        branch = self.mlp(y)
        if self.enable_moe_block:
            dense, flat = self.post_feedforward_layernorm_1(branch), x.flatten(0, 1)
            _, weights, index = self.router(flat)
            routed = self.experts(self.pre_feedforward_layernorm_2(flat), index, weights)
            branch, _ = _close(routed.view(x.shape), dense, self.post_feedforward_layernorm_2)
        scale, closing = self.layer_scalar.to(x.dtype), self.post_feedforward_layernorm
        if self.hidden_size_per_layer_input:
            assert per_layer_input is not None
            x, gated = self._to_gate(branch, x, closing, per_layer_input)
            branch, closing = self.per_layer_projection(gated), self.post_per_layer_input_norm
        x, _ = _close(branch, x, closing, scale=scale)
        return x

    def _to_gate(
        self, branch: Tensor, x: Tensor, closing: gemma4.Gemma4RMSNorm, ple: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual with the feed-forward's branch, and the per-layer gate of it."""
        linear, plain = self.per_layer_input_gate, is_plain(self.act_fn, base.TanhGELU)
        made = _close_into_gate(branch, x, closing, linear, ple) if plain else None
        if made is not None:
            return made
        x, _ = _close(branch, x, closing)
        gate = linear(x)
        return x, gelu_mul(gate, ple) if plain else self.act_fn(gate) * ple


SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    gemma4.Gemma4RMSNorm: RMSNorm,
    gemma4.Gemma4TextMLP: MLP,
    gemma4.Gemma4TextRotaryEmbedding: RotaryEmbedding,
    gemma4.Gemma4TextAttention: Attention,
    gemma4.Gemma4TextRouter: Router,
    gemma4.Gemma4TextDecoderLayer: DecoderLayer,
}
for _theirs, _ours in SWAPPED.items():
    # Tools find layers by the name of their class (which to shard, which not to split).
    _ours.__name__ = _theirs.__name__
