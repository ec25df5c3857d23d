"""Checkpoints: every spelling that is out there loads with the numbers that it holds."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import ALL, DENSE, E_SERIES, MOE, ids, tiny

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig, Gemma4TextModel

COUNTS = {
    "E2B": (4_628_569_344, 540),
    "E4B": (7_463_013_376, 665),
    "12B": (11_907_350_272, 666),
    "26B-A4B": (25_233_141_760, 657),
    "31B": (30_697_345_280, 832),
}
Tensors = dict[str, torch.Tensor]
load = Gemma4ForCausalLM.from_pretrained


def rewritten(folder: Path, change: Callable[[Tensors], Tensors], options: dict) -> torch.Tensor:
    """Saves a tiny model with its tensors changed; returns the model's logits before that."""
    model = tiny(options)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)
    with torch.no_grad():
        return model(ids(1, 9)).logits


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, 1): t for name, t in tensors.items()}


@pytest.mark.parametrize("name", COUNTS)
def test_preset_sizes(name: str) -> None:
    with torch.device("meta"):
        model = Gemma4ForCausalLM(Gemma4TextConfig.preset(name))
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    scalars = model.config.num_hidden_layers
    assert (model.num_parameters(), len(state)) == COUNTS[name]
    assert sum(v.numel() for v in state.values()) - scalars == COUNTS[name][0]


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
@pytest.mark.parametrize("size", ["50KB", "5GB"])
@torch.no_grad()
def test_round_trip(options: dict, size: str, tmp_path: Path) -> None:
    model = tiny(options)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "50KB")
    if size == "5GB":
        assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    again = load(tmp_path, ple_device="cpu")
    assert torch.equal(again(ids(1, 9)).logits, model(ids(1, 9)).logits)
    assert again.config == model.config and again.skipped == []
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert load(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
@torch.no_grad()
def test_prefixes_and_other_modalities(prefix: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        junk = {"model.vision_tower.x": torch.ones(2), "model.embed_audio.y": torch.ones(2)}
        return renamed("model.", prefix)(tensors) | junk

    logits = rewritten(tmp_path, change, E_SERIES)
    model = load(tmp_path)
    assert torch.equal(model(ids(1, 9)).logits, logits)
    assert sorted(model.skipped) == ["model.embed_audio.y", "model.vision_tower.x"]
    hidden = Gemma4TextModel.from_pretrained(tmp_path)(ids(1, 9)).last_hidden_state
    assert torch.equal(hidden, model.model(ids(1, 9)).last_hidden_state)


@pytest.mark.parametrize("infix", ["", "moe."])
@pytest.mark.parametrize("single", [False, True])
@torch.no_grad()
def test_experts_fused_or_one_by_one(infix: str, single: bool, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            stem = name.replace(".experts.", f".{infix}experts.")
            if not single or ".experts." not in name:
                found[stem] = tensor
                continue
            stem, _, part = stem.rpartition(".")
            rows = ["gate_proj", "up_proj"] if part == "gate_up_proj" else ["down_proj"]
            for e, matrix in enumerate(tensor):
                for row, piece in zip(rows, matrix.chunk(len(rows)), strict=True):
                    found[f"{stem}.{e}.{row}.weight"] = piece.clone()
        return found

    logits = rewritten(tmp_path, change, MOE)
    assert torch.equal(load(tmp_path)(ids(1, 9)).logits, logits)


@torch.no_grad()
def test_keys_of_borrowing_layers_are_ignored(tmp_path: Path) -> None:
    extra = "model.layers.5.self_attn.k_proj.weight"
    logits = rewritten(tmp_path, lambda t: t | {extra: torch.ones(32, 64)}, E_SERIES)
    model = load(tmp_path)
    assert torch.equal(model(ids(1, 9)).logits, logits) and model.skipped == [extra]


def test_a_head_in_a_tied_file(tmp_path: Path) -> None:
    def head(factor: float) -> Callable[[Tensors], Tensors]:
        return lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * factor}

    rewritten(tmp_path, head(1.0), DENSE)
    model = load(tmp_path)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    rewritten(tmp_path, head(2.0), DENSE)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load(tmp_path)


NORM = "model.layers.3.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: {n: x for n, x in t.items() if n != NORM}, r"1 tensors are missing.*layers\.3"),
        (lambda t: t | {NORM: torch.ones(3)}, r"safetensors.*layers\.3.*\[64\], got \[3\]"),
        (lambda t: t | {"model.layers.3.nonsense": torch.ones(3)}, "nonsense is not part"),
        (lambda t: t | {"language_model.model." + NORM[6:]: t[NORM].clone()}, "second time"),
        (lambda t: t | {NORM + "_scale": torch.ones(3)}, "quantised.*weight_scale"),
        (lambda t: t | {"model.layers.0.x.weight_packed": torch.ones(3)}, "quantised"),
        (lambda t: t | {NORM: torch.ones(64, dtype=torch.int8)}, "layers.3.*I8.*quantised"),
    ],
)
def test_wrong_tensors_are_named(change: Callable, sentence: str, tmp_path: Path) -> None:
    rewritten(tmp_path, change, DENSE)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path)


@pytest.mark.parametrize("store", ["models--a--b/blobs", "blobs"])
@torch.no_grad()
def test_the_hubs_cache_is_links(store: str, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / store
    tiny(DENSE).save_pretrained(snapshot, max_shard_size="400KB")
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert torch.equal(load(snapshot)(ids(1, 9)).logits, tiny(DENSE)(ids(1, 9)).logits)


@pytest.mark.parametrize("size", ["5GB", "400KB"])
def test_a_model_and_its_files_are_apart(size: str, tmp_path: Path) -> None:
    """Weights that are mapped files can be trained, and outlive what is done to the folder."""
    tiny(DENSE).save_pretrained(tmp_path, max_shard_size=size)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model, batch = load(tmp_path), ids(1, 9)
    untouched = load(tmp_path)
    with torch.no_grad():
        first = untouched(batch).logits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with torch.no_grad():
        trained = model(batch).logits
        assert not torch.equal(trained, first)
        model.save_pretrained(tmp_path, max_shard_size=size)  # over the files that both stand on
        assert torch.equal(untouched(batch).logits, first)
        assert torch.equal(load(tmp_path)(batch).logits, trained)
        shutil.rmtree(tmp_path)
        assert torch.equal(untouched(batch).logits, first)


@torch.no_grad()
def test_mapped_tensors_are_copied_one_by_one(tmp_path: Path) -> None:
    """A tensor of a mapped file has a storage of its own size, for all that goes by storages."""
    tiny(DENSE).save_pretrained(tmp_path)
    model = load(tmp_path)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    again = copy.deepcopy(model)
    again.model.norm.weight.zero_()
    assert torch.equal(model(ids(1, 9)).logits, tiny(DENSE)(ids(1, 9)).logits)
