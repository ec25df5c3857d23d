"""Quantised weights that stay packed: the same numbers, in the form that kernels multiply."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.gguf_files import TYPE, write
from support.packers import COMPRESSED, FORMATS, Made, Rng, fp4, gptq, scaled, w4a16
from support.tiny import DENSE, E_SERIES, K_EQ_V, MOE, ids, tiny
from test_quantised import quantised

from gemma4 import Gemma4ForCausalLM
from gemma4.checkpoint import keep
from gemma4.checkpoint.gguf.blocks import QUANTS, Blocks
from gemma4.checkpoint.packed import Options, gathered, options_of, weight
from gemma4.checkpoint.tensorfile import read_table
from gemma4_kernels import packed as packing
from gemma4_kernels.packed_linear import PackedLinear, PackedParameter

load = Gemma4ForCausalLM.from_pretrained
pytestmark = pytest.mark.filterwarnings("ignore:.*is quantised")
FULL = ["full_attention"] * 2
WIDE = dict(hidden_size=128, intermediate_size=192, moe_intermediate_size=64)
LARGE_BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 64]}


def in_large_blocks(rng: Rng, rows: int, columns: int) -> Made:
    parts, _ = scaled(torch.float8_e4m3fn, "row", scale_name="weight_scale_inv")(rng, rows, columns)
    scale = torch.from_numpy(rng.uniform(0.005, 0.05, (-(-rows // 16), -(-columns // 64)))).float()
    parts["weight_scale_inv"] = scale
    full = scale.double().repeat_interleave(16, 0).repeat_interleave(64, 1)[:rows, :columns]
    return parts, parts["weight"].double().numpy() * full.numpy()


def symmetric(bits: int) -> object:
    """GPTQ whose zero points are all the middle of the range."""

    def pack(rng: Rng, rows: int, columns: int) -> Made:
        parts, _ = gptq(bits)(rng, rows, columns)
        middle = 2 ** (bits - 1)
        zero = torch.tensor((middle - 1) * sum(2 ** (bits * j) for j in range(32 // bits)))
        scale = parts["scales"].double().T[:, np.arange(columns) // 32].numpy()
        shifts = torch.arange(32 // bits) * bits
        words = parts["qweight"].T.contiguous()
        code = (words[..., None].long() >> shifts & (2**bits - 1)).flatten(1).numpy()
        parts["qzeros"] = torch.full_like(parts["qzeros"], int(zero.to(torch.int32)))
        return parts, (code - middle) * scale

    return pack


INT4_HALF = "int4 with fp16 scales of 32 columns"
# What stays packed, as what; the others have numbers that no form holds, or blocks across tiles.
FORMS = {
    "w4a16 in groups": "int4 with bf16 scales of 32 columns",
    "w4a16 in short last groups": "int4 with bf16 scales of 32 columns",
    "w4a16 in rows": "int4 with scales of rows",
    "w4a16 with zero points": "int8 with bf16 scales of 32 columns",
    "w8a16": "int8 with scales of rows",
    "int8": "int8 with scales of rows",
    "fp8 in rows": "fp8 with scales of rows",
    "fp8 in flat rows": "fp8 with scales of rows",
    "fp8 static": "fp8 with scales of rows",
    "nvfp4": "fp4 with e4m3 scales of 16 columns and scales of rows",
    "mxfp4": "fp4 with e8m0 scales of 32 columns",
    "nvfp4 of modelopt": "fp4 with e4m3 scales of 16 columns and scales of rows",
    "gptq": "int8 with fp16 scales of 32 columns",
    "awq": "int8 with fp16 scales of 32 columns",
    "int8 of bitsandbytes": "int8 with scales of rows",
    "int8 of torchao": "int8 with scales of rows",
    "fp8 of torchao": "fp8 with scales of rows",
    "mobile, 4 bits": "int4 with scales of rows",
    "mobile, 2 bits": "int4 with scales of rows",
    "mobile, 8 bits": "int8 with scales of rows",
}
MORE = {
    "fp8 in large blocks": (
        LARGE_BLOCKS,
        in_large_blocks,
        "fp8 with fp32 scales of tiles",
    ),
    "symmetric gptq": ({"quant_method": "gptq"}, symmetric(4), INT4_HALF),
    "symmetric gptq in 8 bits": (
        {"quant_method": "gptq"},
        symmetric(8),
        "int8 with fp16 scales of 32 columns",
    ),
    "w4a16 in groups of 16": (COMPRESSED, w4a16(16), None),
}
CASES = {name: (*case, FORMS.get(name)) for name, case in FORMATS.items()} | MORE


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_each_format(name: str, tmp_path: Path, monkeypatch) -> None:
    """In several pieces, the last one short."""
    monkeypatch.setattr(weight, "PIECE_BYTES", 1)
    config, pack, form = CASES[name]
    parts, dense = pack(np.random.default_rng(0), 272, 128)
    save_file({f"x.{role}": part for role, part in parts.items()}, tmp_path / "x.safetensors")
    options = options_of({"quantization_config": config}, "config")
    (packed,), _ = gathered(read_table(tmp_path / "x.safetensors"), options)
    kept = keep.read([(packed, 0)], (272, 128), torch.device("cpu"))
    if form is None:
        assert kept is None
        return
    assert kept is not None and keep.form_of(kept) == form
    wanted = torch.from_numpy(dense)
    error = (kept.dense().double() - wanted).abs()
    # Each of at most three products is rounded once.
    assert (error <= 3 * 2.0**-24 * wanted.abs()).all()


@pytest.mark.parametrize("kind", QUANTS)
def test_the_numbers_of_blocks(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values, block_bytes = gguf.GGML_QUANT_SIZES[TYPE[kind]]
    blocks = rng.integers(0, 256, (48 * 4, block_bytes)).astype(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(0, 250, len(blocks))
    else:
        blocks[:, :2] = rng.normal(size=len(blocks)).astype(np.float16)[:, None].view(np.uint8)
    save_file({"x": torch.from_numpy(blocks).view(48, -1)}, tmp_path / "x.safetensors")
    (entry,) = read_table(tmp_path / "x.safetensors")
    packed = Blocks("x", {kind: entry}, Options("gguf"), (48, 4 * values))
    kept = keep.read([(packed, 0)], (48, 4 * values), torch.device("cpu"))
    assert kept is not None
    wanted = gguf.quants.dequantize(blocks, TYPE[kind]).reshape(48, -1)
    assert np.array_equal(kept.dense().numpy(), wanted)


@pytest.mark.parametrize("options", [K_EQ_V | WIDE, MOE | WIDE], ids=["dense", "experts"])
@torch.no_grad()
def test_models(options: dict, tmp_path: Path) -> None:
    """One by one the formats take turns; experts have one each, for one op multiplies them all."""
    kinds, turn = [w4a16(32), fp4("ct"), scaled(torch.int8, "row")], iter(range(10**6))

    def pack(rng: Rng, rows: int, columns: int) -> Made:
        expert = rows == 64 or columns == 64
        return kinds[1 if expert else next(turn) % 3](rng, rows, columns)

    dense = quantised(tmp_path, pack, COMPRESSED, options)
    model = load(tmp_path)
    assert "stay packed" in model.quantized and "are unpacked to" not in model.quantized
    like = tiny(options)
    state = {k: torch.from_numpy(w).float() for k, w in dense.items()}
    like.load_state_dict(state, strict=False)
    given = ids(2, 9)
    torch.testing.assert_close(model(given).logits, like(given).logits, atol=2e-5, rtol=0)
    made = model.generate(given, max_new_tokens=5, do_sample=False)
    assert torch.equal(made, like.generate(given, max_new_tokens=5, do_sample=False))


@torch.no_grad()
def test_tables_stay_packed_and_tied(tmp_path: Path) -> None:
    """An embedding that is the head, and a table of per-layer inputs."""
    model = tiny(E_SERIES, hidden_size_per_layer_input=64, vocab_size=96)
    model.resize_token_embeddings(96)
    dense = write(tmp_path / "m.gguf", model, TYPE.Q8_0)
    made = load(tmp_path / "m.gguf", dtype="float32")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert isinstance(made.model.embed_tokens_per_layer.weight, PackedParameter)
    assert not any(name.startswith("lm_head") for name in made.state_dict())
    model.load_state_dict(dense, strict=False)
    given = ids(2, 9) % 96
    torch.testing.assert_close(made(given).logits, model(given).logits, atol=2e-5, rtol=0)
    made.bfloat16()
    assert made(given).logits.dtype == torch.bfloat16


def test_what_fits_no_tile_becomes_dense_and_is_named(tmp_path: Path) -> None:
    quantised(tmp_path, w4a16(32), COMPRESSED, dict(DENSE, intermediate_size=72))
    match = r"stay packed.*\(24 int4 with.*; 18 are unpacked.*mlp"
    with pytest.warns(UserWarning, match=match) as warned:
        model = load(tmp_path)
    assert model.quantized == str(warned[0].message)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj) is PackedLinear


@pytest.mark.parametrize(
    ("name", "dtype", "slow"),
    [
        ("w4a16 in groups", "bfloat16", 0),
        ("w8a16", "bfloat16", 0),
        ("w8a16", "float32", 14),
        ("fp8 in rows", "bfloat16", 14),
    ],
)
def test_what_a_cpu_unpacks_again_and_again(name, dtype, slow, tmp_path: Path) -> None:
    config, pack = FORMATS[name]
    quantised(tmp_path, pack, config, DENSE | WIDE | {"num_hidden_layers": 2, "layer_types": FULL})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = load(tmp_path, dtype=dtype)
    told = f"{slow} of them are unpacked again at each product"
    assert (told in model.quantized) == bool(slow)
    assert [str(each.message) for each in warned] == [model.quantized] * bool(slow)


def test_experts_of_unlike_forms_become_dense(tmp_path: Path) -> None:
    kinds, turn = [w4a16(32), w4a16(32, zeros=True)], iter(range(10**6))

    def pack(rng: Rng, rows: int, columns: int) -> Made:
        return kinds[next(turn) % 2](rng, rows, columns)

    dense = quantised(tmp_path, pack, COMPRESSED, MOE | WIDE)
    state = load(tmp_path).state_dict()
    for name, w in dense.items():
        if ".experts." in name:
            wanted = torch.from_numpy(w)
            assert ((state[name].double() - wanted).abs() <= 2.0**-22 * wanted.abs()).all()


def test_the_word_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'keep' or 'dequantize', got 'packed'"):
        load(tmp_path, quantized="packed")


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][2] is not None])
@torch.no_grad()
def test_what_was_kept_is_saved_and_loads_again(name: str, tmp_path: Path) -> None:
    """Codes and scales, bit by bit."""
    config, pack, _ = CASES[name]
    options = (MOE if name == "nvfp4" else DENSE) | WIDE | {"num_hidden_layers": 2}
    quantised(tmp_path / "a", pack, config, options | {"layer_types": DENSE["layer_types"][-2:]})
    model = load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").is_file()
    again = load(tmp_path / "b")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and any(n.endswith("codes") for n in before)
    for n, tensor in before.items():
        assert tensor.dtype == after[n].dtype, n
        assert torch.equal(tensor.view(torch.uint8), after[n].view(torch.uint8)), n
    given = ids(1, 5)
    assert torch.equal(again(given).logits, model(given).logits)


@torch.no_grad()
def test_tables_are_saved_and_load_again(tmp_path: Path) -> None:
    """Of a tied head, and beside them weights of other forms, which the config tells apart."""
    model = tiny(E_SERIES | WIDE, hidden_size_per_layer_input=64, vocab_size=96)
    model.resize_token_embeddings(96)
    write(tmp_path / "m.gguf", model, TYPE.Q8_0)
    made = load(tmp_path / "m.gguf")
    del made.folder  # which has no tokenizer
    q_proj = "model.layers.1.self_attn.q_proj.weight"
    codes = torch.randint(0, 16, made.get_submodule(q_proj).shape, dtype=torch.uint8)
    scales = torch.rand(len(codes), codes.shape[1] // 32).bfloat16()
    keep.install(made, q_proj, packing.pack(codes, scales), made.dtype)
    made.save_pretrained(tmp_path / "b")
    said = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "pack-quantized" and "model.layers.0.self_attn.q_proj" not in said
    first, second = said["config_groups"].values()
    assert first["targets"] == ["Linear"] and first["weights"]["num_bits"] == 8
    assert second["targets"] == [q_proj.removesuffix(".weight")]
    assert (second["weights"]["num_bits"], second["weights"]["group_size"]) == (4, 32)
    again, given = load(tmp_path / "b"), ids(1, 5) % 96
    assert torch.equal(again(given).logits, made(given).logits)


def test_what_no_format_stores_is_refused(tmp_path: Path) -> None:
    model = tiny(DENSE)
    name = "model.layers.0.mlp.up_proj.weight"
    shape = (96, 64)
    codes, rows = torch.zeros(shape, dtype=torch.int8), torch.ones(96)
    keep.install(
        model, name, packing.pack(codes, torch.ones(96, 2).bfloat16(), rows), torch.float32
    )
    with pytest.raises(ValueError, match=r"0\.mlp\.up_proj has scales of groups and of rows"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


LOAD_AND_TELL_THE_PEAK = """
import sys
import warnings
from pathlib import Path
from gemma4 import Gemma4ForCausalLM

def status(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name)[1].split()[0])

load = Gemma4ForCausalLM.from_pretrained
load(sys.argv[1], dtype="bfloat16")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS:")
load(sys.argv[2], dtype="bfloat16")
print(status("VmHWM:") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no Linux")
def test_host_memory(tmp_path: Path) -> None:
    """The packed weights, and less beside them than the largest one's dense form."""
    size = dict(hidden_size=512, intermediate_size=8192)
    write(tmp_path / "m.gguf", tiny(DENSE, **size), TYPE.Q4_0)
    write(tmp_path / "warm-up.gguf", tiny(DENSE), TYPE.Q4_0)
    command = [sys.executable, "-c", LOAD_AND_TELL_THE_PEAK]
    command += [str(tmp_path / "warm-up.gguf"), str(tmp_path / "m.gguf")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    packed, largest = (tmp_path / "m.gguf").stat().st_size, 2 * 512 * 8192
    assert packed > 4e7
    assert peak < 1.1 * packed + largest
