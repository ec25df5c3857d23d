"""Linear layers that other libraries quantised, in a model under the plug-in: they are called."""

import pytest
import torch
from support.plugged import (
    close,
    plugin,
    small,
    small_models,
    some_ids,
    transformers,
    use_ops,
)
from support.plugged import way as way
from torch import nn

from gemma4_kernels import ops


def linears(model):
    """All but the head."""
    modules = dict(model.model.named_modules(prefix="model"))
    return {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}


def compressed_tensors(model):
    """Four bits in groups of 8; a forward of its own rounds the weight."""
    from compressed_tensors import quantization

    weights = quantization.QuantizationArgs(num_bits=4, strategy="group", group_size=8)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    config = quantization.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config)
    for linear in linears(model).values():
        largest = linear.weight.data.unflatten(1, (-1, 8)).abs().amax(-1)
        linear.weight_scale.data = (largest / 7).to(linear.weight_scale.dtype)


def torchao(model):
    """Eight bits a row, in a tensor of a class of its own."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model, Int8WeightOnlyConfig())


def bitsandbytes_4(model):
    import bitsandbytes

    for name, old in linears(model).items():
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=torch.float32
        )
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False)
        model.set_submodule(name, new.to("cpu"))


def bitsandbytes_8(model):
    import bitsandbytes

    for name, old in linears(model).items():
        new = bitsandbytes.nn.Linear8bitLt(
            old.in_features, old.out_features, bias=False, has_fp16_weights=False
        )
        new.weight = bitsandbytes.nn.Int8Params(
            old.weight.data, requires_grad=False, has_fp16_weights=False
        )
        model.set_submodule(name, new.to("cpu"))


LIBRARIES = [compressed_tensors, torchao, bitsandbytes_4, bitsandbytes_8]


@pytest.mark.parametrize("quantise", LIBRARIES, ids=lambda function: function.__name__)
@small_models
@torch.no_grad()
def test_they_are_called(name, quantise, monkeypatch):
    """A prompt and steps over a static cache; enabled after, and before."""
    use_ops(monkeypatch, ops)  # these experts are too narrow for grouped_mm on a CPU
    ids, found = some_ids(2, 9), []
    dense = small(name)(ids).logits
    for enabled in ("not", "after", "before"):
        model = small(name)
        if enabled == "before":
            plugin.enable(model)
        quantise(model)
        if enabled == "after":
            plugin.enable(model)
        cache = transformers.StaticCache(model.config, max_cache_len=9)
        parts = [ids[:, :6], *ids[:, 6:].split(1, 1)]
        logits = [model(part, past_key_values=cache).logits for part in parts]
        found.append(torch.cat(logits, 1))
    close(found[1], found[0])
    close(found[2], found[0])
    assert (found[0] - dense).abs().max() > 1e-3
