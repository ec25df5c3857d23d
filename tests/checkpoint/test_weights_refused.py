"""Every way that a checkpoint's files can be wrong, named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny import DENSE, ids, tiny

import gemma4.checkpoint
from gemma4 import Gemma4ForCausalLM

load = Gemma4ForCausalLM.from_pretrained
NORM = "model.layers.3.input_layernorm.weight"


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
    if file.endswith(".gguf"):
        with pytest.raises(ValueError, match=r"gguf is no GGUF file"):
            load(tmp_path / file)
    elif not file.endswith(".json"):
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
