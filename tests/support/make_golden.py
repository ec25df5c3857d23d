"""Tiny random Gemma 4 checkpoints, and what transformers computes for them.

    python tests/support/make_golden.py [VARIANT ...]

Writes tests/golden/VARIANT/{model.safetensors, config.json, config_flat.json, golden.safetensors}:
config.json as transformers writes it, config_flat.json as published checkpoints spell it. Every
parameter is random, norm weights and scalars too: at their initial ones, mistakes do not show.
The reference is transformers' eager attention on the CPU.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

GOLDEN = Path(__file__).parents[1] / "golden"
S, F = "sliding_attention", "full_attention"
TOKENS, NEW_TOKENS, SHORT_ROW = 22, 10, 13
BASE = dict(
    vocab_size=96,
    vocab_size_per_layer_input=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    layer_types=[S, S, S, F],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    global_head_dim=16,
    sliding_window=6,
    max_position_embeddings=256,
    hidden_size_per_layer_input=0,
    final_logit_softcapping=30.0,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=1,
)
PLE = dict(hidden_size_per_layer_input=8)
K_EQ_V = dict(attention_k_eq_v=True, num_global_key_value_heads=1)
E4B = dict(PLE, num_hidden_layers=12, layer_types=([S] * 5 + [F]) * 2, num_kv_shared_layers=6)
VARIANTS = {
    "dense": dict(sliding_window=4, layer_types=[S, F, S, F]),
    "no_softcap": dict(final_logit_softcapping=None),
    "e2b_like": dict(
        PLE,
        num_hidden_layers=10,
        layer_types=([S] * 4 + [F]) * 2,
        num_kv_shared_layers=5,
        num_key_value_heads=1,
        use_double_wide_mlp=True,
    ),
    "e4b_like": E4B,
    "e4b_like_bf16": dict(E4B, dtype="bfloat16"),
    "moe_like": dict(
        K_EQ_V, enable_moe_block=True, num_experts=8, top_k_experts=3, moe_intermediate_size=12
    ),
    "k_eq_v": K_EQ_V,
    "real_heads_bf16": dict(
        K_EQ_V,
        head_dim=256,
        global_head_dim=512,
        num_hidden_layers=2,
        layer_types=[S, F],
        dtype="bfloat16",
    ),
    "attention_bias": dict(PLE, attention_bias=True),
    "bidirectional_all": dict(use_bidirectional_attention="all"),
    "bidirectional_vision": dict(use_bidirectional_attention="vision"),
    "untied": dict(tie_word_embeddings=False),
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Random everything, scaled so that scores and residuals stay moderate in bf16."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        if name.endswith(("inv_freq", "embed_scale")):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        around_one = 1 + 0.3 * noise
        if name.endswith("layer_scalar"):
            value = 0.75 + 0.2 * torch.rand(tensor.shape, generator=generator)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            value = 1.2 * tensor.shape[-1] ** -0.25 * around_one
        elif "norm" in name or name.endswith("scale"):
            # Norms that close a branch stay small: many layers must not drown the embedding.
            value = around_one * (0.25 if ".post_" in name else 1.0)
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "embed_tokens_per_layer" in name:
            value = 0.25 * noise
        else:
            value = 1.1 * noise / math.sqrt(tensor.shape[-1])
        tensor.data.copy_(value.to(tensor.dtype))


def record(model: torch.nn.Module, config: transformers.Gemma4TextConfig) -> dict:
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, BASE["vocab_size"], (1, TOKENS), generator=generator)
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    found = {"ids": ids, "logits": states.logits}
    found |= {f"state.{i}": state for i, state in enumerate(states.hidden_states)}
    padding = torch.zeros(1, TOKENS - SHORT_ROW, dtype=torch.int64)
    for side, short in (
        ("left", torch.cat([padding, ids[:, :SHORT_ROW]], 1)),
        ("right", torch.cat([ids[:, :SHORT_ROW], padding], 1)),
    ):
        batch = torch.cat([ids, short])
        mask = torch.ones_like(batch)
        mask[1] = short != 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        result = model(
            input_ids=batch, attention_mask=mask, position_ids=positions, use_cache=False
        )
        found |= {f"{side}.ids": batch, f"{side}.mask": mask, f"{side}.logits": result.logits}
    if config.use_bidirectional_attention != "all":
        options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        found["greedy"] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found["left.greedy"] = model.generate(
            found["left.ids"], attention_mask=found["left.mask"], **options
        )
    return found


@torch.no_grad()
def make(name: str) -> None:
    options = dict(BASE, **VARIANTS[name])
    dtype = getattr(torch, options.pop("dtype", "float32"))
    config = transformers.Gemma4TextConfig(**options)
    config._attn_implementation = "eager"
    model = transformers.Gemma4ForCausalLM(config).eval()
    randomise(model, torch.Generator().manual_seed(1 + list(VARIANTS).index(name)))
    folder = GOLDEN / name
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    flat = dict(options, model_type="gemma4_text", dtype=str(dtype).removeprefix("torch."))
    text = json.dumps(flat, indent=1, sort_keys=True) + "\n"
    (folder / "config_flat.json").write_text(text, encoding="utf-8")
    load = transformers.Gemma4ForCausalLM.from_pretrained
    model = load(folder, attn_implementation="eager", dtype=dtype).eval()
    found = record(model, config)
    if dtype != torch.float32:
        model = load(folder, attn_implementation="eager", dtype=torch.float32).eval()
        found["logits_fp32"] = model(input_ids=found["ids"], use_cache=False).logits
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "golden.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", help="default: all")
    for variant in parser.parse_args().variants or VARIANTS:
        make(variant)
        print(variant)
