"""Models written as llama.cpp writes them, by the format's own package."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig, Gemma4Tokenizer
from gemma4.checkpoint.gguf.model import LAYER_NAMES, NAMES

TYPE = gguf.GGMLQuantizationType
Dense = dict[str, torch.Tensor]


def gguf_name(name: str) -> str:
    """The model's name of a tensor as llama.cpp has it."""
    name = name.removeprefix("model.")
    back = {ours: theirs for theirs, ours in NAMES.items()}
    if name in back:
        return back[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}." + {ours: theirs for theirs, ours in LAYER_NAMES.items()}[rest]


def write_config(writer: gguf.GGUFWriter, config: Gemma4TextConfig) -> None:
    layers = config.num_hidden_layers
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    owners = layers - config.num_kv_shared_layers
    wide = [config.use_double_wide_mlp and i >= owners for i in range(layers)]
    widths = [config.intermediate_size * (1 + double) for double in wide]
    keys = {
        "context_length": config.max_position_embeddings,
        "block_count": layers,
        "embedding_length": config.hidden_size,
        "attention.shared_kv_layers": layers - owners,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.head_count": config.num_attention_heads,
        "attention.key_length": config.global_head_dim,
        "attention.key_length_swa": config.head_dim,
        "attention.sliding_window": config.sliding_window,
    }
    if config.enable_moe_block:
        keys |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.top_k_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    for name, value in keys.items():
        writer.add_uint32(f"gemma4.{name}", value)
    writer.add_float32("gemma4.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("gemma4.final_logit_softcapping", config.final_logit_softcapping)
    for name, kind in (("freq_base", "full"), ("freq_base_swa", "sliding")):
        writer.add_float32(
            f"gemma4.rope.{name}", config.rope_parameters[f"{kind}_attention"]["rope_theta"]
        )
    writer.add_array("gemma4.attention.sliding_window_pattern", sliding)
    writer.add_array(
        "gemma4.attention.head_count_kv", [config.kv_heads(kind) for kind in config.layer_types]
    )
    writer.add_array("gemma4.feed_forward_length", widths)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Gemma4Tokenizer) -> None:
    data = json.loads(tokenizer.backend.to_str())
    vocabulary = tokenizer.backend.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    added = {entry["content"]: entry["special"] for entry in data["added_tokens"]}
    types = [1 if token not in added else 3 if added[token] else 4 for token in tokens]
    types[vocabulary["<unk>"]] = 2
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in data["model"]["merges"]])
    writer.add_unk_token_id(vocabulary["<unk>"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if "default" in tokenizer.templates:
        writer.add_chat_template(tokenizer.templates["default"])


def write(
    file: Path,
    model: Gemma4ForCausalLM,
    kind: TYPE = TYPE.F32,
    tokenizer: Gemma4Tokenizer | None = None,
) -> Dense:
    """Writes a model, its matrices in blocks of `kind`; returns what they stand for."""
    config = model.config
    writer, dense = gguf.GGUFWriter(file, "gemma4"), {}
    write_config(writer, config)
    if tokenizer is not None:
        write_tokenizer(writer, tokenizer)
    half, turning = config.global_head_dim // 2, config.rope_parameters["full_attention"]
    divisors = np.full(half, 1e30, np.float32)
    divisors[: int(half * turning["partial_rotary_factor"])] = 1
    writer.add_tensor("rope_freqs.weight", divisors)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        if tensor.dim() < 2 or tensor.shape[-1] % block or "router" in name:
            writer.add_tensor(gguf_name(name), data)
            dense[name] = tensor.float()
            continue
        packed = gguf.quants.quantize(data, kind)
        raw = None if kind in (TYPE.F32, TYPE.F16) else kind
        writer.add_tensor(gguf_name(name), packed, raw_dtype=raw)
        dense[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind)).float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense
