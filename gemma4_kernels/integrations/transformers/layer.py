"""A layer of a Gemma 4 text model, what its model tells it, and all that `enable` swaps."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from ...common import gelu_mul
from ...fusion import is_plain, why_not_plain, why_seen
from ...residual import Two
from . import base, decode
from .modules import (
    MLP,
    Attention,
    RMSNorm,
    RotaryEmbedding,
    Router,
    are_positions,
    close,
    cosines,
)


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


def before_model(
    model: gemma4.Gemma4TextModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook of the text model. It is no subclass: transformers knows what a model can record
    (hidden states, router logits) by the name of its class."""
    rotary = model.rotary_emb
    if type(rotary) is RotaryEmbedding and why_cosines(model) is None:
        rotary.read_by_layers_alone = True
        if not torch.is_grad_enabled():
            kwargs |= {decode.STEP: decode.Step(model)}
        elif model.hidden_size_per_layer_input and not torch.compiler.is_compiling():
            kwargs |= {SLICES: Slices()}
    return args, kwargs


def after_model(
    model: gemma4.Gemma4TextModel, _: object, kwargs: dict[str, Any], output: object
) -> None:
    rotary = model.rotary_emb
    if type(rotary) is RotaryEmbedding:
        rotary.read_by_layers_alone = False
    step = kwargs.get(decode.STEP)
    if step is not None and output is not None:
        step.finish()


# The keyword by which the layers of one forward, if it is differentiated, are given Slices.
SLICES = "gemma4_kernels_slices"


class Slices:
    """The layers' slices of the per-layer inputs, cut apart at once.

    transformers cuts each out alone, whose gradient is zeros of all layers' but for one; these are
    put together once.
    """

    def __init__(self) -> None:
        self.whole: Tensor | None = None
        self.slices: tuple[Tensor, ...] = ()

    def like(self, given: Tensor) -> Tensor:
        """The same slice as the given one, or this one where it was not cut out of all layers'."""
        whole, cut = given._base, type(given.grad_fn).__name__ == "SelectBackward0"
        if not cut or whole is None or whole.ndim != given.ndim + 1 or whole.stride(2) == 0:
            return given
        if whole is not self.whole:
            self.whole, self.slices = whole, whole.unbind(2)
        layer = (given.storage_offset() - whole.storage_offset()) // whole.stride(2)
        if not 0 <= layer < len(self.slices):
            return given
        found = self.slices[layer]
        same = found.data_ptr() == given.data_ptr() and found.shape == given.shape
        return found if same and found.stride() == given.stride() else given


# Of a layer, after those that it takes itself: their order, should one be given without its name.
ATTENTION_ARGUMENTS = ("shared_kv_states", "position_embeddings", "attention_mask", "position_ids")


class DecoderLayer(gemma4.Gemma4TextDecoderLayer):
    """Each norm that closes a branch, its residual and the norm that opens the next are one op; of
    a few tokens they are done by the product that comes next (see decode.py)."""

    def forward(
        self,
        hidden_states: Tensor,
        per_layer_input: Tensor | None = None,
        *args: object,
        **kwargs: Any,
    ) -> Tensor:
        kwargs |= zip(ATTENTION_ARGUMENTS, args, strict=False)
        turns = kwargs.get("position_embeddings")
        if are_positions(turns) and why_seen(self.self_attn, Attention) is not None:
            kwargs["position_embeddings"] = cosines(turns, hidden_states)
        step: decode.Step | None = kwargs.pop(decode.STEP, None)
        slices: Slices | None = kwargs.pop(SLICES, None)
        if not base.takes_ops(hidden_states):
            if step is not None:
                residual = step.take(hidden_states)
                x_TD = step.for_modules(residual, self, kwargs)
                hidden_states = x_TD.view(hidden_states.shape)
            return super().forward(hidden_states, per_layer_input, **kwargs)
        if slices is not None and per_layer_input is not None:
            per_layer_input = slices.like(per_layer_input)
        if isinstance(self.self_attn, Attention) and not self.self_attn.is_kv_shared_layer:
            decode.static_layer(self.self_attn, kwargs)
        few = decode.are_few(hidden_states)
        branch, x = self._attended(hidden_states, step, few, kwargs)
        closing = self.post_attention_layernorm
        made = decode.feed_forward(self, branch, x) if few else None
        if made is None:
            x, y = close(branch, x, closing, self.pre_feedforward_layernorm)
            assert y is not None  # as a norm was given
            made = self._fed_forward(x, y), x
        both, x = made
        scale, closing = self.layer_scalar.to(x.dtype), self.post_feedforward_layernorm
        if self.hidden_size_per_layer_input:
            assert per_layer_input is not None
            x, gated = self._to_gate(_one(both, x), x, closing, per_layer_input)
            both = decode.projected(gated, self.per_layer_projection)
            closing = self.post_per_layer_input_norm
        if few and step is not None and step.hands_on(self, both, x, closing):
            return step.hand_on(both, x, closing, scale)
        x, _ = close(_one(both, x), x, closing, scale=scale)
        return x

    def _attended(
        self, hidden_states: Tensor, step: decode.Step | None, few: bool, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """What attention gives, and the residual that it is to be added to."""
        attn, x = self.self_attn, hidden_states
        if step is not None and (few or step.pending is not None):
            residual = step.take(x)
            if few and are_positions(kwargs.get("position_embeddings")):
                made = decode.attention(self, residual, step, x.shape, kwargs)
                if made is not None:
                    return made
            x = step.for_modules(residual, self, kwargs).view(x.shape)
        attended, _ = attn(hidden_states=self.input_layernorm(x), **kwargs)
        return attended, x

    def _fed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The branch of the MLP, and of the experts beside it; y is x behind its norm."""
        branch = self.mlp(y)
        if self.enable_moe_block:
            dense, flat = self.post_feedforward_layernorm_1(branch), x.flatten(0, 1)
            _, weights, index = self.router(flat)
            routed = self.experts(self.pre_feedforward_layernorm_2(flat), index, weights)
            branch, _ = close(routed.view(x.shape), dense, self.post_feedforward_layernorm_2)
        return branch

    def _to_gate(
        self, branch: Tensor, x: Tensor, closing: gemma4.Gemma4RMSNorm, ple: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual with the feed-forward's branch, and the per-layer gate of it."""
        linear, plain = self.per_layer_input_gate, is_plain(self.act_fn, base.TanhGELU)
        made = decode.gate(branch, x, closing, linear, ple) if plain else None
        if made is not None:
            return made
        x, _ = close(branch, x, closing)
        gate = linear(x)
        return x, gelu_mul(gate, ple) if plain else self.act_fn(gate) * ple


def _one(branch: Tensor | Two, x: Tensor) -> Tensor:
    """The branch in the shape of x, of two their sum."""
    return branch.closed().view(x.shape) if isinstance(branch, Two) else branch


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
