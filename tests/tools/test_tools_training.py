"""Training with transformers' Trainer, accelerate and TRL's collator: their losses, their steps."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from support import tiny
from support.pairs import NAMES, close, close_gradients, left_padded, pair
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

each = pytest.mark.parametrize("name", NAMES)
STEPS, BATCH, WIDTH = 4, 2, 12


@pytest.fixture(autouse=True)
def no_state_of_others() -> Iterator[None]:
    yield
    forget_states()


def forget_states() -> None:
    """accelerate keeps one state a process, of the first Accelerator in it."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def rows(count: int, width: int = WIDTH) -> list[dict[str, Tensor]]:
    """Rows of different numbers of labels, so that the mean of means is not the mean; some begin
    with a label, which nothing predicts and nobody is to count."""
    ids = tiny.ids(count, width, seed=1)
    labels = ids.clone()
    for row in range(count):
        labels[row, : 3 * row % 8] = -100
    mask = torch.ones_like(ids)
    return [
        dict(input_ids=i, attention_mask=m, labels=n)
        for i, m, n in zip(ids, mask, labels, strict=True)
    ]


def trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    defaults = dict(
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    return Trainer(model, arguments, train_dataset=rows(16), eval_dataset=rows(3))


def losses(trainer: Trainer) -> Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def same_parameters(ours: nn.Module, theirs: nn.Module, tolerance: float = 2e-5) -> None:
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.detach(), expected[name].detach(), tolerance)


RECIPES = {
    "fp32": {},
    "accumulation": dict(gradient_accumulation_steps=2, per_device_train_batch_size=1),
    "checkpointing": dict(gradient_checkpointing=True),
    "checkpointing, reentrant": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
@pytest.mark.parametrize("recipe", RECIPES)
@each
def test_trainer(name: str, recipe: str, tmp_path: Path) -> None:
    theirs, ours = pair(name)
    options = RECIPES[recipe]
    # Without checkpoints: reentrant ones lose gradients of shared keys in transformers.
    plain = {key: value for key, value in options.items() if "checkpointing" not in key}
    runs = [trainer(theirs, tmp_path, **plain), trainer(ours, tmp_path, **options)]
    for run in runs:
        run.train()
    theirs, ours = runs
    close(losses(ours), losses(theirs))
    assert losses(ours).shape == (STEPS,) and losses(ours).diff().abs().max() > 1e-3
    same_parameters(ours.model, theirs.model)
    close(torch.tensor(ours.evaluate()["eval_loss"]), torch.tensor(theirs.evaluate()["eval_loss"]))
    predictions = [torch.from_numpy(run.predict(rows(3)).predictions) for run in runs]
    close(predictions[1], predictions[0], 1e-4)


@each
def test_trainer_in_bf16(name: str, tmp_path: Path) -> None:
    """Weights stay fp32; the losses follow, as far as two digits and other experts let them."""
    theirs, ours = pair(name)
    exact, run = trainer(theirs, tmp_path), trainer(ours, tmp_path, bf16=True)
    exact.train()
    run.train()
    close(losses(run), losses(exact), 2e-2)
    assert not torch.equal(losses(run), losses(exact))
    assert all(p.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trainer_saves_and_resumes(tied: bool, tmp_path: Path) -> None:
    """Half of the steps, a checkpoint, and the rest in another process's model."""
    options = dict(optim="adamw_torch", learning_rate=1e-3)
    overrides = {} if tied else dict(tie_word_embeddings=False)
    theirs, ours = pair("e_series", **overrides)
    whole = trainer(theirs, tmp_path / "theirs", **options)
    whole.train()
    saving = trainer(ours, tmp_path, save_strategy="steps", save_steps=2, **options)
    saving.train()
    fresh = type(ours)(ours.config).eval()
    resumed = trainer(fresh, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (fresh.lm_head.weight is fresh.model.embed_tokens.weight) == tied
    close(losses(resumed), losses(saving))
    close(losses(resumed), losses(whole), 1e-3)
    same_parameters(fresh, ours)


@each
def test_training_loss_by_items(name: str) -> None:
    theirs, ours = pair(name)
    batch = left_padded(11, 3)
    for items in (7, torch.tensor(30)):
        found, expected = (
            model(**batch, num_items_in_batch=items, use_cache=False).loss
            for model in (ours, theirs)
        )
        close(found, expected)
        found.backward()
        expected.backward()
    close_gradients(ours, theirs)


def test_tuples() -> None:
    theirs, ours = pair("e_series")
    batch = left_padded(11, 3)
    found = ours(**batch, return_dict=False, use_cache=False)
    expected = theirs(**batch, return_dict=False, use_cache=False)
    assert isinstance(found, tuple) and len(found) == len(expected)
    close(found[0], expected[0])
    real = batch["attention_mask"].bool()
    close(found[1][real], expected[1][real])
    loss, logits = ours(**batch, use_cache=False).to_tuple()
    assert torch.equal(loss, found[0]) and torch.equal(logits, found[1])
    states = ours.model(batch["input_ids"], return_dict=False, use_cache=False)
    assert isinstance(states, tuple) and states[0].shape == (2, 11, 64)


def test_attentions_are_refused_by_name() -> None:
    _, ours = pair("dense")
    for model in (ours, ours.model):
        with pytest.raises((ValueError, TypeError), match="output_attentions"):
            model(tiny.ids(1, 4), output_attentions=True)
        model(tiny.ids(1, 4), output_attentions=False)


@each
def test_training_with_a_cache(name: str) -> None:
    """The cache that a forward fills is no reason to lose its gradients."""
    ids = tiny.ids(2, 11)
    theirs, ours = pair(name)
    theirs.train()(ids, labels=ids, use_cache=False).loss.backward()
    output = ours.train()(ids, labels=ids, use_cache=True)
    output.loss.backward()
    close_gradients(ours, theirs)
    if output.cache is not None:
        theirs, ours = theirs.eval(), ours.eval()
        with torch.no_grad():
            step = ours(ids[:, :1], cache=output.cache).logits
            close(step, theirs(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:])


def test_a_cache_with_tokens_is_not_trained_through() -> None:
    """What it holds has no gradient, so that those of the keys' projections would be wrong."""
    _, ours = pair("dense")
    ids = tiny.ids(2, 11)
    with torch.no_grad():
        cache = ours(ids, use_cache=True).cache
    ours.train()
    with pytest.raises((RuntimeError, ValueError), match="cache"):
        ours(ids, labels=ids, cache=cache).loss.backward()


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@each
def test_gradient_checkpointing(name: str, options: dict | None) -> None:
    theirs, ours = pair(name)
    batch = left_padded(11, 3)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    assert ours.is_gradient_checkpointing
    for model in (theirs, ours):
        model.train()(**batch).loss.backward()
    close_gradients(ours, theirs)
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@each
def test_gradient_checkpointing_of_the_last_columns(name: str, reentrant: bool) -> None:
    """The layers before the cut are made again with all their tokens."""
    theirs, ours = pair(name)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (theirs, ours):
        logits = model.train()(tiny.ids(2, 11), logits_to_keep=3).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    close_gradients(ours, theirs)


def test_gradient_checkpointing_runs_layers_again() -> None:
    counts = []
    for model in pair("dense"):
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = Counter()
        model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda *_, calls=calls: calls.update(["down_proj"])
        )
        model(**left_padded(11, 3)).loss.backward()
        counts.append(calls["down_proj"])
    assert counts == [2, 2]


@each
def test_flattened_batches(name: str) -> None:
    """Sequences in one row, with the lengths that kernels take; also against each one alone."""
    theirs, ours = pair(name)
    sequences = [tiny.ids(1, width, seed=width)[0].tolist() for width in (7, 12, 3)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([dict(input_ids=ids) for ids in sequences])
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} <= batch.keys()
    found = ours(**batch, use_cache=False)
    close(found.loss, theirs(**batch, use_cache=False).loss)
    alone = [theirs(torch.tensor([ids])).logits for ids in sequences]
    close(found.logits, torch.cat(alone, 1))
    found.loss.backward()
    theirs(**batch, use_cache=False).loss.backward()
    close_gradients(ours, theirs)


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
@each
def test_weights_elsewhere(name: str, offload: Callable, tmp_path: Path) -> None:
    """Each module's weights come for its call alone; between calls there are none. accelerate looks
    them up in the state dict, where a tied head is not."""
    theirs, ours = pair(name, tie_word_embeddings=False)
    ids, options = tiny.ids(2, 9), dict(max_new_tokens=6, do_sample=False)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with torch.no_grad():
        logits = theirs(ids).logits
        where = [tmp_path] if offload is accelerate.disk_offload else []
        ours = offload(ours, *where, execution_device=torch.device("cpu"))
        assert ours.model.layers[0].self_attn.q_proj.weight.is_meta
        close(ours(ids).logits, logits)
    assert torch.equal(ours.generate(ids, **options), expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    """prepare, accumulate, backward, clip and step; unwrapped, it is the model again."""
    results = []
    for model in pair("e_series"):
        accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        loader = torch.utils.data.DataLoader(rows(8), batch_size=2)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        found = []
        for batch in loader:
            with accelerator.accumulate(prepared):
                output = prepared(**batch)
                accelerator.backward(output.loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                found.append(output.loss.detach())
        assert output.logits.dtype == torch.float32
        assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
        results.append(torch.stack(found))
        forget_states()
    close(results[1], results[0], 2e-5 if precision == "no" else 5e-3)


def test_generation_config_is_set_in_place() -> None:
    """As trainers and scripts do it; what may not be an argument may not be set."""
    theirs, ours = pair("dense")
    ids = tiny.ids(2, 9)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    stop = int(theirs.generate(ids, **options)[0, 11])
    for model in (theirs, ours):
        model.generation_config.eos_token_id = [stop]
        model.generation_config.pad_token_id = 5
    expected = theirs.generate(ids, **options)
    assert (expected == 5).any() and torch.equal(ours.generate(ids, **options), expected)
    with pytest.raises(ValueError, match="top_p must be"):
        ours.generation_config.top_p = 2.0
    with pytest.raises(AttributeError, match="no option num_beans"):
        ours.generation_config.num_beans = 4
