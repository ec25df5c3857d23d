"""Adapters of PEFT on the model: the numbers that they give on transformers' class."""

from pathlib import Path

import peft
import pytest
import torch
from support import tiny
from support.pairs import NAMES, close, close_gradients, left_padded, pair
from torch import Tensor, nn

each = pytest.mark.parametrize("name", NAMES)
LORA = dict(task_type="CAUSAL_LM", r=3, lora_alpha=6)
ADAPTERS = {
    "attention": peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj", "o_proj"]),
    "mlp": peft.LoraConfig(**LORA, target_modules=["gate_proj", "up_proj", "down_proj"]),
    "all linear": peft.LoraConfig(**LORA, target_modules="all-linear"),
    "one of a pack": peft.LoraConfig(**LORA, target_modules=["k_proj", "up_proj"]),
    "experts": peft.LoraConfig(
        **LORA,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    ),
    "dora": peft.LoraConfig(**LORA, target_modules=["q_proj", "down_proj"], use_dora=True),
    "embeddings": peft.LoraConfig(**LORA, target_modules=["embed_tokens", "q_proj"]),
    "with the norms trained": peft.LoraConfig(
        **LORA, target_modules=["o_proj"], modules_to_save=["input_layernorm", "q_norm"]
    ),
    "ln tuning": peft.LNTuningConfig(
        task_type="CAUSAL_LM",
        target_modules=["post_attention_layernorm", "input_layernorm", "q_norm"],
    ),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}


def adapted(name: str, kind: str) -> list[peft.PeftModel]:
    """[theirs, ours] under the same adapter."""
    models = [peft.get_peft_model(model, ADAPTERS[kind]) for model in pair(name)]
    draw(models)
    return models


@torch.no_grad()
def draw(models: list[nn.Module]) -> None:
    """The same adapters in all models, none at its initial value."""
    drawn = {n: p for n, p in models[0].named_parameters() if p.requires_grad}
    for parameter in drawn.values():
        parameter.add_(0.2 * torch.randn_like(parameter))
    for model in models[1:]:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(drawn[name])


def logits(model: nn.Module) -> Tensor:
    batch = left_padded(11, 3)
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


CASES = [(n, kind) for n in NAMES for kind in ADAPTERS if kind != "experts" or n == "moe"]
every = pytest.mark.parametrize("name, kind", CASES, ids=lambda value: value)


@every
def test_adapters(name: str, kind: str) -> None:
    """The same modules adapted, the same logits, gradients, step, and the plain model beneath."""
    plain = logits(pair(name)[0])
    theirs, ours = adapted(name, kind)
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, ours)]
    assert trainable[1] == trainable[0]
    before = logits(theirs)
    close(logits(ours), before)
    assert (before - plain).abs().max() > 1e-3, "this adapter tests nothing"
    for model in (theirs, ours):
        model.train()
        model(**left_padded(11, 3)).loss.backward()
    close_gradients(ours, theirs)
    for model in (theirs, ours):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.eval()
    close(logits(ours), logits(theirs), 1e-4)
    if kind != "with the norms trained":
        with ours.disable_adapter():
            close(logits(ours), plain)


@pytest.mark.parametrize(
    "name, kind", [case for case in CASES if case[1] in ("all linear", "experts", "ia3", "dora")]
)
def test_merged(name: str, kind: str) -> None:
    """The adapter's numbers, of modules that are all plain again."""
    plain, (_, ours) = pair(name)[1], adapted(name, kind)
    expected = logits(ours)
    merged = ours.merge_and_unload()
    close(logits(merged), expected, 1e-4)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    assert merged.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["e_series", "moe"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """From one class into the other, both ways."""
    kind = "experts" if name == "moe" else "all linear"
    models = adapted(name, kind)
    expected = logits(models[0])
    for model, other, folder in zip(models, pair(name)[::-1], ("theirs", "ours"), strict=True):
        model.save_pretrained(tmp_path / folder)
        loaded = peft.PeftModel.from_pretrained(other, tmp_path / folder).eval()
        close(logits(loaded), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name, kind", [("e_series", "all linear"), ("moe", "experts")])
def test_generate(name: str, kind: str, padded: bool) -> None:
    ids = tiny.ids(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    theirs, ours = pair(name)
    plain = theirs.generate(ids, **options)
    theirs, ours = adapted(name, kind)
    expected = theirs.generate(input_ids=ids, **options)
    assert torch.equal(ours.generate(input_ids=ids, **options), expected)
    assert not torch.equal(expected, plain), "this adapter tests nothing"
    with ours.disable_adapter():
        assert torch.equal(ours.generate(input_ids=ids, **options), plain)


def test_two_adapters() -> None:
    """Added, switched between, and taken away again."""
    theirs, ours = adapted("e_series", "attention")
    for model in (theirs, ours):
        model.add_adapter("second", ADAPTERS["mlp"])
        model.set_adapter("second")
    draw([theirs, ours])
    results = {}
    for active in ("default", "second"):
        for model in (theirs, ours):
            model.set_adapter(active)
        results[active] = logits(theirs)
        close(logits(ours), results[active])
    assert (results["default"] - results["second"]).abs().max() > 1e-3
    ours.delete_adapter("second")
    ours.set_adapter("default")
    close(logits(ours), results["default"])
    close(logits(ours.unload()), logits(pair("e_series")[0]))


def test_without_a_task_type() -> None:
    options = dict(target_modules=["q_proj"], r=2, init_lora_weights=False)
    results = []
    for model in pair("dense"):
        torch.manual_seed(5)
        results.append(logits(peft.get_peft_model(model, peft.LoraConfig(**options))))
    close(results[1], results[0])


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_frozen_weights_under_checkpointing(options: dict) -> None:
    """Reentrant checkpoints need an input that wants a gradient, which PEFT asks the model for."""
    theirs, ours = pair("e_series")
    models = []
    # Reentrant ones lose gradients of shared keys in transformers, which here goes without.
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for model in (theirs, ours):
        models.append(peft.get_peft_model(model, ADAPTERS["all linear"]).train())
    draw(models)
    for model in models:
        model(**left_padded(11, 3)).loss.backward()
    close_gradients(models[1], models[0])


def test_prompts_before_the_input() -> None:
    """Embeddings in place of ids; `generate` says that it would leave them out."""
    models = []
    for model in pair("dense"):
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        models.append(peft.get_peft_model(model, config))
    draw(models)
    theirs, ours = models
    ids = tiny.ids(2, 9)
    outputs = [model(input_ids=ids, labels=ids) for model in (theirs, ours)]
    close(outputs[1].loss, outputs[0].loss)
    close(outputs[1].logits, outputs[0].logits)
    for output in outputs:
        output.loss.backward()
    close_gradients(ours, theirs)
    with pytest.raises((ValueError, RuntimeError), match="prepare_inputs_for_generation"):
        ours.generate(input_ids=ids, max_new_tokens=4)
