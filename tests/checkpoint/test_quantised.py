"""Quantised checkpoints: every format loads as the numbers that it stands for."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.packers import COMPRESSED, FORMATS, Made, Parts, Rng, w4a16
from support.tiny import K_EQ_V, MOE, ids, tiny

from gemma4 import Gemma4ForCausalLM
from gemma4.checkpoint.packed import gathered, options_of, weight
from gemma4.checkpoint.tensorfile import read_table

load = partial(Gemma4ForCausalLM.from_pretrained, quantized="dequantize")
pytestmark = pytest.mark.filterwarnings("ignore:.*is quantised")
Q = "model.layers.0.self_attn.q_proj"


def quantised(
    folder: Path,
    pack: Callable[[Rng, int, int], Made],
    config: dict,
    options: dict = K_EQ_V,
    change: Callable[[Parts], Parts] = lambda parts: parts,
) -> dict[str, np.ndarray]:
    """Saves a tiny model with packed linears and experts; returns what their weights stand for."""
    tiny(options).save_pretrained(folder)
    tensors, dense, rng = load_file(folder / "model.safetensors"), {}, np.random.default_rng(0)

    def put(name: str, shape: torch.Size) -> np.ndarray:
        parts, made = pack(rng, *shape)
        tensors.update({f"{name}.{role}": part for role, part in parts.items()})
        return made

    for name, x in list(tensors.items()):
        if name.endswith("_proj.weight"):
            del tensors[name]
            dense[name] = put(name.removesuffix(".weight"), x.shape)
        elif ".experts." in name:
            del tensors[name]
            stem, _, which = name.rpartition(".")
            rows = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
            dense[name] = np.stack(
                [
                    np.concatenate(
                        [
                            put(f"{stem}.{e}.{row}", piece.shape)
                            for row, piece in zip(rows, matrix.chunk(len(rows)), strict=True)
                        ]
                    )
                    for e, matrix in enumerate(x)
                ]
            )
    save_file(change(tensors), folder / "model.safetensors")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"quantization_config": config}))
    return dense


def check(folder: Path, dense: dict[str, np.ndarray]) -> Gemma4ForCausalLM:
    model = load(folder)
    state = model.state_dict()
    for name, w in dense.items():
        # Each of at most three products and sums is rounded once.
        wanted = torch.from_numpy(w)
        error = (state[name].double() - wanted).abs()
        assert (error <= 3 * 2.0**-24 * wanted.abs().clamp_min(1e-3)).all(), name
    return model


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_formats(name: str, tmp_path: Path) -> None:
    config, pack = FORMATS[name]
    dense = quantised(tmp_path, pack, config)
    model = check(tmp_path, dense)
    like = tiny(K_EQ_V)
    like.load_state_dict({k: torch.from_numpy(w).float() for k, w in dense.items()}, strict=False)
    given = ids(1, 9)
    torch.testing.assert_close(model(given).logits, like(given).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_pieces(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of several pieces, the last one short."""
    monkeypatch.setattr(weight, "PIECE_BYTES", 1)
    config, pack = FORMATS[name]
    parts, dense = pack(np.random.default_rng(0), 296, 96)
    save_file({f"x.{role}": part for role, part in parts.items()}, tmp_path / "x.safetensors")
    options = options_of({"quantization_config": config}, "config")
    (packed,), _ = gathered(read_table(tmp_path / "x.safetensors"), options)
    made, wanted = torch.empty(dense.shape), torch.from_numpy(dense)
    packed.fill(made)
    assert ((made.double() - wanted).abs() <= 3 * 2.0**-24 * wanted.abs().clamp_min(1e-3)).all()


@pytest.mark.parametrize("name", ["w4a16 in rows", "nvfp4", "fp8 in rows"])
def test_experts(name: str, tmp_path: Path) -> None:
    config, pack = FORMATS[name]
    check(tmp_path, quantised(tmp_path, pack, config, MOE | {"moe_intermediate_size": 32}))


def test_formats_in_one_file(tmp_path: Path) -> None:
    kinds = [FORMATS[name][1] for name in ("nvfp4", "fp8 in rows", "w4a16 in groups")]
    turn = iter(range(10**6))

    def pack(rng: Rng, rows: int, columns: int) -> Made:
        return kinds[next(turn) % 3](rng, rows, columns)

    check(tmp_path, quantised(tmp_path, pack, COMPRESSED))


def test_it_says_what_became_of_the_memory(tmp_path: Path) -> None:
    quantised(tmp_path, w4a16(32), COMPRESSED)
    with pytest.warns(UserWarning, match=r"compressed-tensors.*unpacked to torch\.float32"):
        load(tmp_path)


def test_activations_scales_are_passed_over(tmp_path: Path) -> None:
    extra = {
        f"{Q}.input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        f"{Q}.output_activation_scale": torch.tensor(1.0),
    }
    dense = quantised(tmp_path, w4a16(32), COMPRESSED, change=lambda t: t | extra)
    assert set(check(tmp_path, dense).skipped) == set(extra)


@torch.no_grad()
def test_what_was_loaded_is_saved_dense(tmp_path: Path) -> None:
    quantised(tmp_path / "a", w4a16(32), COMPRESSED)
    model = load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(tmp_path / "b")
    assert torch.equal(again(ids(1, 5)).logits, model(ids(1, 5)).logits)


def without(role: str) -> Callable[[Parts], Parts]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != f"{Q}.{role}"}


def put(role: str, value: torch.Tensor | Callable) -> Callable[[Parts], Parts]:
    def change(tensors: Parts) -> Parts:
        name = f"{Q}.{role}"
        made = value(tensors[name].clone()) if callable(value) else value
        return tensors | {name: made}

    return change


NAN = torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("w4a16 in groups", without("weight_scale"), "q_proj.*lacks.*weight_scale"),
        ("w4a16 in groups", without("weight_packed"), "q_proj is a quantised weight in a form"),
        ("w4a16 in groups", put("weight_shape", torch.tensor([64, 65])), "q_proj.*codes.*shape"),
        ("w4a16 in groups", put("weight_shape", torch.tensor([63, 64])), "q_proj.*codes.*shape"),
        ("w4a16 in groups", put("weight_scale", lambda s: s[:, :0]), "weight_scale.*groups"),
        ("w4a16 in groups", put("weight_scale", lambda s: s[1:]), "weight_scale.*64 rows"),
        ("w4a16 in groups", put("weight_scale", lambda s: s * NAN), "weight_scale.*finite"),
        ("w4a16 in groups", put("weight_scale", lambda s: s / 0), "weight_scale.*finite"),
        ("w4a16 out of order", put("weight_g_idx", lambda g: g + 1), "weight_g_idx.*2 groups"),
        ("w4a16 out of order", put("weight_g_idx", lambda g: g - 1), "weight_g_idx.*2 groups"),
        ("fp8 in rows", put("weight_scale", lambda s: s[1:]), "weight_scale.*rows, groups"),
        ("fp8 in rows", put("weight_scale", lambda s: s * NAN), "weight_scale.*finite"),
        ("nvfp4", put("weight_global_scale", torch.zeros(1)), "weight_global_scale.*divisor"),
        ("nvfp4", put("weight_scale", lambda s: s[:, 1:].contiguous()), "weight_scale.*shape"),
        ("mxfp4", put("weight_scale", lambda s: s * 0 + 255), "weight_scale.*finite"),
        ("nvfp4", without("weight_global_scale"), "q_proj.*form that is not known"),
        ("gptq out of order", put("g_idx", lambda g: g + 1), "g_idx.*2 groups"),
        ("gptq", put("scales", lambda s: s[:, 1:].contiguous()), "q_proj.*qzeros|q_proj.*scales"),
        ("awq", put("qzeros", lambda z: z[:, 1:].contiguous()), "qzeros.*shape"),
        ("nf4", put("weight.absmax", lambda s: s[1:]), "absmax.*shape"),
        ("nf4", without("weight.quant_map"), "q_proj.*lacks.*quant_map"),
        (
            "nf4",
            put("weight.quant_state.bitsandbytes__nf4", torch.tensor([91, 93], dtype=torch.uint8)),
            "quant_state.*JSON object|quant_state.*shape",
        ),
        ("mobile, 4 bits", put("weight", lambda w: w[:, 1:].contiguous()), r"q_proj.*\[64, 64\]"),
    ],
)
def test_damage_is_named(name: str, change: Callable, sentence: str, tmp_path: Path) -> None:
    config, pack = FORMATS[name]
    quantised(tmp_path, pack, config, change=change)
    for way in ("dequantize", "keep"):
        with pytest.raises(ValueError, match=sentence) as raised:
            load(tmp_path, quantized=way)
        assert "model.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"quant_method": "quanto"}, "quant_method.*quanto"),
        ({"quant_method": ["gptq"]}, "quant_method"),
        (5, "quantization_config must be an object"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format.*marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "version.*gemv"),
        ({"quant_method": "fp8", "weight_block_size": [0, 16]}, "block.*two sizes"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "block.*two sizes"),
    ],
)
def test_configs_that_are_not_known(config: object, sentence: str, tmp_path: Path) -> None:
    quantised(tmp_path, w4a16(32), COMPRESSED)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"quantization_config": config}))
    with pytest.raises(ValueError, match=rf"config\.json.*{sentence}"):
        load(tmp_path)
