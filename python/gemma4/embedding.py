"""What the first layer reads: embeddings, per-layer inputs, and what rotates queries and keys."""

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4_kernels import ops
from gemma4_kernels.packed_linear import LINEAR, PackedEmbedding

from .modules import EMBEDDING, RMSNorm, RotaryEmbedding, ScaledEmbedding
from .steps import PackedPlan

if TYPE_CHECKING:
    from .model import Gemma4TextModel


def first_inputs(
    stack: "Gemma4TextModel",
    plan: PackedPlan,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None = None,
    per_layer_inputs: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x [T, D] and, with PLE, the per-layer inputs [T, L, P]; the plan gets its rotation.

    The arguments are those of `Gemma4TextModel.forward`.
    """
    layout = plan.layout
    if input_ids is not None:
        ids_T = layout.pack(input_ids).to(layout.positions.device)
        x_TD = plan.call(stack.embed_tokens, EMBEDDING, ids_T)
    else:
        assert inputs_embeds is not None
        ids_T, x_TD = None, layout.pack(inputs_embeds)
    ple_TLP = None
    if stack.ple_width:
        token_part = None if per_layer_inputs is None else layout.pack(per_layer_inputs)
        ple_TLP = _ple(stack, ids_T, x_TD, token_part, plan)
    _set_rotation(stack, plan, x_TD)
    return x_TD, ple_TLP


def _ple(
    stack: "Gemma4TextModel",
    ids_T: Tensor | None,
    x_TD: Tensor,
    token_part: Tensor | None,
    plan: PackedPlan,
) -> Tensor:
    """Per-layer inputs [T, L, P]: the context's projection joined with the token's rows."""
    projected = plan.call(stack.per_layer_model_projection, LINEAR, x_TD)
    projected = projected * stack.config.hidden_size**-0.5
    table, norm = stack.embed_tokens_per_layer, stack.per_layer_projection_norm
    if token_part is None:
        assert ids_T is not None
        if plan.plain(table, ScaledEmbedding) and plan.plain(norm, RMSNorm):
            return ops.ple_embed(ids_T, table.weight, projected, norm.weight, norm.eps)
        if plan.plain(table, PackedEmbedding) and plan.plain(norm, RMSNorm):
            rows_TP = table.rows(ids_T.to(table.weight.device)).to(x_TD.device)
            every = torch.arange(len(rows_TP), device=x_TD.device)
            return ops.ple_embed(every, rows_TP, projected, norm.weight, norm.eps)
        # The table may have stayed in host memory, or come only when it is called.
        where = next(chain(table.parameters(), table.buffers())).device
        ids_T = ids_T if where.type == "meta" else ids_T.to(where)
        token_part = plan.call(table, EMBEDDING, ids_T).to(x_TD.device)
    parts = (-1, stack.config.num_hidden_layers, stack.ple_width)
    context = plan.call(norm, RMSNorm, projected.view(parts))
    return (context + token_part.view(parts)) * 2.0**-0.5


def _set_rotation(stack: "Gemma4TextModel", plan: PackedPlan, x_TD: Tensor) -> None:
    """What layers rotate by: positions and frequencies, or what a hooked module makes of it."""
    rotary = stack.rotary_emb
    if plan.plain(rotary, RotaryEmbedding):
        # Hooks that place weights do not move what is no weight.
        tables = {kind: table.to(x_TD.device) for kind, table in rotary.tables.items()}
        plan.inv_freq, plan.rotation = tables, None
        return
    layout = plan.layout
    x, positions = layout.unpack(x_TD), layout.unpack(layout.positions)
    plan.rotation = {
        kind: (layout.pack(cos), layout.pack(sin))
        for kind in dict.fromkeys(stack.config.layer_types)
        for cos, sin in [rotary(x, positions, kind)]
    }
