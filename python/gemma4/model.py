"""The Gemma 4 text model, from the outside in: causal LM and stack; layers.py holds the layers.

Everything between the embedding and the head works on packed tokens (see layout.py), by the plan of
one forward (see steps.py). base.py holds what programs around a model ask of it.

Shape letters: B rows, S columns of the padded batch, T packed tokens, D model width, C head
channels, P PLE width, L layers, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma4_kernels import extension
from gemma4_kernels.check import record
from gemma4_kernels.fusion import is_plain, why_not_fused
from gemma4_kernels.packed_linear import LINEAR, PackedLinear, PackedParameter

from . import decode_layers
from .base import PreTrainedModel
from .cache import Cache
from .checkpoint import tied
from .config import Gemma4TextConfig
from .embedding import first_inputs
from .generate import GenerationConfig, generate
from .inputs import checked_shape, restarting
from .layers import DecoderLayer, call_layer
from .layout import Layout, make_layout
from .loss import capped, causal_lm_loss
from .modules import RMSNorm, RotaryEmbedding, ScaledEmbedding, linear
from .outputs import CausalLMOutput, ModelOutput
from .recompute import CheckpointOptions, RunLayer, recomputing
from .steps import CachePlan, DecodePlan, PackedPlan, refuse_gradient


class Gemma4ForCausalLM(PreTrainedModel):
    """A Gemma 4 text model with its language-model head.

    Drop-in for transformers' class of this name: same modules, state-dict names and numbers.
    """

    base_model_prefix = "model"
    accepts_loss_kwargs, loss_type = True, "ForCausalLM"  # how Trainer counts labels
    # Trainers may read a loss's logits, and nobody finds them missing who has not asked for it.
    skip_logits = False

    generate = generate

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
        self.model = Gemma4TextModel(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size, config)
        self.tie_weights()
        tied.hold_once(self)

    @property
    def base_model(self) -> "Gemma4TextModel":
        return self.model

    def tie_weights(self) -> None:
        """Makes the head's weight the embedding's, if the config says so; nothing else does."""
        if not self.config.tie_word_embeddings:
            return
        weight = self.model.embed_tokens.weight
        if isinstance(weight, PackedParameter):
            self.lm_head = PackedLinear(weight)
        else:
            self.lm_head.weight = weight

    def loaded(self, folder: Path) -> None:
        self.tie_weights()
        self.generation_config = self.generation_config.updated_from(folder)

    def explain(self) -> str:
        """A line a layer: whether fused ops stand in for all its modules, and what keeps them; and
        on a GPU that has kernels, whether they were checked on that card."""
        return self.model.explain()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **others: object,
    ) -> dict[str, object]:
        """The arguments of the next forward: of `input_ids`, what the cache does not hold."""
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        given = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        return {"input_ids": input_ids, **given, **others}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: "Cache | DecodePlan | None" = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
        **others: object,
    ) -> CausalLMOutput | tuple[object, ...]:
        """Logits of a batch; arguments as in `Gemma4TextModel.forward`, and:

        labels [B, S]: the loss is the cross-entropy, in fp32, of each real token's logits against
        the label of the next column, over labels that are not -100: their mean (0 if all are), or
        their sum over num_items_in_batch, which counts the labels of several batches.
        skip_logits: with labels, the logits are not returned, and never made of all tokens at once;
        None does as the attribute of this name says, for trainers that pass no options.
        logits_to_keep: the last n columns alone, or the columns at the given indices; 0 keeps all.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need all logits: leave logits_to_keep at 0")
        columns = logits_to_keep if isinstance(logits_to_keep, int) else 0
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            per_layer_inputs=per_layer_inputs,
            use_cache=use_cache,
            logits_to_keep=columns,
            **others,
        )
        hidden, layout = output.last_hidden_state, getattr(output, "layout", None)
        if columns or not isinstance(logits_to_keep, int):
            hidden = hidden[:, -columns:] if columns else hidden[:, logits_to_keep]
        if layout is None or layout.shape != hidden.shape[:2]:
            layout = Layout.whole(hidden.shape[:2], hidden.device)
        x_TD, loss, logits_TV = layout.pack(hidden), None, None
        if labels is None:
            logits_TV = self.logits(x_TD, layout)
        else:
            cap = self.config.final_logit_softcapping or 0.0
            skip = self.skip_logits if skip_logits is None else skip_logits
            given = self.lm_head, x_TD, labels, layout, cap, num_items_in_batch, skip
            loss, logits_TV = causal_lm_loss(*given)
        result = CausalLMOutput(
            loss=loss,
            logits=None if logits_TV is None else layout.unpack(logits_TV),
            cache=output.cache,
            hidden_states=output.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result

    def next_logits(self, ids_B: Tensor, plan: DecodePlan) -> tuple[Tensor, float]:
        """The logits [B, V] behind one more token of each row, and the cap that they still lack, or
        0."""
        stack, head, cap = self.model, self.lm_head, self.config.final_logit_softcapping
        plain = plan.plain(self, Gemma4ForCausalLM) and plan.plain(stack, Gemma4TextModel)
        if not (plain and plan.plain(head, LINEAR)):
            return self(ids_B[:, None], cache=plan).logits[:, -1], 0.0
        plan.keys = {}
        x_TD, ple_TLP = first_inputs(stack, plan, ids_B[:, None])
        residual = decode_layers.run(stack.layers, x_TD, ple_TLP, plan)
        logits = decode_layers.head(residual, stack.norm, head, plan)
        plan.finish()
        return logits, cap or 0.0

    def logits(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """[T, D] normed hidden states to soft-capped logits [T, V]."""
        head = self.lm_head
        logits = head(x_TD) if is_plain(head, LINEAR) else layout.call(head, x_TD)
        return capped(logits, self.config.final_logit_softcapping or 0.0)


class Gemma4TextModel(PreTrainedModel):
    """The stack without a head."""

    embed_tokens: nn.Embedding

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        self.config = config
        # What torch.utils.checkpoint is called with at every n-th layer; None for no checkpointing.
        self.checkpointing: CheckpointOptions | None = None
        self.checkpoint_every = 1
        width, std = config.hidden_size, config.initializer_range
        self.embed_tokens = ScaledEmbedding(config.vocab_size, width, width**0.5, std)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.ple_width = config.hidden_size_per_layer_input
        if self.ple_width:
            ple_columns = config.num_hidden_layers * self.ple_width
            self.embed_tokens_per_layer = ScaledEmbedding(
                config.vocab_size_per_layer_input, ple_columns, self.ple_width**0.5, std
            )
            self.per_layer_model_projection = linear(width, ple_columns, config)
            self.per_layer_projection_norm = RMSNorm(self.ple_width, config.rms_norm_eps)

    @property
    def base_model(self) -> "Gemma4TextModel":
        return self

    def explain(self) -> str:
        """A line a layer: whether fused ops stand in for all its modules, and what keeps them; and
        on a GPU that has kernels, whether they were checked on that card."""
        lines = []
        for index, layer in enumerate(self.layers):
            reason = why_not_fused(layer, DecoderLayer)
            said = "fused" if reason is None else f"not all fused, {reason}"
            lines.append(f"layer {index} ({self.config.layer_types[index]}): {said}")
        if extension.covers(self.device):
            lines.append(f"kernels on {self.device}: {record.summary(self.device)}")
        return "\n".join(lines)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: "Cache | DecodePlan | None" = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: Cache | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
    ) -> ModelOutput | tuple[object, ...]:
        """Hidden states of a batch.

        input_ids [B, S], or inputs_embeds [B, S, D] already scaled by √D, in which case a model
        with PLE also needs per_layer_inputs [B, S, L, P], its token part already scaled by √P.
        attention_mask [B, S] of 0 and 1 (cached columns first); position_ids [B, S], which restart
        where a row packs several sequences. Positions default to 0.. for each row's real tokens.
        cu_seq_lens_q says the same of one row [1, S] as position_ids; its companions add nothing.

        cache (or past_key_values): of earlier tokens; use_cache makes a new one (default: the
        config's choice, but for training, for packed rows and with checkpointing). The tokens of a
        new cache are differentiated as without one; of a cache that holds tokens there is no
        gradient, which the backward says. logits_to_keep: only the last n columns of
        last_hidden_state are wanted; 0 keeps all. Raises ValueError for inputs that contradict
        each other.
        """
        if output_attentions:
            raise ValueError("output_attentions=True is not served: no attention matrix exists")
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be 0 (all) or a count, got {logits_to_keep}")
        cache = cache if cache is not None else past_key_values
        plan: PackedPlan
        if isinstance(cache, DecodePlan):
            plan, cache = cache, cache.cache
            plan.keys = {}
        else:
            shape = checked_shape(self.config, input_ids, inputs_embeds, per_layer_inputs)
            if cu_seq_lens_q is not None and position_ids is None:
                position_ids = restarting(cu_seq_lens_q, shape)
            plan, cache = self._plan(shape, attention_mask, position_ids, cache, use_cache)
        stale = isinstance(plan, CachePlan) and plan.stale
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stale):
            y_TD, states = self._stack(
                plan,
                input_ids,
                inputs_embeds,
                per_layer_inputs,
                0 if output_hidden_states else logits_to_keep,
                bool(output_hidden_states),
            )
            plan.finish()
        hidden = plan.layout.unpack(y_TD)
        if stale and torch.is_grad_enabled():
            hidden = refuse_gradient(hidden)
        shortened = 0 < logits_to_keep < plan.layout.shape[1]
        if shortened:
            hidden = hidden[:, -logits_to_keep:]
        result = ModelOutput(last_hidden_state=hidden, cache=cache, hidden_states=states)
        result.layout = None if shortened else plan.layout
        return result.to_tuple() if return_dict is False else result

    def _plan(
        self,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
    ) -> tuple[PackedPlan, Cache | None]:
        if cache is not None and self.config.bidirectional:
            raise ValueError("use_bidirectional_attention 'all' has no cache: every token sees all")
        device = self.device
        if cache is not None:
            cache.check(self.config, shape[0], self.compute_dtype, device)
            pasts = (cache.lengths, cache.columns)
            layout = make_layout(shape, device, attention_mask, position_ids, *pasts)
        else:
            layout = make_layout(shape, device, attention_mask, position_ids)
            if self._wants_cache(use_cache, layout):
                length = layout.max_seqlen_q
                cache = Cache(self.config, shape[0], self.compute_dtype, device, length)
        return (PackedPlan(layout) if cache is None else CachePlan(layout, cache)), cache

    def _wants_cache(self, use_cache: bool | None, layout: Layout) -> bool:
        if use_cache and layout.has_packed_rows:
            raise ValueError("packed rows have no cache: position_ids restart (use_cache=True)")
        if use_cache and self.config.bidirectional:
            raise ValueError("use_bidirectional_attention 'all' has no cache: every token sees all")
        if use_cache is not None:
            return use_cache
        others = self.training or self.config.bidirectional or self.checkpointing is not None
        return self.config.use_cache and not others and not layout.has_packed_rows

    def _stack(
        self,
        plan: PackedPlan,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        per_layer_inputs: Tensor | None,
        columns: int,
        output_hidden_states: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Normed states [T, D] of the tokens, or of the last columns alone, and hidden states."""
        layout, layers = plan.layout, list(self.layers)
        x_TD, ple_TLP = first_inputs(self, plan, input_ids, inputs_embeds, per_layer_inputs)
        if isinstance(plan, DecodePlan) and not output_hidden_states:
            residual = decode_layers.run(self.layers, x_TD, ple_TLP, plan)
            return decode_layers.normed(residual, self.norm, plan), None
        # The last layer that makes keys: after it, nothing reads the states of dropped columns.
        last_owner = len(layers) - self.config.num_kv_shared_layers - 1
        tail = layout.tail(columns) if columns else None
        states = [layout.unpack(x_TD)] if output_hidden_states else None
        ples = _of_layers(ple_TLP, len(layers))
        options = self.checkpointing if torch.is_grad_enabled() else None
        y_TD = None
        if plan.plain(layers[0], DecoderLayer):
            y_TD = plan.call(layers[0].input_layernorm, RMSNorm, x_TD)
        for index, layer in enumerate(layers):
            last = index + 1 == len(layers)
            following: nn.Module | None = self.norm if last else None
            if not last and plan.plain(after := layers[index + 1], DecoderLayer):
                following = after.input_layernorm
            cut = tail if index == last_owner else None
            inside = cut is not None and plan.whole(layer, DecoderLayer)
            if plan.plain(layer, DecoderLayer):
                run: RunLayer = layer.packed
            else:
                run = partial(call_layer, layer)
            if options is not None and index % self.checkpoint_every == 0:
                run = recomputing(run, index, self.config.kv_owner(index), options)
            x_TD, y_TD = run(x_TD, y_TD, ples[index], plan, following, cut if inside else None)
            if cut is not None:
                plan.keep(*cut)
                chosen = cut[1]
                ples = _of_layers(None if ple_TLP is None else ple_TLP[chosen], len(layers))
                if not inside:
                    x_TD, y_TD = x_TD[chosen], None if y_TD is None else y_TD[chosen]
            if states is not None and not last:
                states.append(plan.layout.unpack(x_TD))
        if y_TD is None:
            y_TD = plan.call(self.norm, RMSNorm, x_TD)
        if states is None:
            return y_TD, None
        return y_TD, (*states, plan.layout.unpack(y_TD))


def _of_layers(ple_TLP: Tensor | None, layers: int) -> Sequence[tuple[Tensor, int] | None]:
    """Each layer's per-layer inputs, as a tensor and its place in there.

    To be differentiated they are cut apart at once: their gradients are then put together once, and
    not by each layer into zeros of all.
    """
    if ple_TLP is None:
        return [None] * layers
    if not (ple_TLP.requires_grad and torch.is_grad_enabled()):
        return [(ple_TLP, index) for index in range(layers)]
    return [(ple_TP[:, None], 0) for ple_TP in ple_TLP.unbind(1)]
