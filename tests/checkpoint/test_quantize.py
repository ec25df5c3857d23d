"""Checkpoints written in 4 and 8 bits: what is read back, and its error, in float64."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import ALL, DENSE, MOE, ids, tiny

from gemma4 import Gemma4ForCausalLM, demo
from gemma4 import quantize as module
from gemma4.cli import main
from gemma4.quantize import FORMATS, quantize
from gemma4_kernels.packed_linear import PackedLinear

load = partial(Gemma4ForCausalLM.from_pretrained, quantized="dequantize")
pytestmark = pytest.mark.filterwarnings("ignore:.*is quantised")
WHOLE = MOE | {"moe_intermediate_size": 32}
# The largest error of a weight beside the largest weight: half a step, or in 4 bits, where the
# largest ones are cut off if that makes the sum of squares less, what is cut off; and bf16's part.
STEPS = {"w4a16": 2 / 9 + 0.01, "w8a16": 1 / 254 + 0.004, "fp8": 2.0**-4 + 0.004}


def is_packed(name: str) -> bool:
    return "_proj" in name and "router" not in name and "norm" not in name


@pytest.mark.parametrize("options", [*ALL.values(), WHOLE], ids=[*ALL, "moe of whole groups"])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_near(options: dict, format: str, tmp_path: Path) -> None:
    model = tiny(options)
    model.save_pretrained(tmp_path / "a")
    report = quantize(tmp_path / "a", tmp_path / "b", format)
    made, before = load(tmp_path / "b").state_dict(), model.state_dict()
    assert made.keys() == before.keys()
    for name, w in before.items():
        packed = is_packed(name) or "per_layer_input_gate" in name
        if not packed or (format == "w4a16" and w.shape[-1] % 32):
            assert torch.equal(made[name], w), name
            continue
        most = w.flatten(0, -2).unflatten(1, (-1, 32 if format == "w4a16" else w.shape[-1]))
        most = most.abs().amax(-1, keepdim=True)
        error = (made[name] - w).abs().view(*most.shape[:-1], -1)
        assert (error <= STEPS[format] * most).all(), name
        assert not torch.equal(made[name], w)
        if format == "w4a16":
            groups = w.flatten(0, -2).unflatten(1, (-1, 32))
            step = most / 7
            plain = (groups / step).round() * step
            assert error.square().sum() < 0.99 * (plain - groups).square().sum()
    assert 0 < report.after_bytes < report.before_bytes and report.on_grid == 0
    assert all(0 < report.relative(key) < 0.2 for key in report.squares)


def test_the_error_that_is_told(tmp_path: Path) -> None:
    model = tiny(DENSE)
    model.save_pretrained(tmp_path / "a")
    report = quantize(tmp_path / "a", tmp_path / "b")
    made, before = load(tmp_path / "b").state_dict(), model.state_dict()
    for layer in range(6):
        names = [n for n in before if f"layers.{layer}." in n and is_packed(n)]
        error = sum(float((made[n].double() - before[n].double()).square().sum()) for n in names)
        whole = sum(float(before[n].double().square().sum()) for n in names)
        assert report.relative(f"layer {layer}") == pytest.approx((error / whole) ** 0.5, rel=1e-4)


def test_a_grid_of_training_is_recovered(tmp_path: Path) -> None:
    """Steps in bf16, levels -8..7, products rounded to bf16; some groups of small levels alone."""
    model, rng = tiny(DENSE, dtype="bfloat16").bfloat16(), torch.Generator().manual_seed(0)
    wanted = {}
    with torch.no_grad():
        for name, w in model.state_dict().items():
            if is_packed(name):
                rows, columns = w.shape
                level = torch.randint(-8, 8, (rows, columns // 32, 32), generator=rng)
                level[0, 0] = 0
                level[1, 0] = level[1, 0].clamp(-1, 1)
                level[2, 0] = level[2, 0] // 4 * 2
                step = torch.rand(rows, columns // 32, 1, generator=rng).mul(0.02).bfloat16()
                w.copy_((step.float() * level).bfloat16().flatten(1))
                wanted[name] = (step.float() * level).flatten(1)
    model.save_pretrained(tmp_path / "a")
    report = quantize(tmp_path / "a", tmp_path / "b")
    assert report.on_grid == report.tensors == len(wanted)
    made = load(tmp_path / "b", dtype="float32").state_dict()
    exact = sum(int((made[name] == w).sum()) for name, w in wanted.items())
    # Where bf16 holds two steps that give the same weights, either may be the one.
    assert exact > 0.95 * sum(w.numel() for w in wanted.values())
    for name, w in wanted.items():
        assert torch.equal(made[name].bfloat16(), w.bfloat16()), name


def test_one_weight_off_the_grid_is_enough(tmp_path: Path) -> None:
    w = torch.arange(-8, 8).repeat(4).view(1, 2, 32) * torch.tensor([0.5, 0.25])[None, :, None]
    assert torch.equal(module.on_grid(w), torch.tensor([[0.5, 0.25]]))
    w[0, 1, 3] += 0.1
    assert module.on_grid(w) is None


@torch.no_grad()
def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(WHOLE).save_pretrained(tmp_path / "a", max_shard_size="100KB")
    quantize(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    quantize(tmp_path / "a", tmp_path / "c")
    files = sorted(file.name for file in (tmp_path / "c").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert torch.equal(
        load(tmp_path / "b")(ids(1, 5)).logits, load(tmp_path / "c")(ids(1, 5)).logits
    )


def test_what_the_config_says(tmp_path: Path) -> None:
    tiny(WHOLE).save_pretrained(tmp_path / "a")
    quantize(tmp_path / "a", tmp_path / "b")
    said = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "pack-quantized")
    weights = said["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 32)
    names = load_file(tmp_path / "b" / "model.safetensors")
    assert "model.layers.0.experts.7.down_proj.weight_packed" in names
    assert "model.layers.0.router.proj.weight" in names and "re:.*router.*" in said["ignore"]


@pytest.mark.parametrize("format", ["w4a16", "int3"])
def test_what_cannot_be_quantised_is_refused(format: str, tmp_path: Path) -> None:
    model = tiny(DENSE)
    model.save_pretrained(tmp_path / "a")
    if format == "int3":
        with pytest.raises(ValueError, match="format must be one of w4a16, w8a16, fp8"):
            quantize(tmp_path / "a", tmp_path / "b", format)
        return
    with pytest.raises(ValueError, match="not quantised in place"):
        quantize(tmp_path / "a", tmp_path / "a")
    quantize(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match=r"model\.safetensors is quantised already.*_proj"):
        quantize(tmp_path / "b", tmp_path / "c")
    assert not list((tmp_path / "c").glob("*")) if (tmp_path / "c").exists() else True
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight must hold finite"):
        quantize(tmp_path / "a", tmp_path / "d")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_a_head_of_its_own(format: str, tied: bool, tmp_path: Path) -> None:
    """In eight bits, near the weight that it was made of; the embedding stays what it was."""
    model = tiny(DENSE, tie_word_embeddings=tied, vocab_size=96)
    model.save_pretrained(tmp_path / "a")
    quantize(tmp_path / "a", tmp_path / "b", format, head="8bit")
    made = load(tmp_path / "b")
    assert not made.config.tie_word_embeddings
    assert torch.equal(made.model.embed_tokens.weight, model.model.embed_tokens.weight)
    w, head = model.lm_head.weight, made.lm_head.weight
    step = STEPS["fp8" if format == "fp8" else "w8a16"]
    assert ((head - w).abs() <= step * w.abs().amax(1, keepdim=True)).all()
    assert not torch.equal(head, w)
    kept = load(tmp_path / "b", quantized="keep")
    assert type(kept.lm_head) is PackedLinear and kept.lm_head.weight.codes.dtype.itemsize == 1
    given = ids(1, 5) % 96
    torch.testing.assert_close(kept(given).logits, made(given).logits, atol=2e-5, rtol=0)
    said = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert "lm_head" not in said["ignore"]
    heads = [group for group in said["config_groups"].values() if group["targets"] != ["Linear"]]
    wanted = [] if format != "w4a16" else [(["re:.*lm_head"], 8)]
    assert [(group["targets"], group["weights"]["num_bits"]) for group in heads] == wanted
    with pytest.raises(ValueError, match="head must be '8bit' or None, got '4bit'"):
        quantize(tmp_path / "a", tmp_path / "c", format, head="4bit")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(demo.path()), str(tmp_path / "b"), "--format", "w8a16"]) == 0
    out = capsys.readouterr().out
    assert "layer 0: 0." in out and "GB became" in out
    words = ["generate", "It is", "--greedy", "--max-new-tokens", "4", "--model"]
    assert main([*words, str(tmp_path / "b")]) == 0
    said = capsys.readouterr()
    assert said.out.strip()
    assert "is quantised (compressed-tensors): " in said.err and "stay packed" in said.err
    assert main(["info", "--model", str(tmp_path / "b")]) == 0
    assert "quantised" in (said := capsys.readouterr().out) and "compressed-tensors" in said
    assert main([*words, str(tmp_path / "b"), "--dequantize"]) == 0
    assert "stay packed" not in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "b"), str(tmp_path / "c")]) == 2
    assert "quantised already" in capsys.readouterr().err
