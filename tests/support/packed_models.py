"""Models of packed weights, made of dense ones."""

import torch
from torch import Tensor

from gemma4 import Gemma4ForCausalLM
from gemma4.checkpoint import keep
from gemma4_kernels.packed import PackedWeight, pack


@torch.no_grad()
def packed(model: Gemma4ForCausalLM, tables: bool = True) -> dict[str, Tensor]:
    """Puts int4 weights in the model, int8 in its tables if they too are to be packed; returns what
    they stand for."""
    dense = {}
    for name, w in list(model.state_dict().items()):
        kept = ".experts." in name or (name.endswith(".weight") and w.dim() == 2)
        if not kept or "router" in name or ("embed" in name and not tables):
            continue
        weight = rows_of_int8(w.float()) if "embed" in name else groups_of_int4(w.float())
        dense[name] = weight.dense()
        keep.install(model, name, weight, model.dtype)
    model.tie_weights()
    return dense


def rows_of_int8(w: Tensor) -> PackedWeight:
    scale = w.abs().amax(-1) / 127
    return pack((w / scale[..., None]).round().to(torch.int8), None, scale)


def groups_of_int4(w: Tensor) -> PackedWeight:
    groups = w.unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    code = (groups / scale.float()[..., None]).round().clamp(-8, 7) + 8
    return pack(code.flatten(-2).to(torch.uint8), scale)
