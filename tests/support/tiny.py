"""Tiny random models of each family member, no parameter left at its initial value."""

import math

import torch

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

S, F = "sliding_attention", "full_attention"
DENSE = dict(
    vocab_size=97,
    vocab_size_per_layer_input=97,
    hidden_size=64,
    num_hidden_layers=6,
    layer_types=[S] * 5 + [F],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    global_head_dim=32,
    sliding_window=8,
    intermediate_size=96,
    hidden_size_per_layer_input=0,
    final_logit_softcapping=30.0,
    dtype="float32",
)
E_SERIES = dict(
    DENSE,
    num_hidden_layers=8,
    layer_types=[S, S, S, F] * 2,
    num_kv_shared_layers=4,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=8,
)
K_EQ_V = dict(DENSE, attention_k_eq_v=True, num_global_key_value_heads=1)
MOE = dict(K_EQ_V, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=24)
ALL = {"dense": DENSE, "e_series": E_SERIES, "k_eq_v": K_EQ_V, "moe": MOE}


@torch.no_grad()
def tiny(options: dict, seed: int = 0, **overrides: object) -> Gemma4ForCausalLM:
    model = Gemma4ForCausalLM(Gemma4TextConfig(**{**options, **overrides})).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        uniform = torch.rand(tensor.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            value = (1 + 0.3 * noise) * tensor.shape[-1] ** -0.25
        elif "norm" in name:
            value = 1 + 0.3 * noise
        elif name.endswith("layer_scalar"):
            value = 0.005 + 0.915 * uniform
        elif name.endswith("router.scale"):
            value = 0.5 + uniform
        elif name.endswith("per_expert_scale"):
            value = 0.5 + 1.5 * uniform
        else:
            value = noise / math.sqrt(tensor.shape[-1])
        tensor.copy_(value)
    return model


def ids(batch: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, width), generator=torch.Generator().manual_seed(seed))
