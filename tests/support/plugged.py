"""What the tests of the plug-in for transformers share: small models, and both ways to run them."""

import collections
from pathlib import Path

import pytest
import torch
import transformers

from gemma4_kernels import common, ops, opset, residual
from gemma4_kernels.integrations import transformers as plugin
from gemma4_kernels.integrations.transformers import attention, base, decode, experts, loss, modules

from . import make_golden

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["dense", "e2b_like", "moe_like", "k_eq_v", "attention_bias"]
each = pytest.mark.parametrize("name", NAMES)
S, F = make_golden.S, make_golden.F
# As few layers as have every kind of module: with experts, and keys that are values; with per-layer
# inputs, and keys that are shared.
SMALL = {
    "moe": dict(
        make_golden.K_EQ_V,
        layer_types=[S, F],
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=8,
    ),
    "ple": dict(
        make_golden.PLE,
        layer_types=[S, F, S, F],
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    ),
}
# With as many experts as the ops of a few tokens take, by eights.
EIGHT = {"experts": dict(SMALL["moe"], num_experts=8)}
small_models = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True, params=["as on a GPU", "as on a CPU"])
def way(request, monkeypatch, recwarn):
    """The models here are on a CPU: as on a GPU they take the ops (their eager twins), as on a CPU
    they call none but for packed rows and long prompts, whose tests say so by `use_ops`. Either
    way no layer takes torch's attention unseen."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(base, "takes_ops", lambda x: True)
    else:
        use_ops(monkeypatch, None)
    opset.warn.cache_clear()
    yield request.param
    assert not [w for w in recwarn if "without a kernel" in str(w.message)]


def load(name, attention="eager", **options):
    if name == "moe_like":
        options["experts_implementation"] = "eager" if attention == "eager" else plugin.NAME
    return transformers.Gemma4ForCausalLM.from_pretrained(
        GOLDEN / name, attn_implementation=attention, **options
    ).eval()


def small(name):
    """Under transformers' eager attention and experts; the same parameters at every call."""
    options = make_golden.BASE | (SMALL | EIGHT)[name]
    options |= dict(num_hidden_layers=len(options["layer_types"]))
    config = transformers.Gemma4TextConfig(**options)
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.Gemma4ForCausalLM(config).eval()
    make_golden.randomise(model, torch.Generator().manual_seed(1))
    return model


def both(name, **options):
    """Under transformers' eager attention, and with everything on these ops."""
    plugin.register()
    return load(name, **options), plugin.enable(load(name, plugin.NAME, **options))


def some_ids(batch, width, seed=0):
    return torch.randint(3, 96, (batch, width), generator=torch.Generator().manual_seed(seed))


def left_padding(batch, width):
    mask = torch.ones(batch, width, dtype=torch.long)
    for row in range(batch):
        mask[row, : 3 * row] = 0
    return mask


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def close_gradients(ours, theirs):
    """Of two models, by name; none is missing."""
    pairs = zip(theirs.named_parameters(), ours.named_parameters(), strict=True)
    for (key, a), (_, b) in pairs:
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            scale = a.grad.abs().max().item()
            options = dict(atol=1e-5 * max(scale, 1), rtol=1e-4)
            torch.testing.assert_close(b.grad, a.grad, **options, msg=key)


def use_ops(monkeypatch, ops):
    """Puts others in the place of the ops that the plug-in calls."""
    for module in (attention, common, decode, experts, loss, modules, residual):
        monkeypatch.setattr(module, "ops", ops)


class Calls(collections.Counter):
    """The ops, and how often each was asked for."""

    def __getattr__(self, name):
        self[name] += 1
        return getattr(ops, name)
