"""The Gemma 4 text model, from the outside in: causal LM, stack, layer, attention, feed-forward.

Everything between the embedding and the head works on packed tokens (see layout.py) and speaks to
`gemma4_kernels` for all that is not a matrix product. Each norm that opens a branch is computed by
the op that closes the branch before it, across layers too, so a layer takes and returns the
residual x and its normed form y. Longer than 400 lines so that the whole model is one file to read.

Shape letters: B rows, S columns of the padded batch, T packed tokens, D model width, H query
heads, G KV heads, C head channels, F feed-forward width, E experts, K experts per token, P PLE
width, L layers, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemma4_kernels import ops

from .cache import Cache, CacheStep, DecodeStep, Keys
from .config import FULL, Gemma4TextConfig
from .generate import GenerationConfig, generate
from .layout import Layout, make_layout
from .modules import PackedLinear, RMSNorm, RotaryFrequencies, linear
from .weights import load_pretrained, save_pretrained

# Tokens whose loss is computed at once: the fp32 copy of their logits is all that exists of it.
LOSS_TOKENS = 1024


@dataclass
class ModelOutput:
    """last_hidden_state [B, S, D]; hidden_states as transformers has them: the scaled embedding,
    each layer's output but the last, and the normed last one."""

    last_hidden_state: Tensor
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput:
    """logits [B, S or logits_to_keep, V], zero in the padding; loss if labels were given."""

    logits: Tensor
    loss: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache


class Gemma4ForCausalLM(nn.Module):
    """A Gemma 4 text model with its language-model head.

    Drop-in for transformers' class of this name: same state-dict names, same numbers.
    """

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
        self.model = Gemma4TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=config.initializer_range)
        self.tie_weights()

    from_pretrained = classmethod(load_pretrained)
    save_pretrained = save_pretrained
    generate = generate

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def gradient_checkpointing_enable(self) -> None:
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing = False

    def resize_token_embeddings(self, num_tokens: int) -> nn.Embedding:
        """Gives the token table, the PLE table and the head `num_tokens` rows.

        New rows are the mean of the old ones. Returns the token embedding.
        """
        self.model.resize_token_embeddings(num_tokens)
        if not self.config.tie_word_embeddings:
            self.lm_head.weight = _resized(self.lm_head.weight, num_tokens)
        self.lm_head.out_features = num_tokens
        self.tie_weights()
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        past_key_values: Cache | None = None,
    ) -> CausalLMOutput:
        """Logits of a batch; arguments as in `Gemma4TextModel.forward`, and:

        labels [B, S]: the loss is the mean cross-entropy, in fp32, of each real token's logits
        against the label of the next column, over labels that are not -100 (0 if all are).
        logits_to_keep: the last n columns alone, or the columns at the given indices; 0 keeps all.
        """
        cache = cache if cache is not None else past_key_values
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need all logits: leave logits_to_keep at 0")
        columns = logits_to_keep if isinstance(logits_to_keep, int) else 0
        if columns < 0:
            raise ValueError(f"logits_to_keep must be 0 (all) or a column count, got {columns}")
        x_TD, layout, cache, states = self.model.run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            per_layer_inputs=per_layer_inputs,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            columns=columns,
        )
        loss = None
        if not isinstance(logits_to_keep, int):
            logits = self.logits(layout.unpack(x_TD)[:, logits_to_keep])
        elif columns and layout.shape[1] > columns:
            logits = self.logits(layout.unpack(x_TD)[:, -columns:])
        else:
            logits_TV = self.logits(x_TD)
            loss = None if labels is None else self._loss(logits_TV, labels, layout)
            logits = layout.unpack(logits_TV)
        return CausalLMOutput(logits, loss, cache, states)

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] normed hidden states to soft-capped logits [..., V]."""
        logits = self.lm_head(x)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else ops.softcap(logits, cap)

    def _loss(self, logits_TV: Tensor, labels: Tensor, layout: Layout) -> Tensor:
        if labels.shape != layout.shape:
            raise ValueError(
                f"labels must be {list(layout.shape)}, like the input, got {list(labels.shape)}"
            )
        targets = layout.pack(F.pad(labels[:, 1:], (0, 1), value=-100))
        total = logits_TV.new_zeros((), dtype=torch.promote_types(logits_TV.dtype, torch.float32))
        pairs = zip(logits_TV.split(LOSS_TOKENS), targets.split(LOSS_TOKENS), strict=True)
        for part, target in pairs:
            # Recomputed in backward: autograd would keep every part's fp32 softmax.
            total = total + checkpoint(_summed_loss, part, target, use_reentrant=False)
        return total / (targets != -100).sum().clamp(min=1)


def _summed_loss(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum")


def _resized(weight: nn.Parameter, rows: int) -> nn.Parameter:
    new = weight.new_empty(rows, weight.shape[1])
    kept = min(rows, weight.shape[0])
    new[:kept] = weight.detach()[:kept]
    new[kept:] = weight.detach().float().mean(0).to(weight.dtype)
    return nn.Parameter(new, requires_grad=weight.requires_grad)


class Gemma4TextModel(nn.Module):
    """The stack without a head."""

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width, std = config.hidden_size, config.initializer_range
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embed_tokens.weight, std=std)
        self.rope = RotaryFrequencies(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.ple_width = config.hidden_size_per_layer_input
        if self.ple_width:
            packed = config.num_hidden_layers * self.ple_width
            self.embed_tokens_per_layer = nn.Embedding(config.vocab_size_per_layer_input, packed)
            nn.init.normal_(self.embed_tokens_per_layer.weight, std=std)
            self.per_layer_model_projection = linear(width, packed, config)
            self.per_layer_projection_norm = RMSNorm(self.ple_width, config.rms_norm_eps)

    from_pretrained = classmethod(load_pretrained)
    save_pretrained = save_pretrained

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def resize_token_embeddings(self, num_tokens: int) -> nn.Embedding:
        """As in `Gemma4ForCausalLM`, without the head."""
        tables = [self.embed_tokens]
        if self.ple_width:
            tables.append(self.embed_tokens_per_layer)
            self.config.vocab_size_per_layer_input = num_tokens
        for table in tables:
            table.weight = _resized(table.weight, num_tokens)
            table.num_embeddings = num_tokens
        self.config.vocab_size = num_tokens
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """Hidden states of a batch.

        input_ids [B, S], or inputs_embeds [B, S, D] already scaled by √D, in which case a model
        with PLE also needs per_layer_inputs [B, S, L, P], its token part already scaled by √P.
        attention_mask [B, S] of 0 and 1 (cached columns first); position_ids [B, S], which restart
        where a row packs several sequences. Positions default to 0.. for each row's real tokens.

        cache: of earlier tokens; use_cache makes a new one (default: the config's choice, outside
        of training and for rows of one sequence). A forward with a cache is inference: it runs
        without gradients. Raises ValueError for inputs that contradict each other.
        """
        x_TD, layout, cache, states = self.run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            per_layer_inputs=per_layer_inputs,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        return ModelOutput(layout.unpack(x_TD), cache, states)

    def run(
        self,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        columns: int = 0,
    ) -> tuple[Tensor, Layout, Cache | None, tuple[Tensor, ...] | None]:
        """`forward` on packed tokens: normed states [T, D], their layout, cache, hidden states.

        columns > 0: later layers may compute the last columns alone, once every key is made.
        """
        shape = self._checked_shape(input_ids, inputs_embeds, per_layer_inputs)
        device = self.norm.weight.device
        if cache is not None:
            cache.check(self.config, shape[0], self.dtype)
            layout = make_layout(
                shape, device, attention_mask, position_ids, cache.lengths, cache.columns
            )
        else:
            layout = make_layout(shape, device, attention_mask, position_ids)
            if self._wants_cache(use_cache, layout):
                cache = Cache(self.config, shape[0], self.dtype, device, layout.max_seqlen_q)
        if cache is not None and self.config.bidirectional:
            raise ValueError("use_bidirectional_attention 'all' has no cache: every token sees all")
        if input_ids is not None:
            ids_T = layout.pack(input_ids).to(device)
            x_TD = self.embed(ids_T)
        else:
            ids_T, x_TD = None, layout.pack(inputs_embeds)
        token_part = None if per_layer_inputs is None else layout.pack(per_layer_inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            ple_TLP = self._ple(ids_T, x_TD, token_part) if self.ple_width else None
            columns = 0 if output_hidden_states else columns
            step = None if cache is None else cache.begin(layout)
            y_TD, layout, states = self._stack(
                x_TD, ple_TLP, layout, step, columns, output_hidden_states
            )
            if step is not None:
                step.commit()
        return y_TD, layout, cache, states

    def _wants_cache(self, use_cache: bool | None, layout: Layout) -> bool:
        if use_cache is not None:
            if use_cache and layout.packed:
                raise ValueError("packed rows have no cache: position_ids restart (use_cache=True)")
            return use_cache
        inference = not (torch.is_grad_enabled() or self.config.bidirectional or layout.packed)
        return self.config.use_cache and inference

    def _checked_shape(
        self, input_ids: Tensor | None, embeds: Tensor | None, per_layer_inputs: Tensor | None
    ) -> tuple[int, int]:
        config = self.config
        if (input_ids is None) == (embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            if input_ids.ndim != 2 or input_ids.is_floating_point():
                raise ValueError(
                    f"input_ids must be integers [B, S], got {input_ids.dtype} "
                    f"{list(input_ids.shape)}"
                )
            if per_layer_inputs is not None:
                raise ValueError("per_layer_inputs go with inputs_embeds, not with input_ids")
            if input_ids.is_cpu and not torch.compiler.is_compiling() and input_ids.numel():
                low, high = input_ids.aminmax()
                if low < 0 or high >= config.vocab_size:
                    bad = int(low if low < 0 else high)
                    raise ValueError(f"input_ids must lie in 0..{config.vocab_size - 1}, got {bad}")
            return tuple(input_ids.shape)
        if embeds.ndim != 3 or embeds.shape[-1] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds must be [B, S, {config.hidden_size}], got {list(embeds.shape)}"
            )
        shape = tuple(embeds.shape[:2])
        if self.ple_width:
            want = [*shape, config.num_hidden_layers, self.ple_width]
            got = None if per_layer_inputs is None else list(per_layer_inputs.shape)
            if got != want:
                raise ValueError(
                    f"inputs_embeds of a model with PLE need per_layer_inputs {want}, got {got}"
                )
        elif per_layer_inputs is not None:
            raise ValueError("per_layer_inputs given, but this model has no PLE")
        return shape

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings times √D, the factor rounded to the table's dtype first."""
        x = self.embed_tokens(ids)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)

    def _ple(self, ids_T: Tensor | None, x_TD: Tensor, token_part: Tensor | None) -> Tensor:
        """Per-layer inputs [T, L, P]: the context's projection joined with the token's rows."""
        projected = self.per_layer_model_projection(x_TD) * self.config.hidden_size**-0.5
        norm = self.per_layer_projection_norm
        if token_part is None:
            table = self.embed_tokens_per_layer.weight
            return ops.ple_embed(ids_T, table, projected, norm.weight, norm.eps)
        return (norm(projected.view(token_part.shape)) + token_part) * 2.0**-0.5

    def _stack(
        self,
        x_TD: Tensor,
        ple_TLP: Tensor | None,
        layout: Layout | DecodeStep,
        step: CacheStep | DecodeStep | None,
        columns: int,
        output_hidden_states: bool,
    ) -> tuple[Tensor, Layout, tuple[Tensor, ...] | None]:
        config = self.config
        # The last layer that makes keys: after it, nothing reads the states of dropped columns.
        last_owner = config.num_hidden_layers - config.num_kv_shared_layers - 1
        tail = layout.tail(columns) if columns else None
        lent: dict[int, Keys] = {}
        states = [layout.unpack(x_TD)] if output_hidden_states else None
        y_TD = self.layers[0].input_layernorm(x_TD)
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            cut = tail if index == last_owner else None
            arguments = (
                x_TD,
                y_TD,
                ple_TLP,
                layout,
                cut,
                lent.get(layer.kv_owner),
                step,
                self.rope[layer.kind],
                (self.norm if last else self.layers[index + 1].input_layernorm).weight,
            )
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_TD, y_TD, keys = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_TD, y_TD, keys = layer(*arguments)
            if layer.lends:
                lent[index] = keys
            if cut is not None:
                layout, chosen = cut
                ple_TLP = None if ple_TLP is None else ple_TLP[chosen]
            if states is not None:
                states.append(layout.unpack(y_TD if last else x_TD))
        return y_TD, layout, None if states is None else tuple(states)

    def decode(self, ids_B: Tensor, step: DecodeStep) -> Tensor:
        """Normed states [B, D] of one more token of each row, which `step` places; no host reads,
        no argument checks, no gradients."""
        x_TD = self.embed(ids_B)
        ple_TLP = self._ple(ids_B, x_TD, None) if self.ple_width else None
        y_TD, _, _ = self._stack(x_TD, ple_TLP, step, step, 0, False)
        return y_TD


class DecoderLayer(nn.Module):
    """Attention, feed-forward (with experts beside it), PLE gate and layer scalar."""

    def __init__(self, config: Gemma4TextConfig, index: int):
        super().__init__()
        self.index, self.kind = index, config.layer_types[index]
        self.eps, self.ple_width = config.rms_norm_eps, config.hidden_size_per_layer_input
        self.kv_owner = config.kv_owner(index)
        others = range(index + 1, config.num_hidden_layers)
        self.lends = any(config.kv_owner(other) == index for other in others)
        width = config.hidden_size
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config, index)
        self.input_layernorm = RMSNorm(width, self.eps)
        self.post_attention_layernorm = RMSNorm(width, self.eps)
        self.pre_feedforward_layernorm = RMSNorm(width, self.eps)
        self.post_feedforward_layernorm = RMSNorm(width, self.eps)
        self.register_buffer("layer_scalar", torch.ones(1))
        self.router = None
        if config.enable_moe_block:
            self.router = Router(config)
            self.experts = Experts(config)
            self.pre_feedforward_layernorm_2 = RMSNorm(width, self.eps)
            self.post_feedforward_layernorm_1 = RMSNorm(width, self.eps)
            self.post_feedforward_layernorm_2 = RMSNorm(width, self.eps)
        if self.ple_width:
            self.per_layer_input_gate = linear(width, self.ple_width, config)
            self.per_layer_projection = linear(self.ple_width, width, config)
            self.post_per_layer_input_norm = RMSNorm(width, self.eps)

    def forward(
        self,
        x_TD: Tensor,
        y_TD: Tensor,
        ple_TLP: Tensor | None,
        layout: Layout | DecodeStep,
        cut: tuple[Layout, Tensor] | None,
        borrowed: Keys | None,
        step: CacheStep | DecodeStep | None,
        inv_freq: Tensor,
        next_weight: Tensor,
    ) -> tuple[Tensor, Tensor, Keys]:
        """x after the layer, y = rms_norm(x, next_weight), and the keys that later layers borrow.

        cut: keys are made for all of `layout`, everything after them for its tail alone.
        """
        attended, keys = self.self_attn(y_TD, layout, cut, borrowed, step, inv_freq)
        if cut is not None:
            x_TD = x_TD[cut[1]]
            ple_TLP = None if ple_TLP is None else ple_TLP[cut[1]]
        x_TD, y_TD = ops.add_rms_norm(
            attended,
            x_TD,
            self.post_attention_layernorm.weight,
            self.pre_feedforward_layernorm.weight,
            None,
            self.eps,
        )
        branch_TD = self.mlp(y_TD)
        if self.router is not None:
            branch_TD = self._with_experts(x_TD, branch_TD)
        closing = (self.post_feedforward_layernorm.weight, next_weight, self.layer_scalar)
        if self.ple_width:
            x_TD, _ = ops.add_rms_norm(branch_TD, x_TD, closing[0], None, None, self.eps)
            gate_TP = ops.ple_gate(self.per_layer_input_gate(x_TD), ple_TLP, self.index)
            branch_TD = self.per_layer_projection(gate_TP)
            closing = (self.post_per_layer_input_norm.weight, *closing[1:])
        x_TD, y_TD = ops.add_rms_norm(branch_TD, x_TD, *closing, self.eps)
        return x_TD, y_TD, keys

    def _with_experts(self, x_TD: Tensor, dense_TD: Tensor) -> Tensor:
        """norm_1(dense) + norm_2(experts); the router reads the raw residual."""
        y_TD, router_x_TD = ops.moe_norm(
            x_TD, self.pre_feedforward_layernorm_2.weight, self.router.scale, self.eps
        )
        weights_TK, experts_TK = self.router(router_x_TD)
        routed_TD = self.experts(y_TD, experts_TK, weights_TK)
        both_TD, _ = ops.add_rms_norm(
            routed_TD,
            self.post_feedforward_layernorm_1(dense_TD),
            self.post_feedforward_layernorm_2.weight,
            None,
            None,
            self.eps,
        )
        return both_TD


class Attention(nn.Module):
    """Sliding or full attention; q, k and v are one projection in memory."""

    def __init__(self, config: Gemma4TextConfig, index: int):
        super().__init__()
        kind = config.layer_types[index]
        self.layer, self.eps = index, config.rms_norm_eps
        self.head_dim, self.heads = config.head_size(kind), config.num_attention_heads
        self.kv_heads = config.kv_heads(kind)
        self.owner = config.kv_owner(index) == index
        self.k_eq_v = config.attention_k_eq_v and kind == FULL
        self.causal = not config.bidirectional
        self.window, self.window_right = config.window(kind)
        parts = {"q_proj": self.heads * self.head_dim}
        if self.owner:
            parts["k_proj"] = self.kv_heads * self.head_dim
            if not self.k_eq_v:
                parts["v_proj"] = self.kv_heads * self.head_dim
        self.qkv_proj = PackedLinear(self, parts, config)
        self.o_proj = linear(
            self.heads * self.head_dim, config.hidden_size, config, config.attention_bias
        )
        self.q_norm = RMSNorm(self.head_dim, self.eps)
        if self.owner:
            self.k_norm = RMSNorm(self.head_dim, self.eps)

    def forward(
        self,
        y_TD: Tensor,
        layout: Layout | DecodeStep,
        cut: tuple[Layout, Tensor] | None,
        borrowed: Keys | None,
        step: CacheStep | DecodeStep | None,
        inv_freq: Tensor,
    ) -> tuple[Tensor, Keys]:
        heads = self.qkv_proj(y_TD).unflatten(1, (-1, self.head_dim))
        q_weight, positions = self.q_norm.weight, layout.positions
        if not self.owner:
            q, _, _ = ops.qkv_norm_rope(
                heads, None, None, q_weight, None, positions, inv_freq, self.eps
            )
            keys = borrowed
        else:
            q, k = heads[:, : self.heads], heads[:, self.heads : self.heads + self.kv_heads]
            v = None if self.k_eq_v else heads[:, self.heads + self.kv_heads :]
            k_weight = self.k_norm.weight
            if step is not None:
                q, keys = step.write(self.layer, q, k, v, q_weight, k_weight, inv_freq, self.eps)
            else:
                q, k, v = ops.qkv_norm_rope(
                    q, k, v, q_weight, k_weight, positions, inv_freq, self.eps
                )
                keys = Keys(k, v, layout.cu_seqlens_k, layout.max_seqlen_k)
        if cut is not None:
            layout, chosen = cut
            q = q[chosen]
        out_THC = keys.attend(q, layout, self.causal, self.window, self.window_right)
        return self.o_proj(out_THC.flatten(1)), keys


class MLP(nn.Module):
    """down(gelu_tanh(gate x) · up x); gate and up are one projection in memory."""

    def __init__(self, config: Gemma4TextConfig, index: int):
        super().__init__()
        width = config.mlp_width(index)
        self.gate_up_proj = PackedLinear(self, {"gate_proj": width, "up_proj": width}, config)
        self.down_proj = linear(width, config.hidden_size, config)

    def forward(self, y_TD: Tensor) -> Tensor:
        return self.down_proj(ops.geglu(self.gate_up_proj(y_TD)))


class Router(nn.Module):
    """Chooses each token's experts from what `moe_norm` made of the residual with `scale`."""

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        self.top_k = config.top_k_experts
        self.proj = linear(config.hidden_size, config.num_experts, config)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, router_x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return ops.moe_route(self.proj(router_x_TD), self.per_expert_scale, self.top_k)


class Experts(nn.Module):
    """The experts' weights, [E, 2F, D] gate rows first and [E, D, F]."""

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        num, width, hidden = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(num, width, hidden))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, y_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return ops.moe_experts(y_TD, self.gate_up_proj, self.down_proj, experts_TK, weights_TK)
