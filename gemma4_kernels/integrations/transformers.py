"""These ops under models of transformers.

`register()` adds an attention and an experts implementation to transformers, both called
"gemma4_kernels". `enable(model)` also puts norms, MLP, rotary embedding, router and the per-layer
gate of a Gemma 4 model on these ops, in place; `explain(model)` says what runs where. On a CPU,
which has no kernels, all of it is left to transformers and torch, but for the attention of long
prompts.

The mask function registered with the attention never builds a mask for what the kernels can do by
themselves. What it hands to each layer is one of

    None                     causal, the queries being the last keys
    int [B, 1, N, 1]         causal, query n of row b sees keys before that number (a static cache)
    int [B, 1, N, 2]         the same from a first key on (padding)
    long [B, 1, N, M]        packed rows: where a row's sequences start, padded with N
    floating [B, 1, N, S]    anything else, which torch's attention computes, with a warning

4-d all of them, for transformers slices dimension 2 where layers share keys.

Longer than 400 lines so that a new version of transformers is a matter of one file.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from .. import extension, library, ops, reference

NAME = "gemma4_kernels"
VERSIONS = ((5, 24), (6, 0))
# attention_decode takes up to this many new tokens a sequence.
DECODE_TOKENS = 16
TANH_GELU = type(transformers.activations.ACT2FN["gelu_pytorch_tanh"])
# What a mask function of transformers may be made of, for a mask that the kernels do themselves.
KNOWN = {"causal_mask_function", "sliding_window_overlay", "packed_sequence_mask_function"}


def register() -> None:
    """Adds attn_implementation and experts_implementation "gemma4_kernels" to transformers.

    Raises RuntimeError under a transformers that this was not made for.
    """
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not VERSIONS[0] <= version < VERSIONS[1]:
        raise RuntimeError(
            f"gemma4_kernels.integrations.transformers needs transformers >= 5.24, < 6, "
            f"got {transformers.__version__}"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    ExpertsInterface.register(NAME, experts)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls to make a mask; see the top of this file for what it makes.

    Query n stands at position q_offset + n, key j at kv_offset + j; attention_mask [B, positions]
    is False for padding. mask_function(row, head, query, key) says what mask is wanted; its window
    is the layer's. Raises ValueError for padding that is not at the ends.
    """
    if torch.compiler.is_compiling():  # which cannot look into a function made under it
        # transformers allows the skip where the mask is causal, causal in a window, or in chunks.
        in_chunks = getattr(kwargs.get("config"), "attention_chunk_size", None)
        known = mask_function is causal_mask_function or (allow_is_causal_skip and not in_chunks)
        packed = None
    else:
        conditions = _conditions(mask_function)
        known = "causal_mask_function" in conditions and conditions.keys() <= KNOWN
        packed = conditions.get("packed_sequence_mask_function")
    if not known:
        return eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            device=device,
            **kwargs,
        )
    if packed is not None:
        return _starts(_held(packed)["packed_sequence_mask"])
    # Reads the device, as transformers does for sdpa; a compiler cannot, and takes the bounds.
    if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
        attention_mask = None
    at_the_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if attention_mask is None and at_the_end:
        return None
    end = torch.arange(1, q_length + 1, device=device) + q_offset - kv_offset
    end = end.clamp(max=kv_length).expand(batch_size, 1, q_length).unsqueeze(-1)
    if attention_mask is None:
        return end.int()
    first = _first_real(attention_mask) - kv_offset
    return torch.cat([first.clamp(min=0)[:, None, None, None].expand_as(end), end], -1).int()


def _held(function: Callable[..., Any]) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)


def _conditions(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """What a mask function demands, each under the name of the function that made it."""
    name = function.__qualname__.partition(".")[0]
    if name == "and_masks":
        parts = _held(function).get("mask_functions", ())
        return {k: v for part in parts for k, v in _conditions(part).items()}
    # Positions instead of places: the same within a sequence, and sequences are a condition apart.
    if name == "remap_positions_for_packed_sequence":
        return _conditions(_held(function)["mask_function"])
    return {name: function}


def _starts(sequence_BN: Tensor) -> Tensor:
    """From the number of each token's sequence, where the sequences start: long [B, 1, N, M].

    Reads the device for M, the most sequences of a row.
    """
    length = sequence_BN.shape[1]
    begins = F.pad(sequence_BN.diff(dim=1) != 0, (1, 0), value=True)
    places = torch.arange(length, device=begins.device).expand_as(begins)
    starts = places.masked_fill(~begins, length).sort(1).values[:, : int(begins.sum(1).max())]
    return starts[:, None, None].expand(-1, 1, length, -1)


def _first_real(attention_mask: Tensor) -> Tensor:
    """The position [B] of each row's first token that is no padding."""
    keep = attention_mask.bool()
    first = keep.int().argmax(-1)
    # A run of ones begins once. Zeros after it are of no concern: no real query comes later.
    starts = keep[:, :1].sum(-1) + (keep[:, 1:] & ~keep[:, :-1]).sum(-1)
    whole = (starts <= 1).all()
    sentence = "attention_mask must be one run of ones per row (left or right padding)"
    if keep.is_cpu and not torch.compiler.is_compiling():
        if not whole:
            raise ValueError(sentence)
    else:
        torch._assert_async(whole, sentence)
    return first


def _takes_ops(x: Tensor) -> bool:
    """Whether to run these ops on x, or what transformers would run without them.

    On a CPU there is no kernel, and an eager twin's checks and shapes cost time. Asked at every
    call, for a model may move.
    """
    return not x.is_cpu


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention: query [B, H, N, C], key and value [B, G, S, C] to
    [B, N, H, C]. Raises ValueError for dropout."""
    if dropout:
        raise ValueError(f"{NAME} attention has no dropout, got attention_dropout {dropout}")
    options = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap or 0.0,
    }
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is not None and attention_mask.is_floating_point():
        return _masked(module, query, key, value, attention_mask, **options), None
    packed = attention_mask is not None and attention_mask.dtype == torch.int64
    # For more queries a mask would be large, and the op leaves out the keys that none of them sees.
    short = query.shape[2] <= reference.FUSED_ROWS
    if not _takes_ops(query) and short and is_causal and not packed and not softcap:
        seen = _seen(query, key, attention_mask, sliding_window or 0)
        return _by_torch(query, key, value, seen, options["scale"]), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    starts_at_0 = attention_mask is None or (
        attention_mask.dtype == torch.int32 and attention_mask.shape[-1] == 1
    )
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if is_causal and starts_at_0 and q.shape[1] <= DECODE_TOKENS and not training:
        if attention_mask is None:
            seq_lens = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
        else:
            seq_lens = attention_mask[:, 0, -1, 0].contiguous()
        window = sliding_window or 0
        out, _ = ops.attention_decode(q, k, v, seq_lens, window=window, return_lse=False, **options)
        return out, None
    cu_q, cu_k = _sequences(q, k, attention_mask)
    out, _ = ops.attention_prefill(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_q,
        cu_k,
        q.shape[1],
        k.shape[1],
        causal=is_causal,
        window=(sliding_window or 0) if is_causal else 0,
        **options,
    )
    return out.view(q.shape), None


def _seen(query: Tensor, key: Tensor, bounds: Tensor | None, window: int) -> Tensor | None:
    """The keys that `bounds` let each query see, [B, 1, N, S] or [N, S]; None if it is all."""
    queries, keys = query.shape[2], key.shape[2]
    narrow = 0 < window < keys
    if bounds is None and queries == 1 and not narrow:
        return None
    places = torch.arange(keys, dtype=torch.int32, device=query.device)
    end = places[keys - queries :, None] + 1 if bounds is None else bounds[..., -1:]
    seen = places < end
    if narrow:
        seen &= places >= end - window
    if bounds is not None and bounds.shape[-1] == 2:
        seen &= places >= bounds[..., :1]
    return seen


def _sequences(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """cu_seqlens of the queries and of the keys of all rows, made on the device.

    With first and last keys a row is three sequences: its padding, its tokens, and keys that are
    still to come, which no query sees.
    """
    (batch, queries), keys = q.shape[:2], k.shape[1]
    if mask is None:
        rows = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        return rows * queries, rows * keys
    row = torch.arange(batch, dtype=torch.int32, device=q.device)
    if mask.dtype == torch.int64:
        starts_k = mask[:, 0, 0]
        starts_q = (starts_k - (keys - queries)).clamp(min=0)  # queries are the last of a row
    else:
        starts_q, starts_k = _starts_of_padded(mask, queries)
    return tuple(
        F.pad((starts + row[:, None] * length).flatten(), (0, 1), value=batch * length).int()
        for starts, length in ((starts_q, queries), (starts_k, keys))
    )


def _starts_of_padded(bounds: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    end = bounds[:, 0, -1, -1]
    begin = bounds[:, 0, 0, 0] if bounds.shape[-1] == 2 else torch.zeros_like(end)
    # Queries before the first token are padding; the last query stands at key `end` - 1.
    padding = (begin - (end - queries)).clamp(min=0, max=queries)
    zero = torch.zeros_like(end)
    return torch.stack([zero, padding, zero + queries], 1), torch.stack([zero, begin, end], 1)


@torch.compiler.assume_constant_result  # so that a compiler calls it, while it traces
def _warn(sentence: str) -> None:
    library.warn(sentence)


def _masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention under a mask of any form, by torch."""
    _warn(
        f"{type(module).__name__} runs torch's attention, without a kernel: its mask is not causal "
        "with padding at the ends (images, a bidirectional model, or what a compiler cannot tell "
        "from packed rows: then give an attention_mask)"
    )
    if softcap:
        raise ValueError(f"{NAME} attention with a softcap takes causal masks alone")
    return _by_torch(query, key, value, mask[..., : key.shape[2]], scale)


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    gqa = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous()


def experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls for a layer's experts. Raises ValueError for experts that are not
    down(gelu_tanh(gate x) · up x) with gate and up in one tensor, gate first."""
    activation = getattr(module, "act_fn", None)
    tanh = isinstance(activation, TANH_GELU)
    usual = not getattr(module, "is_transposed", False) and getattr(module, "has_gate", True)
    usual = usual and not getattr(module, "has_bias", False)
    if not (tanh and usual and getattr(module, "is_concatenated", True)):
        raise ValueError(
            f"{NAME} experts must have a tanh-GELU gate, no bias, and gate and up in one tensor "
            f"[E, 2F, D]; {type(module).__name__} has others ({type(activation).__name__})"
        )
    if _by_grouped_mm(module.gate_up_proj, module.down_proj):
        grouped_mm = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return grouped_mm(module, hidden_states, top_k_index, top_k_weights)
    return ops.moe_experts(
        hidden_states, module.gate_up_proj, module.down_proj, top_k_index, top_k_weights
    )


def _by_grouped_mm(*weights: Tensor) -> bool:
    """Whether transformers' grouped_mm runs these experts, its choice on a CPU.

    torch's takes no float64, and rows of whole 16 bytes alone.
    """
    return not any(
        _takes_ops(w)
        or w.dtype == torch.float64
        or w.shape[-1] * w.element_size() % 16
        or not w.is_contiguous()
        for w in weights
    )


# ---- enable: the same modules, as subclasses whose forward takes these ops off the CPU


class RMSNorm(gemma4.Gemma4RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _takes_ops(hidden_states):
            return super().forward(hidden_states)
        return ops.rms_norm(hidden_states, self.weight if self.with_scale else None, self.eps)


class MLP(gemma4.Gemma4TextMLP):
    def forward(self, x: Tensor) -> Tensor:
        if not _takes_ops(x):
            return super().forward(x)
        return self.down_proj(_gelu_times(self.gate_proj(x), self.up_proj(x)))


def _gelu_times(gate: Tensor, other: Tensor) -> Tensor:
    """gelu_tanh(gate) · other, of any leading shape."""
    product = ops.ple_gate(gate.flatten(0, -2), other.flatten(0, -2).unsqueeze(1), 0)
    return product.view(gate.shape)


class RotaryEmbedding(gemma4.Gemma4TextRotaryEmbedding):
    """Hands on positions and frequencies in place of cosines and sines, shaped so that they can be
    sliced alike; `Attention` below turns by them. On a CPU cosines and sines, as ever."""

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        if not _takes_ops(x):
            return super().forward(x, position_ids, layer_type)
        inv_freq = getattr(self, f"{layer_type}_inv_freq").float()
        return position_ids[..., None], inv_freq.expand(1, position_ids.shape[-1], -1)


class Attention(gemma4.Gemma4TextAttention):
    """Goes by what the rotary embedding made, not by its own device: in a model that is spread
    over several the two may differ."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        shared_kv_states: Any,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if position_embeddings[0].is_floating_point():  # cosines, and no positions
            return super().forward(
                hidden_states,
                position_embeddings,
                attention_mask,
                shared_kv_states,
                cache=cache,
                **kwargs,
            )
        shape = hidden_states.shape[:-1]
        x_TD = hidden_states.flatten(0, 1)
        positions = position_embeddings[0][..., 0].expand(shape).flatten()
        inv_freq = position_embeddings[1][0, 0]

        def heads(projection: nn.Linear) -> Tensor:
            return projection(x_TD).unflatten(-1, (-1, self.head_dim))

        q, q_weight, eps = heads(self.q_proj), self.q_norm.weight, self.q_norm.eps
        if self.is_kv_shared_layer:
            q, _, _ = ops.qkv_norm_rope(q, None, None, q_weight, None, positions, inv_freq, eps)
            key, value = shared_kv_states[self.layer_type]
        else:
            v = None if self.v_proj is None else heads(self.v_proj)
            q, k, v = ops.qkv_norm_rope(
                q, heads(self.k_proj), v, q_weight, self.k_norm.weight, positions, inv_freq, eps
            )
            key, value = (x.unflatten(0, shape).transpose(1, 2) for x in (k, v))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        if self.store_full_length_kv:
            shared_kv_states[self.layer_type] = key, value
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, gemma4.eager_attention_forward
        )
        out, weights = attend(
            self,
            q.unflatten(0, shape).transpose(1, 2),
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
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not _takes_ops(hidden_states):
            return super().forward(hidden_states)
        scaled = self.norm(hidden_states) * self.scale * self.scalar_root_size
        scores = self.proj(scaled)
        weights, index = ops.moe_route(scores, self.per_expert_scale, self.config.top_k_experts)
        return F.softmax(scores, dim=-1, dtype=torch.float32), weights, index.long()


class DecoderLayer(gemma4.Gemma4TextDecoderLayer):
    """Each norm that closes a branch, its residual and the norm that opens the next are one op."""

    def forward(
        self,
        hidden_states: Tensor,
        per_layer_input: Tensor | None = None,
        shared_kv_states: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if not _takes_ops(hidden_states):
            return super().forward(
                hidden_states,
                per_layer_input,
                shared_kv_states,
                position_embeddings,
                attention_mask,
                position_ids,
                cache,
                **kwargs,
            )
        eps, scale = self.input_layernorm.eps, self.layer_scalar.to(hidden_states.dtype)
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            shared_kv_states=shared_kv_states,
            position_ids=position_ids,
            cache=cache,
            **kwargs,
        )
        x, y = ops.add_rms_norm(
            attended,
            hidden_states,
            self.post_attention_layernorm.weight,
            self.pre_feedforward_layernorm.weight,
            None,
            eps,
        )
        branch = self.mlp(y)
        if self.enable_moe_block:
            flat = x.flatten(0, 1)
            _, weights, index = self.router(flat)
            routed = self.experts(self.pre_feedforward_layernorm_2(flat), index, weights)
            dense = self.post_feedforward_layernorm_1(branch)
            weight = self.post_feedforward_layernorm_2.weight
            branch, _ = ops.add_rms_norm(routed.view(x.shape), dense, weight, None, None, eps)
        closing = self.post_feedforward_layernorm.weight
        if self.hidden_size_per_layer_input:
            x, _ = ops.add_rms_norm(branch, x, closing, None, None, eps)
            branch = self.per_layer_projection(
                _gelu_times(self.per_layer_input_gate(x), per_layer_input)
            )
            closing = self.post_per_layer_input_norm.weight
        x, _ = ops.add_rms_norm(branch, x, closing, None, scale, eps)
        return x


SWAPPED = {
    cls.__base__: cls for cls in (RMSNorm, MLP, RotaryEmbedding, Attention, Router, DecoderLayer)
}
ORIGINAL = {ours: theirs for theirs, ours in SWAPPED.items()}


def enable(model: nn.Module) -> nn.Module:
    """Puts a Gemma 4 model's modules, attention and experts on these ops, in place.

    Weights, their names and the outputs stay; `disable` takes it back but for the implementations,
    which `set_attn_implementation` sets. On a CPU all of it runs what transformers would, but for
    the attention of long prompts. Returns the model. Raises ValueError for a model without
    Gemma 4 text layers, or with an activation or rotary embedding that these ops do not compute.
    """
    layers = [m for m in model.modules() if isinstance(m, gemma4.Gemma4TextDecoderLayer)]
    if not layers:
        raise ValueError(f"enable needs a Gemma 4 text model, got {type(model).__name__}")
    config = layers[0].config
    if config.hidden_activation != "gelu_pytorch_tanh":
        raise ValueError(f"enable needs the tanh-GELU, got {config.hidden_activation}")
    for rotary in (m for m in model.modules() if isinstance(m, gemma4.Gemma4TextRotaryEmbedding)):
        odd = set(rotary.rope_type.values()) - {"default", "proportional"}
        if odd:
            raise ValueError(f"enable needs default or proportional rope, got {sorted(odd)}")
    register()
    for module in model.modules():
        module.__class__ = SWAPPED.get(type(module), type(module))
    model.set_attn_implementation(NAME)
    if config.enable_moe_block:
        model.set_experts_implementation(NAME)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Takes back what `enable` did to the modules. Returns the model."""
    for module in model.modules():
        module.__class__ = ORIGINAL.get(type(module), type(module))
    return model


def explain(model: nn.Module) -> str:
    """One line a layer: which attention, experts and norms it runs, on a kernel or why not."""
    lines = []
    for layer in (m for m in model.modules() if isinstance(m, gemma4.Gemma4TextDecoderLayer)):
        attn, config = layer.self_attn, layer.config
        weight = attn.q_proj.weight
        head = torch.empty(0, 1, attn.head_dim, dtype=weight.dtype, device="meta")
        parts = [
            _said("attention", config._attn_implementation, "attention_prefill", (head,), weight)
        ]
        if layer.enable_moe_block:
            gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
            args = (gate_up[0], gate_up, down)
            chosen = config._experts_implementation
            if chosen == NAME and _by_grouped_mm(gate_up, down):
                chosen = "grouped_mm"
            parts.append(_said("experts", chosen, "moe_experts", args, weight))
        swapped = isinstance(layer, DecoderLayer) and _takes_ops(weight)
        ours = NAME if swapped else "transformers"
        parts.append(_said("norms, MLP, rotary", ours, "rms_norm", (weight,), weight))
        lines.append(f"layer {layer.layer_idx} ({attn.layer_type}): " + "; ".join(parts))
    return "\n".join(lines)


def _said(part: str, chosen: str, op: str, args: tuple[Tensor, ...], weight: Tensor) -> str:
    if chosen != NAME:
        return f"{part}: {chosen}"
    if not _takes_ops(weight):
        return f"{part}: eager torch (no kernels for {weight.device})"
    if extension.BUILD.reason:
        return f"{part}: eager twins ({extension.BUILD.reason})"
    if not extension.covers(weight.device):
        return f"{part}: eager twins (no kernels for {weight.device})"
    reason = library.why_eager(op, args)
    return f"{part}: kernels" if reason is None else f"{part}: eager twins ({reason})"
