"""A file's keys as a config, and its tensors under the model's names."""

import dataclasses
import re

import torch

from ...config import Gemma4TextConfig
from ...files import Json, short
from .. import tensorfile
from ..packed import Options
from ..tensorfile import Entry
from .blocks import Blocks
from .file import GgufFile, GgufTensor

SLIDING, FULL = "sliding_attention", "full_attention"

NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "norm.weight",
    "per_layer_token_embd.weight": "embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "per_layer_projection_norm.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
}
_LAYER = re.compile(r"blk\.(\d{1,9})\.(.+)")
_ROPE = "rope_freqs.weight"  # which frequencies turn; a config says it too


def sources_of(file: GgufFile) -> list[Entry | Blocks]:
    """The file's tensors by the model's names."""
    return [_source(tensor) for tensor in file.tensors if tensor.name != _ROPE]


def _source(tensor: GgufTensor) -> Entry | Blocks:
    name = NAMES.get(tensor.name)
    if name is None and (layer := _LAYER.fullmatch(tensor.name)):
        known = LAYER_NAMES.get(layer[2])
        name = None if known is None else f"layers.{layer[1]}.{known}"
    if name is None:
        raise ValueError(f"{tensor.entry.file}: tensor {tensor.name} is not part of this model")
    if tensor.kind:
        return Blocks(name, {tensor.kind: tensor.entry}, Options("gguf"), tensor.shape)
    return dataclasses.replace(tensor.entry, name=name)


def config_of(file: GgufFile) -> Gemma4TextConfig:
    """ValueError, naming the file and the key, where they are not those of a Gemma 4 model."""
    kind = file.key("general.architecture", str)
    if kind != "gemma4":
        raise ValueError(f"{file.path}: general.architecture must be gemma4, got {short(kind)}")
    try:
        return Gemma4TextConfig.from_dict(_fields(file))
    except ValueError as error:
        said = str(error)
        raise ValueError(said if str(file.path) in said else f"{file.path}: {said}") from None


def _fields(file: GgufFile) -> Json:
    tensors = {tensor.name: tensor for tensor in file.tensors}

    def number(name: str, default: int | None = None) -> int:
        return file.key(f"gemma4.{name}", int, default)

    def real(name: str, default: float | None = None) -> float:
        return file.key(f"gemma4.{name}", float, default)

    def rows(name: str) -> int:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise ValueError(f"{file.path} lacks a matrix {name}")
        return tensors[name].shape[0]

    layers = number("block_count")
    pattern = _per_layer(file, "attention.sliding_window_pattern", layers, bool)
    kinds = [SLIDING if sliding else FULL for sliding in pattern]
    owners = layers - number("attention.shared_kv_layers", 0)
    heads = _per_layer(file, "attention.head_count_kv", layers, int)
    sliding = [n for n, kind in zip(heads, kinds, strict=True) if kind == SLIDING] or heads
    full = [n for n, kind in zip(heads, kinds, strict=True) if kind == FULL] or heads
    widths = _per_layer(file, "feed_forward_length", layers, int)
    for name, values in (("head_count_kv", sliding), ("head_count_kv", full)):
        if len(set(values)) > 1:
            raise ValueError(f"gemma4.attention.{name} must be one number a kind of layer")
    double = widths[-1] == 2 * widths[0] and owners < layers
    wanted = [widths[0] * (2 if double and i >= owners else 1) for i in range(layers)]
    if widths != wanted:
        raise ValueError(
            "gemma4.feed_forward_length must be one width, doubled on layers that share keys or "
            f"not, got {short(widths)}"
        )
    k_eq_v = any(
        kind == FULL and f"blk.{i}.attn_v.weight" not in tensors
        for i, kind in enumerate(kinds[:owners])
    )
    ple = number("embedding_length_per_layer_input", 0)
    made: Json = {
        "vocab_size": rows("token_embd.weight"),
        "hidden_size": number("embedding_length"),
        "intermediate_size": widths[0],
        "num_hidden_layers": layers,
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": sliding[0],
        "num_global_key_value_heads": full[0] if k_eq_v else None,
        "attention_k_eq_v": k_eq_v,
        "head_dim": number("attention.key_length_swa"),
        "global_head_dim": number("attention.key_length"),
        "layer_types": kinds,
        "sliding_window": number("attention.sliding_window"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": float(f"{real('attention.layer_norm_rms_epsilon'):.6g}"),
        "num_kv_shared_layers": layers - owners,
        "use_double_wide_mlp": double,
        "hidden_size_per_layer_input": ple,
        "vocab_size_per_layer_input": rows("per_layer_token_embd.weight") if ple else 1,
        "final_logit_softcapping": real("final_logit_softcapping", 0.0) or None,
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": real("rope.freq_base_swa")},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": real("rope.freq_base"),
                "partial_rotary_factor": _turning(file),
            },
        },
        "bos_token_id": file.key("tokenizer.ggml.bos_token_id", int, 2),
        "eos_token_id": eos_of(file),
        "pad_token_id": file.key("tokenizer.ggml.padding_token_id", int, 0),
    }
    if experts := number("expert_count", 0):
        made |= {
            "enable_moe_block": True,
            "num_experts": experts,
            "top_k_experts": number("expert_used_count"),
            "moe_intermediate_size": number("expert_feed_forward_length"),
        }
    return made


def eos_of(file: GgufFile) -> list[int]:
    """The tokens that end an answer: the end of the text, and that of a turn."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = (file.keys.get(f"tokenizer.ggml.{name}") for name in names)
    ids = [index for index in found if isinstance(index, int)]
    tokens = file.keys.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and "<turn|>" in tokens:
        ids.append(tokens.index("<turn|>"))
    return list(dict.fromkeys(ids)) or [1]


def _per_layer(file: GgufFile, name: str, layers: int, kind: type) -> list[int]:
    """A value for each layer, of a key that holds one for all or a list of them."""
    value = file.key(f"gemma4.{name}", object)
    values: list[object] = value if isinstance(value, list) else [value] * min(layers, 4096)
    if len(values) != layers or not all(isinstance(v, kind) for v in values):
        raise ValueError(
            f"gemma4.{name} must be a {kind.__name__} for each of {layers} layers, got "
            f"{short(value)}"
        )
    return [int(v) for v in values if isinstance(v, int)]


def _turning(file: GgufFile) -> float:
    """The share of full layers' frequencies that turn: the others are divided by 1e30."""
    found = next((tensor for tensor in file.tensors if tensor.name == _ROPE), None)
    if found is None:
        return 1.0
    if found.entry.dtype != "F32" or found.entry.size > 2**16:
        raise ValueError(f"{file.path}: {_ROPE} must be a short row of F32")
    divisors = tensorfile.read_rows(found.entry).flatten()
    still = divisors > 1e29
    if not bool(((divisors == 1) | still).all()):
        raise ValueError(f"{file.path}: {_ROPE} must be of ones and numbers above 1e29")
    turning = int((~still).sum())
    if bool(torch.any(still[:turning])):
        raise ValueError(f"{file.path}: {_ROPE} must begin with its ones")
    return turning / max(len(divisors), 1)
