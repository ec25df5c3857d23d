"""llama.cpp's files: blocks, configs, tokenizers and models equal what their own package makes."""

import struct
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.command import PROMPT, SHORT
from support.gguf_files import TYPE, write
from support.tiny import ALL, DENSE, E_SERIES, K_EQ_V, MOE, ids, tiny

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig, Gemma4Tokenizer, demo
from gemma4.checkpoint import folder
from gemma4.checkpoint.folder import resolve
from gemma4.checkpoint.gguf.blocks import BLOCKS
from gemma4.checkpoint.gguf.file import read_file
from gemma4.cli import main
from gemma4.quantize import quantize

load = partial(Gemma4ForCausalLM.from_pretrained, quantized="dequantize")
pytestmark = pytest.mark.filterwarnings("ignore:.*is quantised")
# Where a block keeps its fp16 numbers.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: BLOCKS[kind][0])
def test_blocks(kind: int) -> None:
    name, values, block_bytes, unpack = BLOCKS[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (257, block_bytes)).astype(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(0, 250, len(blocks))
    else:
        for at in HALVES.get(name, (0,)):
            numbers = rng.normal(size=len(blocks)).astype(np.float16)
            blocks[:, at : at + 2] = numbers[:, None].view(np.uint8)
    made = unpack(torch.from_numpy(blocks))
    assert made.shape == (257, values) and made.dtype == torch.float32
    wanted = gguf.quants.dequantize(blocks, TYPE(kind)).reshape(made.shape)
    assert np.array_equal(made.numpy(), wanted)


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0"])
@torch.no_grad()
def test_models(options: dict, kind: str, tmp_path: Path) -> None:
    """Experts' 24 columns are in no whole block, and stay plain."""
    model = tiny(options)
    dense = write(tmp_path / "m.gguf", model, TYPE[kind])
    made = load(tmp_path / "m.gguf", dtype="float32")
    config = made.config.to_dict() | {"dtype": "float32"}
    wanted = model.config.to_dict() | {"eos_token_id": made.config.eos_token_id}
    if not model.config.hidden_size_per_layer_input:
        wanted["vocab_size_per_layer_input"] = config["vocab_size_per_layer_input"]
    assert config == wanted
    state = made.state_dict()
    assert dense.keys() == state.keys()
    assert all(torch.equal(state[name], w) for name, w in dense.items())
    model.load_state_dict(dense, strict=False)
    assert torch.equal(made(ids(1, 9)).logits, model(ids(1, 9)).logits)


def test_experts_in_blocks(tmp_path: Path) -> None:
    model = tiny(MOE, moe_intermediate_size=32)
    dense = write(tmp_path / "m.gguf", model, TYPE.Q4_0)
    state = load(tmp_path / "m.gguf", dtype="float32").state_dict()
    assert all(torch.equal(state[name], w) for name, w in dense.items())


def test_a_tokenizer_is_made_of_the_keys(tmp_path: Path) -> None:
    model, own = load(demo.path()), Gemma4Tokenizer.from_pretrained(demo.path())
    write(tmp_path / "m.gguf", model, tokenizer=own)
    made = Gemma4Tokenizer.from_pretrained(tmp_path / "m.gguf")
    texts = [
        "It is a truth",
        "  two  spaces\n\n",
        "naïve 中文 🙂",
        "<|turn>user\nHi<turn|>",
        "a\tb",
    ]
    for text in texts:
        assert made.encode(text) == own.encode(text)
        assert made.decode(made.encode(text)) == own.decode(own.encode(text))
    chat = [{"role": "user", "content": "Hello"}]
    assert made.apply_chat_template(chat) == own.apply_chat_template(chat)
    assert made.turn_end_id in load(tmp_path / "m.gguf").generation_config.eos_ids


def test_the_command_line_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Gemma4Tokenizer.from_pretrained(demo.path())
    write(tmp_path / "m.gguf", load(demo.path()), TYPE.BF16, tokenizer)
    words = ["generate", PROMPT, "--greedy", *SHORT, "--dtype", "bfloat16"]
    said = []
    for more in ([], ["--model", str(tmp_path / "m.gguf")]):
        assert main([*words, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > len(PROMPT)
    assert main(["info", "--model", str(tmp_path / "m.gguf")]) == 0
    assert "m.gguf" in capsys.readouterr().out


def test_the_command_line_keeps_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Gemma4Tokenizer.from_pretrained(demo.path())
    write(tmp_path / "m.gguf", load(demo.path()), TYPE.Q8_0, tokenizer)
    words = ["generate", PROMPT, "--greedy", *SHORT, "--model", str(tmp_path / "m.gguf")]
    texts = []
    for more in ([], ["--dequantize"]):
        assert main([*words, "--dtype", "float32", *more]) == 0
        said = capsys.readouterr()
        texts.append(said.out)
        assert "m.gguf is quantised (gguf): " in said.err
        assert ("stay packed" in said.err) == (not more)
    assert texts[0] == texts[1] and len(texts[0]) > len(PROMPT)
    assert main(["info", "--model", str(tmp_path / "m.gguf")]) == 0
    assert " Q8_0" in capsys.readouterr().out


@torch.no_grad()
def test_what_was_loaded_is_saved_with_its_tokenizer(tmp_path: Path) -> None:
    own = Gemma4Tokenizer.from_pretrained(demo.path())
    write(tmp_path / "m.gguf", load(demo.path()), TYPE.Q8_0, own)
    model = load(tmp_path / "m.gguf")
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    given = torch.tensor([own.encode("It is a truth")])
    assert torch.equal(again(given).logits, model(given).logits)
    saved = Gemma4Tokenizer.from_pretrained(tmp_path / "saved")
    assert saved.encode("It is <turn|>") == own.encode("It is <turn|>")
    assert saved.templates == own.templates


@torch.no_grad()
def test_shards(tmp_path: Path) -> None:
    model = tiny(DENSE)
    write(tmp_path / "whole.gguf", model)
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    half = len(reader.tensors) // 2
    for number, tensors in enumerate((reader.tensors[:half], reader.tensors[half:]), 1):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05}-of-00002.gguf", "gemma4")
        writer.add_uint16("split.count", 2)
        for name, field in reader.fields.items():
            if number == 1 and name.startswith("gemma4."):
                writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:])
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data.copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    made = load(tmp_path / "m-00001-of-00002.gguf", dtype="float32")
    assert torch.equal(made(ids(1, 5)).logits, model(ids(1, 5)).logits)
    with pytest.raises(ValueError, match="first shard of 2"):
        load(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="lacks the shard m-00002-of-00002"):
        load(tmp_path / "m-00001-of-00002.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write(file, tiny(K_EQ_V), TYPE.Q4_0)
    return file.read_bytes()


def _count(at: int, value: int) -> tuple[int, bytes]:
    return at, struct.pack("<Q", value)


@pytest.mark.parametrize(
    ("at", "data", "sentence"),
    [
        (0, b"GGUX", "no GGUF file"),
        (4, struct.pack("<I", 9), "version 2 or 3, got 9"),
        (*_count(8, 2**60), "too short for"),
        (*_count(16, 2**60), "too short for"),
        (*_count(24, 2**62), "cut off inside its header"),
        (*_count(24, 2**20), "cut off inside its header"),
    ],
)
def test_a_header_that_lies(
    at: int, data: bytes, sentence: str, whole: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(whole[:at] + data + whole[at + len(data) :])
    with pytest.raises(ValueError, match=rf"m\.gguf.*{sentence}"):
        load(file)


def test_a_file_cut_off_anywhere_is_named(whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    for size in [0, 3, 23, *range(24, 4000, 97), len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"m\.gguf"):
            load(file)


def test_any_damaged_byte_is_an_error_with_the_files_name_or_none(
    whole: bytes, tmp_path: Path
) -> None:
    """The header alone: damaged weights are other weights."""
    file, end = tmp_path / "m.gguf", whole.index(b"blk.5")
    for at in range(0, end, 61):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            load(file)
        except (ValueError, FileNotFoundError) as error:
            assert "m.gguf" in str(error), at


def test_a_file_is_not_quantised_again(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(ValueError, match=r"not a \.gguf file: .*m\.gguf"):
        quantize(tmp_path / "m.gguf", tmp_path / "made")


def test_scales_that_are_not_finite_are_named(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write(file, tiny(DENSE), TYPE.Q4_0)
    tensor = next(t for t in read_file(file).tensors if t.name == "blk.3.ffn_up.weight")
    data = bytearray(file.read_bytes())
    data[tensor.entry.start : tensor.entry.start + 2] = np.float16("inf").tobytes()
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.gguf: tensor blk\.3\.ffn_up\.weight.*finite"):
        load(file)


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma4")
    writer.add_tensor("output_norm.weight", np.zeros((1, 84), np.uint8), raw_dtype=TYPE.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"output_norm\.weight.*type 10, which is not read"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("options", [E_SERIES, MOE], ids=["e_series", "moe"])
def test_a_file_of_another_model_is_refused(options: dict, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write(file, tiny(options))
    data = file.read_bytes().replace(b"\x06\0\0\0\0\0\0\0gemma4", b"\x06\0\0\0\0\0\0\0gemma3")
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.gguf: general\.architecture must be gemma4"):
        Gemma4TextConfig.from_pretrained(file)


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, the only one there is, and all shards of one; a choice is left to the user."""
    repos = {
        "some/one": ["README.md", "model-Q4_0.gguf", "mmproj-F16.gguf"],
        "some/shards": [f"Q8_0/model-0000{n}-of-00002.gguf" for n in (1, 2)],
        "some/many": ["config.json", "a.gguf", "b.gguf"],
        "some/both": ["config.json", "model.safetensors", "a.gguf"],
    }

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        there = tmp_path / repo
        for name in repos[repo]:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (there / name).parent.mkdir(parents=True, exist_ok=True)
                (there / name).touch()
        return str(there)

    def fetched(name: str) -> list[str]:
        found = resolve(name)
        below = tmp_path / name.partition(":")[0]
        assert found.is_relative_to(below)
        return sorted(str(x.relative_to(below)) for x in below.rglob("*") if x.is_file())

    monkeypatch.setattr(folder, "snapshot_download", snapshot_download)
    monkeypatch.setattr(folder, "list_repo_files", repos.__getitem__)
    assert fetched("some/one") == ["model-Q4_0.gguf"]
    assert fetched("some/shards") == repos["some/shards"]
    assert resolve("some/shards").name == "model-00001-of-00002.gguf"
    assert fetched("some/both") == ["config.json", "model.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"name one, as in some/many:a\.gguf \(.* b\.gguf"):
        resolve("some/many")
    assert fetched("some/many:b.gguf") == ["b.gguf", "config.json"]
    for absent in ("some/many:c.gguf", "some/many:../many/b.gguf"):
        with pytest.raises(FileNotFoundError, match="some/many holds no "):
            resolve(absent)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        resolve("some/many:a.bin")
