"""What save_pretrained writes, and the memory that loading it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from support.tiny import DENSE, E_SERIES, MOE, ids, tiny

import gemma4.checkpoint
from gemma4 import Gemma4ForCausalLM, demo

load = Gemma4ForCausalLM.from_pretrained
NORM = "model.layers.3.input_layernorm.weight"


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
