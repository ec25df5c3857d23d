"""Modules that hold packed weights under what programs do to modules."""

import copy
import io

import peft
import pytest
import torch
from support.packed import draw, formula
from support.packed_models import packed
from support.tiny import E_SERIES, K_EQ_V, MOE, ids, tiny
from torch import nn

from gemma4 import Gemma4ForCausalLM
from gemma4.measure import decode_bytes
from gemma4_kernels import packed_linear
from gemma4_kernels.packed import PackedWeight, pack
from gemma4_kernels.packed_linear import PackedEmbedding, PackedLinear

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
FORMS = [(torch.uint8, BF16), (torch.uint8, E4M3), (torch.int8, None), (E4M3, torch.float32)]
each = pytest.mark.parametrize(("codes", "scales"), FORMS)
WIDE = dict(vocab_size=96, vocab_size_per_layer_input=96, hidden_size=128, intermediate_size=192)
MODELS = {
    "e_series": E_SERIES | WIDE | {"hidden_size_per_layer_input": 64},
    "k_eq_v": K_EQ_V | WIDE,
    "moe": MOE | WIDE | {"moe_intermediate_size": 64},
}


def weight_of(codes: torch.dtype, scales: torch.dtype | None, *shape: int) -> PackedWeight:
    parts = draw(codes, scales, *shape)
    return pack(parts[0], parts[1], parts[2].abs() * 0.01)


def pair(name: str) -> tuple[Gemma4ForCausalLM, Gemma4ForCausalLM]:
    """A model of int4 weights, its tables in 8 bits, and a plain one of the same numbers."""
    model, plain = tiny(MODELS[name]), tiny(MODELS[name])
    plain.load_state_dict(packed(model), strict=False)
    return model, plain


@each
def test_a_cast_leaves_codes_and_scales(codes, scales) -> None:
    layer = PackedLinear(weight_of(codes, scales, 32, 128), nn.Parameter(torch.randn(32)))
    before = [None if part is None else part.clone() for part in layer.weight().parts]
    for change in (nn.Module.half, nn.Module.double, nn.Module.bfloat16, nn.Module.float):
        change(layer)
    assert layer.to(torch.float16).bias.dtype == torch.float16
    for part, old in zip(layer.weight().parts, before, strict=True):
        assert (part is None) == (old is None)
        if part is not None:
            assert part.dtype == old.dtype
            assert torch.equal(part.view(torch.uint8), old.view(torch.uint8))
    assert layer.to("meta").weight.device.type == "meta"


@each
def test_products_and_gradients(codes, scales) -> None:
    """Of a batch of any rank, against float64."""
    parts = draw(codes, scales, 32, 128)
    w, bias = formula(*parts), torch.randn(32)
    layer = PackedLinear(pack(*parts), nn.Parameter(bias))
    x = torch.randn(2, 3, 128, requires_grad=True)
    y, wanted = layer(x), x.detach().double() @ w.T + bias.double()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4 * float(wanted.abs().max()))
    grad = torch.randn_like(y)
    y.backward(grad)
    dx = grad.double() @ w
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-5, atol=1e-4 * float(dx.abs().max()))
    assert torch.equal(layer.bias.grad, grad.sum((0, 1)))
    assert not any(part.requires_grad for part in layer.weight.buffers())


@each
def test_an_embeddings_rows(codes, scales) -> None:
    parts = draw(codes, scales, 48, 64)
    table = PackedEmbedding(pack(*parts), torch.float32, scale=8.0)
    given = torch.tensor([[0, 47, 3], [16, 8, 15]])
    wanted = 8 * formula(*parts)[given]
    torch.testing.assert_close(table(given).double(), wanted, rtol=1e-6, atol=0)
    assert table.half()(given).dtype == torch.float16
    assert table.embed_scale == 8 and isinstance(table, nn.Embedding)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models(name: str) -> None:
    """A prompt and tokens after it, and the same where modules are called one by one."""
    model, plain = pair(name)
    given = ids(2, 11) % 96
    wanted = plain(given).logits
    torch.testing.assert_close(model(given).logits, wanted, atol=2e-5, rtol=0)
    options = dict(max_new_tokens=6, do_sample=False)
    made = plain.generate(given, **options)
    assert torch.equal(model.generate(given, **options), made)
    seen = []
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(lambda module, *_: seen.append(module))
    torch.testing.assert_close(model(given).logits, wanted, atol=2e-5, rtol=0)
    assert len(seen) == sum(isinstance(module, PackedLinear) for module in model.modules())
    assert torch.equal(model.generate(given, **options), made)
    assert "has hooks" in model.explain()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_copies_pickles_and_state_dicts(name: str) -> None:
    model, _ = pair(name)
    given = ids(1, 9) % 96
    wanted = model(given).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    empty, _ = pair(name)
    for buffer in empty.buffers():
        buffer.view(torch.uint8).zero_()
    empty.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), empty):
        assert torch.equal(other(given).logits, wanted)
        assert other.lm_head.weight is other.model.embed_tokens.weight
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert torch.equal(model(given).logits, wanted)


LORA = dict(task_type="CAUSAL_LM", r=3, lora_alpha=6)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=["all", "two"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_train(name: str, targets: list[str] | str) -> None:
    """Logits and gradients of LoRA on a packed model are those on the plain one."""
    config = peft.LoraConfig(**LORA, target_modules=targets)
    torch.manual_seed(0)
    models = [peft.get_peft_model(model, config) for model in pair(name)]
    drawn = {n: torch.randn_like(p) for n, p in models[1].named_parameters() if p.requires_grad}
    given = ids(2, 11) % 96
    losses, grads = [], []
    for model in models:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert trained.keys() == drawn.keys()
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(0.1 * drawn[n])
        model.train()
        loss = model(given, labels=given).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad for n, p in trained.items()})
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    for n, grad in grads[1].items():
        torch.testing.assert_close(
            grads[0][n], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max())
        )


def test_what_asks_for_a_dense_weight_is_refused() -> None:
    model, _ = pair("k_eq_v")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA, target_modules=["q_proj"]))
    with pytest.raises(AttributeError, match="'PackedParameter' object has no attribute 'data'"):
        adapted.merge_and_unload()


@pytest.mark.parametrize(
    ("codes", "scales", "rows", "columns"),
    [
        (torch.uint8, BF16, 1040, 128),
        (torch.uint8, torch.float16, 32, 192),
        (torch.uint8, None, 64, 128),
        (torch.uint8, None, 16, 64),
        (torch.int8, None, 48, 192),
    ],
)
@torch.no_grad()
def test_torchs_products_on_a_cpu(codes, scales, rows: int, columns: int, monkeypatch) -> None:
    """They stand in where they can, and err by what bf16 does to numbers of this size."""
    code, scale, row_scales = draw(codes, scales, rows, columns)
    parts = code, scale, None if scales == BF16 else row_scales
    w, layer = formula(*parts), PackedLinear(pack(*parts))
    assert layer.weight.on_cpu is not None
    assert layer.weight.on_cpu.nbytes < 1.2 * layer.weight.nbytes
    monkeypatch.setattr(packed_linear.ops, "linear_packed", None)  # is not called
    for tokens in (1, 2, 17):
        x = torch.randn(tokens, columns).bfloat16()
        wanted = x.double() @ w.T
        # A scale and the sum are rounded; the terms of a sum err alike in the scale alone.
        bound = 2.0**-8 * ((x.double().abs() @ w.abs().T) / columns**0.5 * 3 + wanted.abs())
        assert ((layer(x).double() - wanted).abs() <= bound).all()
    assert layer(x[None]).shape == (1, 17, rows)


@torch.no_grad()
def test_torchs_copy_follows_the_weight() -> None:
    layer, other = (PackedLinear(weight_of(torch.uint8, BF16, 32, 64)) for _ in range(2))
    other.weight.codes.random_()
    x = torch.randn(3, 64).bfloat16()
    before, wanted = layer(x), other(x)
    assert not torch.equal(before, wanted)
    assert not copy.deepcopy(layer).weight._on_cpu and layer.weight._on_cpu
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), wanted)
    assert not layer.to(torch.float16).weight._on_cpu


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_says_of_its_size(name: str) -> None:
    model, plain = pair(name)
    for options in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**options) == plain.num_parameters(**options)
    trained = sum(p.numel() for p in model.parameters())
    assert model.num_parameters(only_trainable=True) == trained < plain.num_parameters() / 10
    # int4 with a bf16 scale for 32, a head of eight bits: little is left in fp32.
    assert decode_bytes(plain) * 0.12 < decode_bytes(model) < decode_bytes(plain) * 0.25
    with pytest.raises(ValueError, match=r"packed token table has no room.*'dequantize'"):
        model.resize_token_embeddings(128)
