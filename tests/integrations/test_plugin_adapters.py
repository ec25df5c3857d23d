"""PEFT's adapters on models under the plug-in: outputs and gradients as on plain transformers."""

import copy
import pickle

import peft
import pytest
import torch
from support.plugged import close, close_gradients, left_padding, plugin, small, some_ids, use_ops
from support.plugged import way as way

from gemma4_kernels import ops

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = [
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "q_norm",
    "k_norm",
]
CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(target_modules=LINEARS, task_type="CAUSAL_LM"),
    "LoRA on everything": lambda: peft.LoraConfig(target_modules="all-linear"),
    "LoRA on experts": lambda: peft.LoraConfig(
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    ),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=NORMS, task_type="CAUSAL_LM"),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}
IDS, PADDING = some_ids(2, 11), left_padding(2, 11)


def adapted(config, name, enabled):
    """Enabled before or after PEFT put its modules in, or not at all."""
    model = small(name)
    if enabled == "before":
        plugin.enable(model)
    torch.manual_seed(7)
    model = peft.get_peft_model(model, config())
    with torch.no_grad():  # adapters begin as nothing
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return plugin.enable(model) if enabled == "after" else model


@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.parametrize("config", CONFIGS)
def test_adapters(config, enabled, monkeypatch):
    use_ops(monkeypatch, ops)
    name = "moe" if "experts" in config else "ple"
    theirs, ours = (adapted(CONFIGS[config], name, e) for e in (None, enabled))
    labels = IDS.masked_fill((PADDING == 0) | (PADDING.cumsum(1) == 1), -100)
    for model in (theirs, ours):
        model.loss = model.train()(IDS, attention_mask=PADDING, labels=labels).loss
        model.loss.backward()
    close(ours.loss, theirs.loss)
    close_gradients(ours, theirs)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in ours.parameters())
    a, b = (
        m.eval().generate(input_ids=IDS[:1], max_new_tokens=4, eos_token_id=None)
        for m in (ours, theirs)
    )
    assert torch.equal(a, b)


def test_explain_copies_and_disable_with_adapters(way, monkeypatch):
    use_ops(monkeypatch, ops)
    for config in ("LoRA on experts", "LN tuning"):
        model = adapted(CONFIGS[config], "moe", "after")
        with torch.no_grad():
            logits = model(IDS).logits
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                close(other(IDS).logits, logits)
                plugin.disable(other)
                close(other(IDS).logits, logits)
        lines = plugin.explain(model).splitlines()
        assert len(lines) == 2
        if way == "as on a GPU" and config == "LN tuning":
            for line in lines:
                assert "queries and keys (q_norm is a LNTuningLayer)" in line
                assert "post_attention_layernorm is a LNTuningLayer" in line
