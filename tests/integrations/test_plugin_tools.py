"""Tools around a model under the plug-in: losses and gradients as on plain transformers."""

import accelerate
import datasets
import pytest
import tokenizers
import torch
import trl
from support.plugged import (
    Calls,
    close,
    close_gradients,
    left_padding,
    plugin,
    small,
    small_models,
    some_ids,
    transformers,
    use_ops,
)
from support.plugged import way as way

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


ROWS = [some_ids(1, length, seed=length)[0].tolist() for length in (5, 17, 9, 12, 7, 30, 4, 11)]
OPTIONS = dict(
    use_cpu=True,
    learning_rate=1e-2,
    logging_steps=1,
    num_train_epochs=1,
    per_device_train_batch_size=2,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
)


def fitted(trainer):
    """The losses of a run, and its model."""
    trainer.train()
    return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])


def trainer(model, folder, **options):
    rows = [dict(input_ids=row[:4], labels=row[:4]) for row in ROWS]
    arguments = transformers.TrainingArguments(folder, **OPTIONS, **options)
    return transformers.Trainer(model, arguments, train_dataset=rows)


def test_trainer(tmp_path):
    theirs, ours = small("ple"), plugin.enable(small("ple"))
    a, b = (fitted(trainer(m, tmp_path, gradient_accumulation_steps=2)) for m in (ours, theirs))
    close(a, b)
    for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@small_models
def test_trainer_in_bf16(name, tmp_path):
    theirs, ours = small(name), plugin.enable(small(name))
    exact = fitted(trainer(small(name), tmp_path))
    a, b = (fitted(trainer(model, tmp_path, bf16=True)) for model in (ours, theirs))
    rounding = torch.finfo(torch.bfloat16).eps / 2
    torch.testing.assert_close(a, exact, atol=0, rtol=rounding)
    torch.testing.assert_close(b, exact, atol=0, rtol=rounding)
    assert not torch.equal(b, exact), "nothing ran in bf16"


def tokenizer():
    """Of numbers, as TRL wants one though its rows are tokens already."""
    words = tokenizers.models.WordLevel({str(i): i for i in range(96)}, unk_token="0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="1", pad_token="0"
    )


def test_packing_of_trl(tmp_path, monkeypatch):
    use_ops(monkeypatch, ops)
    losses = []
    for model in (small("ple"), plugin.enable(small("ple"))):
        rows = datasets.Dataset.from_dict(dict(input_ids=ROWS))
        arguments = trl.SFTConfig(tmp_path, **OPTIONS, bf16=False, packing=True, max_length=32)
        packing = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer())
        batch = next(iter(packing.get_train_dataloader()))
        assert (batch["position_ids"] == 0).sum() > 2, "nothing is packed"
        losses.append(fitted(packing))
    close(*losses)


def test_flattening_collator(monkeypatch):
    """It hands on cu_seq_lens_q, max_length_q and others."""
    use_ops(monkeypatch, ops)
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([dict(input_ids=row) for row in ROWS[:4]])
    assert "cu_seq_lens_q" in batch and "max_length_q" in batch
    theirs, ours = small("moe"), plugin.enable(small("moe"))
    for model in (theirs, ours):
        model.loss = model(**batch, use_cache=False).loss
        model.loss.backward()
    close(ours.loss, theirs.loss)
    close_gradients(ours, theirs)
