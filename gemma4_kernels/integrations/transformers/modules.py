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

from ... import ops
from ...common import cosines_and_sines, gelu_mul
from ...fusion import is_plain, why_not_plain
from ...joined import products
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


def close(
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


class MLP(gemma4.Gemma4TextMLP):
    def forward(self, x: Tensor) -> Tensor:
        if not base.takes_ops(x):
            return super().forward(x)
        made = products(x, self.gate_proj, self.up_proj)
        gate, plain = made[0] if made else self.gate_proj(x), is_plain(self.act_fn, base.TanhGELU)
        gate = gate if plain else self.act_fn(gate)
        up = made[1] if made else self.up_proj(x)
        return self.down_proj(gelu_mul(gate, up) if plain else gate * up)


class RotaryEmbedding(gemma4.Gemma4TextRotaryEmbedding):
    """Cosines and sines, or, while the text model says that its layers alone read them, positions
    [.., N, 1] and frequencies [1, N, C/2], shaped so that they can be sliced alike."""

    read_by_layers_alone = False

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> Positions:
        if not (self.read_by_layers_alone and base.takes_ops(x)):
            return super().forward(x, position_ids, layer_type)
        inv_freq = getattr(self, f"{layer_type}_inv_freq").float()
        return position_ids[..., None], inv_freq.expand(1, position_ids.shape[-1], -1)


def are_positions(position_embeddings: Positions | None) -> TypeGuard[Positions]:
    return position_embeddings is not None and not position_embeddings[0].is_floating_point()


def cosines(position_embeddings: Positions, x: Tensor) -> Positions:
    """What transformers' rotary embedding would have made."""
    positions, inv_freq = position_embeddings
    return cosines_and_sines(positions[..., 0], inv_freq, x.dtype)


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
        fused = are_positions(position_embeddings)
        if fused and self.why_unfused(hidden_states.device) is not None:
            position_embeddings, fused = cosines(position_embeddings, hidden_states), False
        if not fused:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, shared_kv_states, **kwargs
            )
        tokens = hidden_states.shape[0] * tokens
        made = products(hidden_states, *self.linears)
        if made is None:
            made = [linear(hidden_states) for linear in self.linears]
        q, k, v, *_ = *(part.reshape(tokens, -1, self.head_dim) for part in made), None, None
        assert q is not None
        given = position_embeddings, attention_mask, shared_kv_states
        out, weights = self.attend((q, k, v), hidden_states.shape, *given, **kwargs)
        return self.o_proj(out), weights

    @property
    def linears(self) -> list[nn.Linear]:
        """Of q, k and v: no v where k gives it, q alone where keys are borrowed."""
        if self.is_kv_shared_layer:
            return [self.q_proj]
        return [self.q_proj, self.k_proj] + ([] if self.v_proj is None else [self.v_proj])

    def attend(
        self,
        parts: tuple[Tensor, Tensor | None, Tensor | None],
        shape: torch.Size,
        position_embeddings: Positions,
        attention_mask: Tensor | None,
        shared_kv_states: dict[str, tuple[Tensor, Tensor]],
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What is between the projections, whose q, k and v [T, heads, C] are given, and `o_proj`:
        [B, N, H C] of input in this shape, and attention's weights if somebody makes any."""
        # The cache's name until transformers 5.23, and from then on.
        cache = kwargs.pop("past_key_values", None)
        cache = kwargs.pop("cache", cache)
        heads, kind = (*shape[:2], -1, self.head_dim), self.layer_type
        assert kind is not None
        positions_T = position_embeddings[0].expand(*shape[:2], 1).flatten()
        inv_freq, eps = position_embeddings[1][0, 0], self.q_norm.eps
        q, k, v = parts
        if k is None:
            weight = self.q_norm.weight
            q, _, _ = ops.qkv_norm_rope(q, None, None, weight, None, positions_T, inv_freq, eps)
            key, value = shared_kv_states[kind]
        else:
            weights = self.q_norm.weight, self.k_norm.weight
            q, made_k, made_v = ops.qkv_norm_rope(q, k, v, *weights, positions_T, inv_freq, eps)
            assert made_k is not None and made_v is not None  # as k is
            key, value = (x.view(heads).transpose(1, 2) for x in (made_k, made_v))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        if self.store_full_length_kv:
            shared_kv_states[kind] = key, value
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, gemma4.eager_attention_forward
        )
        out, seen = attend(
            self,
            q.view(heads).transpose(1, 2),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return out.reshape(*shape[:2], -1), seen


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
