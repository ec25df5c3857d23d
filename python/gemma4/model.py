"""The Gemma 4 text model, from the outside in: causal LM and stack; layers.py holds the layers.

Everything between the embedding and the head works on packed tokens (see layout.py), by the plan of
one forward (see steps.py). Longer than 400 lines for what programs around a model ask of it.

Shape letters: B rows, S columns of the padded batch, T packed tokens, D model width, H query
heads, G KV heads, C head channels, P PLE width, L layers, V vocabulary.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemma4_kernels import extension, ops
from gemma4_kernels.check import record
from gemma4_kernels.fusion import is_plain, why_not_fused

from .cache import Cache
from .checkpoint import Pretrained, save_pretrained
from .config import Gemma4TextConfig
from .decode_layer import Residual, fits, step
from .generate import GenerationConfig, generate
from .layers import DecoderLayer, Tail
from .layout import Layout, make_layout
from .modules import RMSNorm, RotaryEmbedding, ScaledEmbedding, linear
from .outputs import CausalLMOutput, ModelOutput
from .steps import CachePlan, DecodePlan, Keys, PackedPlan

# Tokens whose loss is computed at once: the fp32 copy of their logits is all that exists of it.
LOSS_TOKENS = 1024


class Gemma4ForCausalLM(Pretrained):
    """A Gemma 4 text model with its language-model head.

    Drop-in for transformers' class of this name: same modules, state-dict names and numbers.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs, loss_type = True, "ForCausalLM"  # how Trainer counts labels
    _no_split_modules = ("DecoderLayer",)

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
        self.model = Gemma4TextModel(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size, config)
        self.tie_weights()
        # A tied head is the embedding: files hold it once, and what writes files from a state dict
        # refuses two names for one memory.
        self.register_state_dict_post_hook(_without_tied_head)
        self.register_load_state_dict_pre_hook(_with_tied_head)
        self.register_load_state_dict_post_hook(_keep_tied)

    save_pretrained = save_pretrained
    generate = generate

    def tie_weights(self) -> None:
        """Makes the head's weight the embedding's, if the config says so; nothing else does."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _loaded(self, folder: Path) -> None:
        self.tie_weights()
        self.generation_config = self.generation_config.updated_from(folder)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.model.compute_dtype

    @property
    def base_model(self) -> "Gemma4TextModel":
        return self.model

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Keeps what trainers write into a model's card."""
        tags = [tags] if isinstance(tags, str) else tags
        self.model_tags = list(dict.fromkeys([*getattr(self, "model_tags", []), *tags]))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Elements of all parameters; a tied head counts once, as the embedding."""
        left_out = set()
        if exclude_embeddings:
            tables = (m for m in self.modules() if isinstance(m, nn.Embedding))
            left_out = {id(p) for table in tables for p in table.parameters()}
        return sum(
            p.numel()
            for p in self.parameters()
            if id(p) not in left_out and (p.requires_grad or not only_trainable)
        )

    def explain(self) -> str:
        """A line a layer: whether fused ops stand in for all its modules, and what keeps them; and
        on a GPU that has kernels, whether they were checked on that card."""
        return self.model.explain()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.model.checkpointing is not None

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, object] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keeps the inputs alone of every n-th layer for the backward, which makes the rest again.

        activation_checkpointing_kwargs: for torch.utils.checkpoint.checkpoint; use_reentrant is
        False unless given. Raises ValueError for offload=True: activations stay on the device.
        """
        if offload:
            raise ValueError("offload=True is not served: checkpointed inputs stay on the device")
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers must be at least 1, got {every_n_layers}")
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.model.checkpointing, self.model.checkpoint_every = options, every_n_layers

    def activation_checkpointing_disable(self) -> None:
        self.model.checkpointing = None

    # The names of these until transformers 5.23.
    is_gradient_checkpointing = is_activation_checkpointing
    gradient_checkpointing_disable = activation_checkpointing_disable

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, object] | None = None,
        every_n_layers: int = 1,
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Gives the token table, the PLE table and the head `new_num_tokens` rows (as many as now
        if None), rounded up to a multiple of `pad_to_multiple_of`.

        New rows are the mean of the old ones. Returns the token embedding.
        """
        table = self.model.embed_tokens
        tied = self.lm_head.weight is table.weight
        rows = self.model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of).num_embeddings
        self.lm_head.weight = table.weight if tied else _resized(self.lm_head.weight, rows)
        self.lm_head.out_features = rows
        return table

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
        **others: object,
    ) -> CausalLMOutput | tuple[object, ...]:
        """Logits of a batch; arguments as in `Gemma4TextModel.forward`, and:

        labels [B, S]: the loss is the cross-entropy, in fp32, of each real token's logits against
        the label of the next column, over labels that are not -100: their mean (0 if all are), or
        their sum over num_items_in_batch, which counts the labels of several batches.
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
        logits_TV = self.logits(layout.pack(hidden), layout)
        loss = None
        if labels is not None:
            loss = self._loss(logits_TV, labels, layout, num_items_in_batch)
        result = CausalLMOutput(
            loss=loss,
            logits=layout.unpack(logits_TV),
            cache=output.cache,
            hidden_states=output.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result

    def logits(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """[T, D] normed hidden states to soft-capped logits [T, V]."""
        head = self.lm_head
        logits = head(x_TD) if is_plain(head, nn.Linear) else layout.call(head, x_TD)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else ops.softcap(logits, cap)

    def _loss(
        self, logits_TV: Tensor, labels: Tensor, layout: Layout, count: int | Tensor | None
    ) -> Tensor:
        if labels.shape != layout.shape:
            raise ValueError(
                f"labels must be {list(layout.shape)}, like the input, got {list(labels.shape)}"
            )
        targets = layout.pack(F.pad(labels[:, 1:], (0, 1), value=-100)).to(logits_TV.device)
        total = logits_TV.new_zeros((), dtype=torch.promote_types(logits_TV.dtype, torch.float32))
        pairs = zip(logits_TV.split(LOSS_TOKENS), targets.split(LOSS_TOKENS), strict=True)
        for part, target in pairs:
            # Recomputed in backward: autograd would keep every part's fp32 softmax.
            total = total + checkpoint(_summed_loss, part, target, use_reentrant=False)
        if count is None:
            count = (targets != -100).sum().clamp(min=1)
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)


# Functions and not methods, so that a copied or pickled model does not drag along the first one.
def _is_tied(model: Gemma4ForCausalLM) -> bool:
    head = getattr(model.lm_head, "weight", None)
    return head is not None and head is getattr(model.model.embed_tokens, "weight", None)


def _without_tied_head(
    model: Gemma4ForCausalLM, state: dict[str, Tensor], prefix: str, _: object
) -> None:
    if _is_tied(model):
        state.pop(f"{prefix}lm_head.weight", None)


def _with_tied_head(
    model: Gemma4ForCausalLM, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    head, table = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    if model.config.tie_word_embeddings and head not in state and table in state:
        state[head] = state[table]


def _keep_tied(model: Gemma4ForCausalLM, _: object) -> None:
    """load_state_dict(assign=True) makes two parameters of one tensor."""
    parents = model.lm_head, model.model.embed_tokens
    head, table = (parent._parameters.get("weight") for parent in parents)
    if head is None or table is None or head.is_meta:
        return
    plain = type(head) is type(table) is nn.Parameter
    if plain and head.data_ptr() == table.data_ptr():
        model.lm_head.weight = table


def _summed_loss(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum")


def _resized(weight: Tensor, rows: int) -> nn.Parameter:
    new = weight.new_empty(rows, weight.shape[1])
    kept = min(rows, weight.shape[0])
    new[:kept] = weight.detach()[:kept]
    new[kept:] = weight.detach().float().mean(0).to(weight.dtype)
    return nn.Parameter(new, requires_grad=weight.requires_grad)


class Gemma4TextModel(Pretrained):
    """The stack without a head."""

    embed_tokens: nn.Embedding
    _no_split_modules = ("DecoderLayer",)

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        self.config = config
        # What torch.utils.checkpoint is called with at every n-th layer; None for no checkpointing.
        self.checkpointing: dict[str, Any] | None = None
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
            packed = config.num_hidden_layers * self.ple_width
            self.embed_tokens_per_layer = ScaledEmbedding(
                config.vocab_size_per_layer_input, packed, self.ple_width**0.5, std
            )
            self.per_layer_model_projection = linear(width, packed, config)
            self.per_layer_projection_norm = RMSNorm(self.ple_width, config.rms_norm_eps)

    save_pretrained = save_pretrained

    @property
    def device(self) -> torch.device:
        device = next(self.parameters()).device
        if device.type == "meta":
            # Offloaded weights are nowhere between calls; accelerate's hook says where they go.
            hook = getattr(self.embed_tokens, "_hf_hook", None)
            return torch.device(getattr(hook, "execution_device", None) or device)
        return device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that projections give now, and that a cache must hold: autocast's, or dtype."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype

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

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """As in `Gemma4ForCausalLM`, without the head."""
        rows = self.embed_tokens.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        tables = [self.embed_tokens]
        if self.ple_width:
            tables.append(self.embed_tokens_per_layer)
            self.config.vocab_size_per_layer_input = rows
        for table in tables:
            table.weight = _resized(table.weight, rows)
            table.num_embeddings = rows
        self.config.vocab_size = rows
        return self.embed_tokens

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
            shape = self._checked_shape(input_ids, inputs_embeds, per_layer_inputs)
            if cu_seq_lens_q is not None and position_ids is None:
                position_ids = _restarting(cu_seq_lens_q, shape)
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
            hidden = _NoGradient.apply(hidden, torch.empty(0, requires_grad=True))
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
        if use_cache and layout.packed:
            raise ValueError("packed rows have no cache: position_ids restart (use_cache=True)")
        if use_cache and self.config.bidirectional:
            raise ValueError("use_bidirectional_attention 'all' has no cache: every token sees all")
        if use_cache is not None:
            return use_cache
        others = self.training or self.config.bidirectional or self.checkpointing is not None
        return self.config.use_cache and not others and not layout.packed

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
            batch, width = input_ids.shape
            return batch, width
        assert embeds is not None
        if embeds.ndim != 3 or embeds.shape[-1] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds must be [B, S, {config.hidden_size}], got {list(embeds.shape)}"
            )
        batch, width, _ = embeds.shape
        if self.ple_width:
            want = [batch, width, config.num_hidden_layers, self.ple_width]
            got = None if per_layer_inputs is None else list(per_layer_inputs.shape)
            if got != want:
                raise ValueError(
                    f"inputs_embeds of a model with PLE need per_layer_inputs {want}, got {got}"
                )
        elif per_layer_inputs is not None:
            raise ValueError("per_layer_inputs given, but this model has no PLE")
        return batch, width

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
        if input_ids is not None:
            ids_T = layout.pack(input_ids).to(layout.positions.device)
            x_TD = plan.call(self.embed_tokens, ScaledEmbedding, ids_T)
        else:
            assert inputs_embeds is not None
            ids_T, x_TD = None, layout.pack(inputs_embeds)
        ple_TLP = None
        if self.ple_width:
            token_part = None if per_layer_inputs is None else layout.pack(per_layer_inputs)
            ple_TLP = self._ple(ids_T, x_TD, token_part, plan)
        self._set_rotation(plan, x_TD)
        if isinstance(plan, DecodePlan) and not output_hidden_states:
            return self._decode(x_TD, ple_TLP, plan), None
        # The last layer that makes keys: after it, nothing reads the states of dropped columns.
        last_owner = len(layers) - self.config.num_kv_shared_layers - 1
        tail = layout.tail(columns) if columns else None
        states = [layout.unpack(x_TD)] if output_hidden_states else None
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
            x_TD, y_TD = self._layer(
                index, x_TD, y_TD, ple_TLP, plan, following, cut if inside else None
            )
            if cut is not None:
                plan.layout, chosen = cut
                ple_TLP = None if ple_TLP is None else ple_TLP[chosen]
                if not inside:
                    x_TD, y_TD = x_TD[chosen], None if y_TD is None else y_TD[chosen]
                if plan.rotation is not None:
                    turned = plan.rotation.items()
                    plan.rotation = {k: (cos[chosen], sin[chosen]) for k, (cos, sin) in turned}
            if states is not None and not last:
                states.append(plan.layout.unpack(x_TD))
        if y_TD is None:
            y_TD = plan.call(self.norm, RMSNorm, x_TD)
        if states is None:
            return y_TD, None
        return y_TD, (*states, plan.layout.unpack(y_TD))

    def _decode(self, x_TD: Tensor, ple_TLP: Tensor | None, plan: DecodePlan) -> Tensor:
        """Normed states [T, D]; each layer in the fewest launches, if nobody looks inside."""
        residual = Residual(x_TD)
        for index, layer in enumerate(self.layers):
            ple = None if ple_TLP is None else (ple_TLP, index)
            if isinstance(layer, DecoderLayer) and fits(layer, plan, x_TD):
                residual = step(layer, residual, ple, plan)
            else:
                x_TD, _ = residual.closed()
                x_TD, _ = self._layer(index, x_TD, None, ple_TLP, plan, None, None)
                residual = Residual(x_TD)
        if plan.plain(self.norm, RMSNorm):
            x_TD, y_TD = residual.closed(self.norm)
        else:
            x_TD, y_TD = residual.closed()
        return plan.call(self.norm, RMSNorm, x_TD) if y_TD is None else y_TD

    def _layer(
        self,
        index: int,
        x_TD: Tensor,
        y_TD: Tensor | None,
        ple_TLP: Tensor | None,
        plan: PackedPlan,
        next_norm: nn.Module | None,
        tail: Tail | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x and, if it came with it, next_norm(x) after a layer, which is checkpointed if asked."""
        layer = self.layers[index]

        def run(
            x_TD: Tensor, y_TD: Tensor | None, ple_TLP: Tensor | None, plan: PackedPlan
        ) -> tuple[Tensor, Tensor | None]:
            if plan.plain(layer, DecoderLayer):
                ple = None if ple_TLP is None else (ple_TLP, index)
                return layer.packed(x_TD, y_TD, ple, plan, next_norm, tail)
            layout = plan.layout
            inputs = None if ple_TLP is None else layout.unpack(ple_TLP[:, index])
            return layout.pack(layer(layout.unpack(x_TD), inputs, plan=plan)), None

        options = self.checkpointing
        if options is None or index % self.checkpoint_every or not torch.is_grad_enabled():
            return run(x_TD, y_TD, ple_TLP, plan)
        # Shared keys go in and out as tensors, for a reentrant checkpoint finds no others.
        owner, made = self.config.kv_owner(index), list[Keys | None]()
        borrowed = () if owner == index else (plan.keys[owner].k, plan.keys[owner].v)

        def recomputed(
            x_TD: Tensor, y_TD: Tensor | None, ple_TLP: Tensor | None, *kv: Tensor
        ) -> tuple[Tensor | None, ...]:
            inner = copy.copy(plan)
            inner.keys = {owner: replace(plan.keys[owner], k=kv[0], v=kv[1])} if kv else {}
            x_TD, y_TD = run(x_TD, y_TD, ple_TLP, inner)
            lent = None if kv else inner.keys.get(index)
            made.append(lent)
            return (x_TD, y_TD) if lent is None else (x_TD, y_TD, lent.k, lent.v)

        x_TD, y_TD, *kv = checkpoint(recomputed, x_TD, y_TD, ple_TLP, *borrowed, **options)
        if (lent := made[0]) is not None:
            plan.keys[index] = replace(lent, k=kv[0], v=kv[1])
        return x_TD, y_TD

    def _ple(
        self, ids_T: Tensor | None, x_TD: Tensor, token_part: Tensor | None, plan: PackedPlan
    ) -> Tensor:
        """Per-layer inputs [T, L, P]: the context's projection joined with the token's rows."""
        projected = plan.call(self.per_layer_model_projection, nn.Linear, x_TD)
        projected = projected * self.config.hidden_size**-0.5
        table, norm = self.embed_tokens_per_layer, self.per_layer_projection_norm
        if token_part is None:
            assert ids_T is not None
            if plan.plain(table, ScaledEmbedding) and plan.plain(norm, RMSNorm):
                return ops.ple_embed(ids_T, table.weight, projected, norm.weight, norm.eps)
            # The table may have stayed in host memory, or come only when it is called.
            where = next(table.parameters()).device
            ids_T = ids_T if where.type == "meta" else ids_T.to(where)
            token_part = plan.call(table, ScaledEmbedding, ids_T).to(x_TD.device)
        parts = (-1, self.config.num_hidden_layers, self.ple_width)
        context = plan.call(norm, RMSNorm, projected.view(parts))
        return (context + token_part.view(parts)) * 2.0**-0.5

    def _set_rotation(self, plan: PackedPlan, x_TD: Tensor) -> None:
        """What layers rotate by: positions and frequencies, or what a hooked module makes of it."""
        rotary = self.rotary_emb
        if plan.plain(rotary, RotaryEmbedding):
            # Hooks that place weights do not move what is no weight.
            tables = {kind: table.to(x_TD.device) for kind, table in rotary.tables.items()}
            plan.inv_freq, plan.rotation = tables, None
            return
        layout = plan.layout
        x, positions = layout.unpack(x_TD), layout.unpack(layout.positions)
        plan.rotation = {
            kind: (layout.pack(cos), layout.pack(sin))
            for kind in dict.fromkeys(self.config.layer_types)
            for cos, sin in [rotary(x, positions, kind)]
        }


class _NoGradient(torch.autograd.Function):
    """Passes a tensor on and refuses its gradient by name."""

    @staticmethod
    def forward(ctx: object, x: Tensor, _: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> NoReturn:
        raise RuntimeError(
            "a forward over a cache that holds tokens has no gradient: give the whole sequence at "
            "once, with an empty cache or none"
        )


def _restarting(cu_seq_lens: Tensor, shape: tuple[int, int]) -> Tensor:
    """position_ids [1, S] of the sequences that one row packs."""
    lengths = cu_seq_lens.diff().tolist()
    if shape[0] != 1 or sum(lengths) != shape[1]:
        raise ValueError(
            f"cu_seq_lens_q must cover one row of tokens, got {sum(lengths)} for {list(shape)}"
        )
    return torch.cat([torch.arange(length) for length in lengths])[None]
