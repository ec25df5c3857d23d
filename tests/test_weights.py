"""Checkpoints: every spelling that is out there, and every way a file can be wrong."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ALL, DENSE, E_SERIES, MOE, ids, tiny

import gemma4.checkpoint.folder
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
def test_c01_prefixes_and_other_modalities(prefix: str, tmp_path: Path) -> None:
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
def test_m09_experts_fused_or_one_by_one(infix: str, single: bool, tmp_path: Path) -> None:
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
def test_k03_keys_of_borrowing_layers_are_ignored(tmp_path: Path) -> None:
    extra = "model.layers.5.self_attn.k_proj.weight"
    logits = rewritten(tmp_path, lambda t: t | {extra: torch.ones(32, 64)}, E_SERIES)
    model = load(tmp_path)
    assert torch.equal(model(ids(1, 9)).logits, logits) and model.skipped == [extra]


def test_c03_a_head_in_a_tied_file(tmp_path: Path) -> None:
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
def test_c06_wrong_tensors_are_named(change: Callable, sentence: str, tmp_path: Path) -> None:
    rewritten(tmp_path, change, DENSE)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path)


@pytest.mark.parametrize(("keep", "sentence"), [(-100, "inside tensor model"), (40, "header")])
def test_cut_files_are_named(keep: int, sentence: str, tmp_path: Path) -> None:
    tiny(DENSE).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{sentence}"):
        load(tmp_path)


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        load(tmp_path / "absent")
    tiny(DENSE).save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load(tmp_path)

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(gemma4.checkpoint.folder, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"owner/name.*no network"):
        load("owner/name")


@torch.no_grad()
def test_e05_resized_tables_agree(tmp_path: Path) -> None:
    model = tiny(E_SERIES)
    before = model(ids(1, 9)).logits
    model.resize_token_embeddings(101)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    # A product of another width may sum in another order.
    torch.testing.assert_close(again(ids(1, 9)).logits[..., :97], before, atol=1e-5, rtol=0)
    assert again(torch.tensor([[5, 100]])).logits.shape == (1, 2, 101)


LOAD_AND_TELL_THE_PEAK = """
import sys
from pathlib import Path
from gemma4 import Gemma4ForCausalLM

def status(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name)[1].split()[0])

Gemma4ForCausalLM.from_pretrained(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS:")
Gemma4ForCausalLM.from_pretrained(sys.argv[2])
print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no Linux")
@pytest.mark.parametrize("size", ["10MB", "5GB"])
def test_host_memory(size: str, tmp_path: Path) -> None:
    """The weights once, and one tensor's pages of a file, whatever the size of the file."""
    options = dict(MOE, num_experts=64, hidden_size=256, moe_intermediate_size=256)
    model = tiny(options)
    model.save_pretrained(tmp_path, max_shard_size=size)
    tiny(DENSE).save_pretrained(tmp_path / "warm-up")
    command = [sys.executable, "-c", LOAD_AND_TELL_THE_PEAK, tmp_path / "warm-up", tmp_path]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    assert sum(sizes) > 1e8
    assert peak < 1.1 * sum(sizes) + max(sizes)
