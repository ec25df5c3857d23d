"""The whole model on the emulated kernels, with the head sizes of the released models."""

import pytest
import torch
import torch.nn.functional as F
from support import emulated, tiny
from support.marks import needs_compiler

from gemma4_kernels import opset

pytestmark = needs_compiler
HEADS = dict(head_dim=256, global_head_dim=512)
NEW_TOKENS = 6


@pytest.fixture
def on_kernels(monkeypatch):
    """Puts the model on the emulated kernels; returns the names of the ops that ran in them."""

    def on_kernels():
        kernels, names = emulated.kernels(), set()
        call = kernels.call

        def counted(op, args):
            names.add(op.name)
            with emulated.one_schedule():
                return call(op, args)

        monkeypatch.setattr(kernels, "call", counted)
        monkeypatch.setattr(opset, "kernels", kernels)
        return names

    return on_kernels


def logits(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()


def errors(models, expected, ids, mask):
    """Mean absolute error of each token's logits."""
    pairs = zip(models, expected, strict=True)
    return torch.cat([(logits(model, ids, mask) - e).abs().mean(-1) for model, e in pairs])


CASES = ["e_series", "k_eq_v", "moe"]
LEFT_PADDED = torch.ones(2, 20, dtype=torch.long)
LEFT_PADDED[1, :7] = 0


@pytest.mark.parametrize("name", CASES)
def test_logits_are_as_close_as_the_eager_models(on_kernels, name):
    """A prompt beyond the window, over four models: no further from the fp32 model's logits than
    the eager twins'; the median, for a token may get another expert by the last bit of a logit."""
    ids, mask = tiny.ids(2, 20), LEFT_PADDED
    exact = [tiny.tiny(tiny.ALL[name], seed, **HEADS) for seed in range(4)]
    expected = [logits(model, ids, mask) for model in exact]
    models = [model.half() for model in exact]
    eager_error = errors(models, expected, ids, mask).median()
    on_kernels()
    assert errors(models, expected, ids, mask).median() <= 1.2 * eager_error


@pytest.mark.parametrize("name", CASES)
def test_generates_what_the_fp32_model_does(on_kernels, monkeypatch, name):
    """A left-padded batch, a prompt beyond the window, rings that wrap, keys in pages. Each token
    is the fp32 model's choice, or as good to within what 16 bits can tell; with all experts chosen,
    for another expert is another model."""
    options = tiny.ALL[name] | HEADS | ({"top_k_experts": 8} if name == "moe" else {})
    names = on_kernels()
    generated = (
        tiny.tiny(options)
        .half()
        .generate(tiny.ids(2, 20), attention_mask=LEFT_PADDED, max_new_tokens=NEW_TOKENS)
    )
    monkeypatch.undo()
    mask = F.pad(LEFT_PADDED, (0, NEW_TOKENS), value=1)
    with torch.no_grad():
        exact = tiny.tiny(options)(generated, attention_mask=mask).logits[:, -NEW_TOKENS - 1 : -1]
    chosen = exact.gather(-1, generated[:, -NEW_TOKENS:, None])
    assert (exact.amax(-1, keepdim=True) - chosen).max() < 0.05
    assert {"qkv_norm_rope_cache", "attention_prefill", "qkv_attention_decode", "geglu"} <= names
    assert ("ple_embed" in names) == (name == "e_series")
    assert len([n for n in names if n.startswith("moe_")]) == (5 if name == "moe" else 0)
