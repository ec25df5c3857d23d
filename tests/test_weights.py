"""Checkpoints: every spelling that is out there, and every way a file can be wrong."""

import copy
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import ALL, DENSE, E_SERIES, MOE, ids, tiny

import gemma4.checkpoint
from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig, Gemma4TextModel, demo

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


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("adapter_config.json", "is an adapter .*merge it"),
        ("pytorch_model.bin", "pytorch_model.bin.*pickled"),
        ("pytorch_model-00001-of-00002.bin", "pickled"),
        ("gemma-4-q4.gguf", "gguf.*llama.cpp"),
        ("model.fp16.safetensors", "it holds .model.fp16.safetensors"),
        ("tf_model.h5", "it holds .tf_model.h5"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_what_lies_there_instead_is_named(
    file: str, sentence: str, with_config: bool, tmp_path: Path
) -> None:
    (tmp_path / file).write_text("x")
    if with_config:
        tiny(DENSE).config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"holds no .*{sentence}"):
        load(tmp_path)
    if not file.endswith(".json"):
        with pytest.raises(FileNotFoundError, match=r"is a file.*not a checkpoint's folder"):
            load(tmp_path / file)


def test_lfs_pointers_are_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000000\n"
    for name in ("model.safetensors", "config.json"):
        tiny(DENSE).save_pretrained(tmp_path)
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
            load(tmp_path)


Table = dict[str, dict]


def described(change: Callable[[Table], object], folder: Path) -> Path:
    """A tiny checkpoint whose file describes its tensors otherwise; bytes are not touched."""
    tiny(DENSE).save_pretrained(folder)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    changed = change(table)
    header = changed if isinstance(changed, bytes) else json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return file


def entry(**change: object) -> Callable[[Table], None]:
    """Changes one tensor's entry; None takes the key away."""

    def changed(table: Table) -> None:
        table[NORM].update(change)
        table[NORM] = {key: value for key, value in table[NORM].items() if value is not None}

    return changed


def moved(bytes_: int) -> Callable[[Table], None]:
    def changed(table: Table) -> None:
        table[NORM]["data_offsets"] = [at + bytes_ for at in table[NORM]["data_offsets"]]

    return changed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (entry(dtype=None), "layers.3.*dtype.*got None"),
        (entry(dtype=5), "layers.3.*dtype.*got 5"),
        (entry(dtype="F33"), "layers.3.*dtype.*got 'F33'"),
        (entry(shape=None), "layers.3.*shape.*got None"),
        (entry(shape=[-64]), r"layers.3.*shape.*got \[-64\]"),
        (entry(shape=[64.0]), r"layers.3.*shape.*got \[64.0\]"),
        (entry(shape=[1] * 99 + [64]), "layers.3.*shape"),
        (entry(shape=[2**62, 2**62]), "layers.3.*as many bytes"),
        (entry(shape=[65]), "layers.3.*as many bytes as F32.*got 256"),
        (entry(dtype="F16"), "layers.3.*as many bytes as F16"),
        (entry(data_offsets=None), "layers.3.*data_offsets.*got None"),
        (entry(data_offsets=[0]), r"layers.3.*data_offsets.*got \[0\]"),
        (entry(data_offsets=[256, 0]), r"layers.3.*data_offsets.*got \[256, 0\]"),
        (entry(data_offsets=["0", "256"]), "layers.3.*data_offsets"),
        (moved(4), "must begin where the one before it ends"),
        (moved(-4), "must begin where the one before it ends"),
        (moved(10**15), "must begin where the one before it ends"),
        (lambda table: table.update({NORM: 5}), "layers.3.*described by an object, got 5"),
        (lambda table: table.pop(NORM) and None, "must begin where the one before it ends"),
        (lambda t: t.update({"a\nb": t.pop(NORM)}), r"'a\\nb' must have a name of .* printable"),
        (lambda t: t.update({"a" * 10**6: t.pop(NORM)}), "must have a name of at most 256"),
        (lambda _: b'{"a": 1, "a": 2}', "gives the key 'a' twice"),
        (lambda _: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (lambda _: b"[]", "must hold a JSON object"),
        (lambda _: b"not json", "not valid JSON"),
        (lambda _: b"{}", "must end with its last tensor"),
    ],
)
def test_damaged_tables_are_named(change: Callable, sentence: str, tmp_path: Path) -> None:
    file = described(change, tmp_path)
    with pytest.raises(ValueError, match=sentence) as error:
        load(tmp_path)
    assert str(error.value).startswith(str(file))


def test_bytes_after_the_last_tensor_are_named(tmp_path: Path) -> None:
    tiny(DENSE).save_pretrained(tmp_path)
    with (tmp_path / "model.safetensors").open("ab") as stream:
        stream.write(b"12345678")
    with pytest.raises(ValueError, match=r"model\.safetensors must end with its last tensor"):
        load(tmp_path)


@torch.no_grad()
def test_unaligned_tensors_load(tmp_path: Path) -> None:
    """A header of odd length is within the format."""
    tiny(DENSE).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip() + b" " * 3
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    assert torch.equal(load(tmp_path)(ids(1, 9)).logits, tiny(DENSE)(ids(1, 9)).logits)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"x": "../model.safetensors"}, ValueError, "must name a file of its folder, got '../m"),
        ({"x": "/etc/passwd"}, ValueError, "must name a file of its folder, got '/etc/passwd'"),
        ({"x": ".."}, ValueError, "must name a file of its folder"),
        ({"x": ""}, ValueError, "must name a file of its folder"),
        ({"x": 5}, ValueError, "must name a file of its folder, got 5"),
        ({"x": None}, ValueError, "must name a file of its folder, got None"),
        ({"x": ["model.safetensors"]}, ValueError, "must name a file of its folder"),
        ({"x": "absent.safetensors"}, FileNotFoundError, "lacks the shard 'absent.safetensors'"),
        (
            {"x": "link.safetensors"},
            ValueError,
            "link.safetensors is a link that leaves its folder",
        ),
        ({"x": "folder.safetensors"}, FileNotFoundError, "lacks the shard"),
    ],
)
def test_shards_lie_in_the_folder(change: dict, error: type, sentence: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny(DENSE).save_pretrained(folder, max_shard_size="400KB")
    tiny(DENSE).save_pretrained(tmp_path)
    (folder / "link.safetensors").symlink_to(tmp_path / "model.safetensors")
    (folder / "folder.safetensors").mkdir()
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] |= change
    index.write_text(json.dumps(table))
    with pytest.raises(error, match=sentence):
        load(folder)


def test_an_index_keeps_its_promises(tmp_path: Path) -> None:
    tiny(DENSE).save_pretrained(tmp_path, max_shard_size="400KB")
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    first = table["weight_map"][NORM]
    other = next(file for file in table["weight_map"].values() if file != first)
    index.write_text(json.dumps(table | {"weight_map": table["weight_map"] | {NORM: other}}))
    with pytest.raises(ValueError, match=rf"{other} lacks the tensor {NORM}"):
        load(tmp_path)
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 5}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index\.json is not an index of shards"):
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


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@torch.no_grad()
def test_another_dtype(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end inside of rows."""
    monkeypatch.setattr(gemma4.checkpoint.tensorfile, "PIECE_BYTES", 1000)
    model = tiny(MOE)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=dtype)
    kind = getattr(torch, dtype)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(kind)), name
    again.save_pretrained(tmp_path, max_shard_size=100_000)
    assert load(tmp_path).dtype == kind
    for name, tensor in load(tmp_path).state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@torch.no_grad()
def test_a_head_trained_apart_is_saved(tmp_path: Path) -> None:
    model = tiny(DENSE)
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings, "saving changes no model"
    again = load(tmp_path)
    assert torch.equal(again(ids(1, 9)).logits, model(ids(1, 9)).logits)
    theirs = transformers.Gemma4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(theirs(ids(1, 9)).logits, again(ids(1, 9)).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_files_are_what_other_readers_expect(tmp_path: Path) -> None:
    model = tiny(E_SERIES)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    read = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}
        read |= load_file(file)
    expected = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


@pytest.mark.parametrize("size", ["", "5XB", "0", "-5GB", "GB", 0, "5 apples"])
def test_sizes_of_shards(size: str | int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size must be"):
        tiny(DENSE).save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


class Wrapped(torch.Tensor):
    """What sharding and quantising libraries put in a tensor's place."""


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.ones(64, device="meta"), "Parameter on meta|Tensor on meta"),
        (torch.ones(64, dtype=torch.int8), "torch.int8"),
        (torch.ones(64).as_subclass(Wrapped), "Wrapped on cpu"),
    ],
)
def test_what_is_no_plain_tensor_is_not_saved(
    tensor: torch.Tensor, what: str, tmp_path: Path
) -> None:
    tiny(DENSE).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = tiny(DENSE)
    model.model.layers[3].input_layernorm.weight = torch.nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(
        ValueError, match=f"{NORM} must be a plain floating-point .* got .*({what})"
    ):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_saved_folder_is_complete(tmp_path: Path) -> None:
    model = load(demo.path())
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (demo.path() / name).read_bytes()
    assert load(tmp_path).generation_config == model.generation_config
    load(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    moved = load(tmp_path)
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    with pytest.warns(UserWarning, match=f"{tmp_path} is gone, and with it the tokenizer"):
        moved.save_pretrained(tmp_path.with_name("new"))
    assert not (tmp_path.with_name("new") / "tokenizer.json").exists()


@torch.no_grad()
def test_resized_tables_agree(tmp_path: Path) -> None:
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

load = Gemma4ForCausalLM.from_pretrained
load(sys.argv[1], dtype=sys.argv[3])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS:")
load(sys.argv[2], dtype=sys.argv[3])
print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no Linux")
@pytest.mark.parametrize(
    ("dtype", "most", "size"), [("float32", 0.1, "10MB"), ("bfloat16", 0.5, "5GB")]
)
def test_host_memory(dtype: str, most: float, size: str, tmp_path: Path) -> None:
    """Next to nothing where the file serves as it is, else the weights once, and small pieces."""
    options = dict(MOE, num_experts=32, hidden_size=256, moe_intermediate_size=256)
    model = tiny(options)
    model.save_pretrained(tmp_path, max_shard_size=size)
    tiny(DENSE).save_pretrained(tmp_path / "warm-up")
    command = [sys.executable, "-c", LOAD_AND_TELL_THE_PEAK, tmp_path / "warm-up", tmp_path, dtype]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    assert sum(sizes) > 1.5e8
    assert peak < most * sum(sizes) + 2e7
