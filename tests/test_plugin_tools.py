"""Tools around a model under the plug-in: losses and gradients as on plain transformers."""

import accelerate
import pytest
import torch
from plugged import (
    Calls,
    close,
    close_gradients,
    left_padding,
    plugin,
    small,
    small_models,
    some_ids,
    use_ops,
)
from plugged import way as way

from gemma4_kernels import ops

IDS, PADDING = some_ids(2, 11), left_padding(2, 11)
LABELS = IDS.masked_fill((PADDING == 0) | (PADDING.cumsum(1) == 1), -100)


def to_disk(model, folder):
    """Each module with parameters apart, but for the last layer, which stays."""
    owners = [name for name, module in model.named_modules() if [*module.parameters(recurse=False)]]
    last = f"model.layers.{len(model.model.layers) - 1}."
    places = {name: "cpu" if name.startswith(last) else "disk" for name in owners}
    places["model.rotary_emb"] = "cpu"
    places |= {name: "cpu" for name, _ in model.named_buffers() if "layer_scalar" in name}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def to_host(model, _):
    accelerate.cpu_offload(model, execution_device="cpu")


@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.parametrize("offload", [to_host, to_disk])
@small_models
@torch.no_grad()
def test_offloading(name, offload, enabled, way, tmp_path, monkeypatch):
    counted = Calls()
    use_ops(monkeypatch, counted)
    expected = small(name).generate(IDS[:1], max_new_tokens=4, eos_token_id=None)
    model = small(name)
    if enabled == "before":
        plugin.enable(model)
    offload(model, tmp_path)
    if enabled == "after":
        plugin.enable(model)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=4, eos_token_id=None), expected)
    assert model.model.layers[0].post_attention_layernorm.weight.is_meta
    if way == "as on a GPU":
        assert counted["rms_norm"] and counted["attention_decode"]
        assert "post_attention_layernorm has a forward of its own" in plugin.explain(model)


@pytest.mark.parametrize("reentrant", [False, True])
@small_models
def test_gradient_checkpointing(name, reentrant, monkeypatch):
    use_ops(monkeypatch, ops)
    theirs, ours = small(name), plugin.enable(small(name))
    for model in (theirs, ours):
        model.train().gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        model.enable_input_require_grads()
        model.loss = model(IDS, attention_mask=PADDING, labels=LABELS).loss
        model.loss.backward()
    close(ours.loss, theirs.loss)
    close_gradients(ours, theirs)
