"""Switching the plug-in for transformers on and off, what it says of itself, what it refuses."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from support.plugged import base, both, close, each, load, plugin, small, some_ids, use_ops
from support.plugged import way as way

from gemma4_kernels import extension, ops
from gemma4_kernels.integrations.transformers.attention import attention


@each
@torch.no_grad()
def test_enable_and_disable(name):
    model = load(name)
    ids = some_ids(2, 12)
    before, classes = model(ids).logits, [type(m) for m in model.modules()]
    plugin.enable(plugin.enable(model))
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    plugin.disable(model)
    assert [type(m) for m in model.modules()] == classes
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks
    model.set_attn_implementation("eager")
    if name == "moe_like":
        model.set_experts_implementation("eager")
    assert torch.equal(model(ids).logits, before)
    for other in (copied, pickled):
        assert type(other.model.layers[0]) is plugin.DecoderLayer
        close(other(ids).logits, before)


@torch.no_grad()
def test_transformers_finds_what_it_looks_for_by_class():
    """Hidden states, and the names by which tools shard and split."""
    theirs, ours = both("moe_like")
    ids = some_ids(2, 12)
    a, b = (m(ids, output_hidden_states=True, output_router_logits=True) for m in (ours, theirs))
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        close(x, y)
    assert [type(m).__name__ for m in ours.modules()] == [
        type(m).__name__ for m in theirs.modules()
    ]
    assert "not fused" not in plugin.explain(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_experts_that_grouped_mm_refuses(dtype, way, monkeypatch):
    """float64, and in bf16 rows that are no multiple of 16 bytes, run on the op anywhere."""
    model = load("moe_like").to(dtype)
    layer = model.model.layers[0].experts
    assert layer.down_proj.shape[-1] % 8, "bf16 rows that grouped_mm would take test nothing"
    x = torch.randn(9, layer.hidden_dim, dtype=dtype)
    weights, index = torch.rand(9, layer.num_experts, dtype=dtype).topk(2)
    expected = layer(x, index, weights)
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    use_ops(monkeypatch, ops)
    plugin.enable(model)
    found = layer(x, index, weights)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    if way == "as on a CPU":
        says = "experts: eager torch (no kernels for cpu)"
        assert (says in plugin.explain(model)) == (dtype != torch.float32)


def test_explain(way, monkeypatch):
    _, ours = both("moe_like")
    monkeypatch.setattr(extension, "BUILD", extension.Build())
    says = {
        "as on a CPU": "attention: eager torch (no kernels for cpu); experts: "
        "grouped_mm_experts_forward (no kernels); norms, MLP, rotary: transformers",
        "as on a GPU": "attention: eager twins (no kernels for cpu); experts: "
        "eager twins (no kernels for cpu); norms, MLP, rotary: eager twins (no kernels for cpu)",
    }
    assert all(line.endswith(says[way]) for line in plugin.explain(ours).splitlines())


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_explain_names_what_is_not_fused(way):
    if way == "as on a CPU":
        return  # where nothing is fused, and explain says so
    model = plugin.enable(small("ple"))
    layers = model.model.layers
    layers[0].self_attn.k_norm.register_forward_hook(lambda *args: None)
    layers[0].act_fn.register_forward_pre_hook(lambda *args: None)
    layers[1].self_attn, layers[1].mlp = Wrapper(layers[1].self_attn), Wrapper(layers[1].mlp)
    layers[2].post_feedforward_layernorm = Wrapper(layers[2].post_feedforward_layernorm)
    layers[2].mlp.up_proj = Wrapper(layers[2].mlp.up_proj)
    expected = [
        "not fused: queries and keys (k_norm has hooks), act_fn has hooks",
        "not fused: queries and keys (self_attn is a Wrapper), mlp is a Wrapper",
        "not fused: post_feedforward_layernorm is a Wrapper, linear layers (up_proj is a Wrapper)",
        "",
    ]
    for line, end in zip(plugin.explain(model).splitlines(), expected, strict=True):
        assert line.endswith(end) and ("not fused" in line) == bool(end), line
    layers[3] = Wrapper(layers[3])
    for line in plugin.explain(model).splitlines():
        assert "queries and keys (layers.3 is a Wrapper)" in line


def test_refusals():
    _, ours = both("dense")
    attn = ours.model.layers[0].self_attn
    q, k = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match=r"has no dropout, got attention_dropout 0\.1"):
        attention(attn, q, k, k, None, dropout=0.1)
    with pytest.raises(ValueError, match="enable needs a Gemma 4 text model, got Linear"):
        plugin.enable(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("version", ["4.57.6", "5.14.1", "5.25.0", "6.0.0"])
def test_wrong_version_is_named(version, monkeypatch):
    monkeypatch.setattr(base.transformers, "__version__", version)
    sentence = rf"needs transformers >= 5\.15, < 5\.25, got {version}"
    with pytest.raises(RuntimeError, match=sentence):
        plugin.register()


def test_versions_are_those_of_the_metadata():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    bounds = re.findall(r'"transformers([^"]*)"', text)
    assert len(bounds) == 2  # the extras `transformers` and `test`
    assert set(bounds) == {">={}.{},<{}.{}".format(*sum(base.VERSIONS, ()))}
