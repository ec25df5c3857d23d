"""Says which layers of a model run on what, and why."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from ... import extension, opset
from ...check import record
from ...fusion import why_not_plain, why_seen
from ...packed_linear import LINEAR
from . import base, modules
from .experts import instead_of_op
from .layer import DecoderLayer, why_cosines

NORMS = (
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm_2",
    "post_feedforward_layernorm",
    "post_per_layer_input_norm",
)


def explain(model: nn.Module) -> str:
    """One line a layer: which attention, experts and norms it runs, on a kernel or why not, and
    which of its modules are called because no op may stand in for them; and where kernels run,
    whether they were checked on that card."""
    lines = []
    for text_model in (m for m in model.modules() if isinstance(m, gemma4.Gemma4TextModel)):
        cosines = why_cosines(text_model)
        for layer in text_model.modules():
            if isinstance(layer, gemma4.Gemma4TextDecoderLayer):
                lines.append(_line(layer, cosines))
    for device in sorted({p.device for p in model.parameters()}, key=str):
        if extension.covers(device):
            lines.append(f"kernels on {device}: {record.summary(device)}")
    return "\n".join(lines)


def _line(layer: gemma4.Gemma4TextDecoderLayer, cosines: str | None) -> str:
    config, weight = layer.config, _sample(layer)
    assert config.layer_types is not None  # which it fills itself
    layer_type = config.layer_types[layer.layer_idx]
    head_dim = config.per_layer_config[layer.layer_idx].head_dim
    head = torch.empty(0, 1, head_dim, dtype=weight.dtype, device="meta")
    packed = (head, head, head, *[None] * 11)  # no pages
    parts = [_said("attention", config._attn_implementation, "attention_prefill", packed, weight)]
    if layer.enable_moe_block:
        parts.append(_said_experts(layer, weight))
    swapped = isinstance(layer, DecoderLayer) and base.takes_ops(weight)
    ours = base.NAME if swapped else "transformers"
    parts.append(_said("norms, MLP, rotary", ours, "rms_norm", (weight, None), weight))
    called = list(_called(layer, cosines)) if swapped else []
    if called:
        parts.append("not fused: " + ", ".join(called))
    return f"layer {layer.layer_idx} ({layer_type}): " + "; ".join(parts)


def _called(layer: gemma4.Gemma4TextDecoderLayer, cosines: str | None) -> Iterator[str]:
    """The modules whose parameters no op may read, each with the reason."""
    attn, mlp = layer.self_attn, layer.mlp
    seen = why_seen(attn, modules.Attention)
    if seen:
        seen = f"self_attn {seen}"
    elif isinstance(attn, modules.Attention):
        seen = attn.why_unfused(None)
    if cosines or seen:
        yield f"queries and keys ({cosines or seen})"
    for name in NORMS:
        reason = hasattr(layer, name) and modules.why_not_read(getattr(layer, name), None)
        if reason:
            yield f"{name} {reason}"
    if not isinstance(mlp, modules.MLP):
        yield f"mlp is a {type(mlp).__name__}"
    elif reason := why_not_plain(mlp.act_fn, base.TanhGELU):
        yield f"mlp.act_fn {reason}"
    if layer.hidden_size_per_layer_input and (reason := why_not_plain(layer.act_fn, base.TanhGELU)):
        yield f"act_fn {reason}"
    linears = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    of_layer = ("per_layer_input_gate", "per_layer_projection")
    for module, names in zip((attn, mlp, layer), (*linears, of_layer), strict=True):
        for name in names:
            linear = getattr(module, name, None)
            if linear is not None and (reason := why_not_plain(linear, LINEAR)):
                yield f"linear layers ({name} {reason})"
                return


def _sample(layer: nn.Module) -> Tensor:
    """A parameter of the dtype that the layer computes in, on its device."""
    computed = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return next(p for p in layer.parameters() if p.dtype in computed)


def _said_experts(layer: gemma4.Gemma4TextDecoderLayer, weight: Tensor) -> str:
    found = [m for m in layer.experts.modules() if isinstance(m, gemma4.Gemma4TextExperts)]
    chosen = layer.config._experts_implementation
    if not found:
        return f"experts: {type(layer.experts).__name__}"
    if chosen == base.NAME and (instead := instead_of_op(found[0])):
        function, reason = instead
        return f"experts: {function.__name__} ({reason})"
    gate_up, down = found[0].gate_up_proj, found[0].down_proj
    args = gate_up[0], gate_up, None, None, down, None, None, None, None
    return _said("experts", chosen, "moe_experts", args, weight)


def _said(part: str, chosen: str, op: str, args: opset.Args, weight: Tensor) -> str:
    if chosen != base.NAME:
        return f"{part}: {chosen}"
    if not base.takes_ops(weight):
        return f"{part}: eager torch (no kernels for {weight.device})"
    if extension.BUILD.reason:
        return f"{part}: eager twins ({extension.BUILD.reason})"
    if not extension.covers(weight.device):
        return f"{part}: eager twins (no kernels for {weight.device})"
    reason = record.failed(weight.device).get(op) or opset.OPS[op].why_eager(args)
    return f"{part}: kernels" if reason is None else f"{part}: eager twins ({reason})"
