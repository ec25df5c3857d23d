"""Linear layers that other libraries quantised, in a model under the plug-in: they are called."""

import copy

import pytest
import torch
from support import make_golden
from support.plugged import (
    SMALL,
    Calls,
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

from gemma4_kernels import joined, ops
from gemma4_kernels.integrations.transformers import decode
from gemma4_kernels.integrations.transformers.packed import packed_weight
from gemma4_kernels.packed_linear import PackedLinear


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


def whole_tiles():
    """A model some of whose linears are of whole tiles."""
    options = dict(hidden_size=64, intermediate_size=128, head_dim=32, global_head_dim=64)
    options = make_golden.BASE | SMALL["ple"] | options | dict(num_hidden_layers=4)
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**options)).eval()
    model.set_attn_implementation("eager")
    make_golden.randomise(model, torch.Generator().manual_seed(1))
    return model


def compressed(bits, kind, group=None):
    """Linears as compressed-tensors stores them, in groups or rows, with scales of bfloat16."""

    def quantise(model):
        from compressed_tensors import quantization
        from compressed_tensors.compressors import compress_module

        of = dict(strategy="group", group_size=group) if group else dict(strategy="channel")
        weights = quantization.QuantizationArgs(num_bits=bits, type=kind, **of)
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
        config = quantization.QuantizationConfig(config_groups={"all": scheme})
        largest = 448 if kind == "float" else 2 ** (bits - 1) - 1
        for linear in linears(model).values():
            if linear.in_features % 64:
                continue
            alone = nn.Sequential(linear)
            quantization.apply_quantization_config(alone, config)
            rows = linear.weight.data.unflatten(1, (-1, group or linear.in_features))
            scale = (rows.abs().amax(-1) / largest).bfloat16()
            linear.weight_scale.data = scale.to(linear.weight_scale.dtype)
            compress_module(linear)

    return quantise


def unpacked(linear):
    """The weight that a quantised linear stands for, by its library's own word or formula."""
    if hasattr(linear, "weight_scale"):
        from compressed_tensors.compressors import decompress_module

        linear = copy.deepcopy(linear)
        decompress_module(linear)
        return linear.weight.data
    if hasattr(linear.weight, "SCB"):
        return linear.weight.CB.double() * linear.weight.SCB.double()[:, None] / 127
    dequantize = getattr(linear.weight, "dequantize", None)
    return linear.weight.data if dequantize is None else dequantize()


FORMS = {
    "torchao": torchao,
    "bitsandbytes_8": bitsandbytes_8,
    "int4 of 32 columns": compressed(4, "int", 32),
    "int4 of 64 columns": compressed(4, "int", 64),
    "int4 of rows": compressed(4, "int"),
    "int8 of rows": compressed(8, "int"),
    "fp8 of rows": compressed(8, "float"),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_packed(form, way, monkeypatch):
    """Ours in their place: the logits of a dense model of the numbers that they stand for."""
    ids, dense, model, packed = some_ids(2, 9), whole_tiles(), whole_tiles(), set()
    FORMS[form](model)
    for name, linear in linears(model).items():
        weight = unpacked(linear).float()
        dense.get_submodule(name).weight.data = weight
        if not linear.in_features % 64 and not linear.out_features % 16:
            packed.add(name)
            continue
        model.set_submodule(name, nn.Linear(*weight.T.shape, bias=False))  # has no whole tiles
        model.get_submodule(name).weight.data = weight
    plugin.enable(model, packed=True)
    found = {name for name, m in model.named_modules() if type(m) is PackedLinear}
    assert found == packed and len(found) > 10
    caches = [transformers.StaticCache(model.config, max_cache_len=9) for _ in range(2)]
    for part in (ids[:, :6], *ids[:, 6:].split(1, 1)):
        pair = zip((model, dense), caches, strict=True)
        close(*(m(part, past_key_values=cache).logits for m, cache in pair))


@torch.no_grad()
def test_packed_steps_are_few_ops(way, monkeypatch):
    """Where there are kernels: q, k and v joined, gate and up too, as of dense weights."""
    if way == "as on a CPU":
        return  # where no op runs
    ids, found = some_ids(1, 8), []
    for kernels in (False, True):
        model = whole_tiles()
        compressed(4, "int", 32)(model)
        for name, linear in linears(model).items():
            if hasattr(linear, "weight_scale") and linear.out_features % 16:
                dense = nn.Linear(linear.in_features, linear.out_features, bias=False)
                dense.weight.data = unpacked(linear)
                model.set_submodule(name, dense)
        plugin.enable(model, packed=True)
        cache, calls = transformers.StaticCache(model.config, max_cache_len=9), Calls()
        logits = [model(ids[:, :6], past_key_values=cache).logits]
        for module in (decode, joined):
            monkeypatch.setattr(module, "has_kernels", lambda device, kernels=kernels: kernels)
        use_ops(monkeypatch, calls)
        logits += [model(part, past_key_values=cache).logits for part in ids[:, 6:].split(1, 1)]
        found.append(torch.cat(logits, 1))
        use_ops(monkeypatch, ops)
    close(*found)
    assert calls["linear_small"] == 2 * 6 * len(model.model.layers)


def test_what_is_not_packed():
    """Hooked, dense, in nf4, and with numbers that no packed form has."""
    linear = nn.Sequential(nn.Linear(64, 32, bias=False))
    assert packed_weight(linear[0]) is None
    model = whole_tiles()
    bitsandbytes_4(model)
    assert not any(packed_weight(m) for m in model.modules())
    model = whole_tiles()
    compressed(4, "int", 32)(model)
    first, second, *_ = (m for m in linears(model).values() if hasattr(m, "weight_scale"))
    first.weight_scale.data += 1e-4  # no number of 16 bits
    second.register_forward_hook(lambda *args: None)
    assert packed_weight(first) is None and packed_weight(second) is None


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
