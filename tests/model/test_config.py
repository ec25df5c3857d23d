"""config.json: what is accepted gives plain transformers' numbers, all else a sentence."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny import ids

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

E2B_LIKE = Path(__file__).parents[1] / "golden" / "e2b_like"
FLAT = json.loads((E2B_LIKE / "config_flat.json").read_text())
S, F = "sliding_attention", "full_attention"
ROPE = {
    S: {"rope_type": "default", "rope_theta": 10_000.0},
    F: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
GONE = object()


def rope(kind: str, **change: Any) -> dict[str, Any]:
    entry = {**ROPE[kind], **change}
    entry = {key: value for key, value in entry.items() if value is not GONE}
    return {"rope_parameters": {**ROPE, kind: entry}}


def folder_with(change: dict[str, Any], folder: Path) -> Path:
    data = {key: value for key, value in (FLAT | change).items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(data))
    shutil.copy(E2B_LIKE / "model.safetensors", folder)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_parameters": None},
        {"rope_parameters": ROPE},
        rope(S, rope_theta=777),
        rope(F, rope_theta=777.0, partial_rotary_factor=0.5),
        rope(F, factor=8.0),
        rope(F, partial_rotary_factor=GONE),
        rope(S, rope_type=GONE, type="default"),
        rope(F, rope_type=GONE, type="proportional"),
        rope(F, rope_type=GONE, partial_rotary_factor=GONE),
        rope(S, factor=1.0),
        {"quantization_config": None},
        {"dtype": GONE, "torch_dtype": "float32"},
        {"eos_token_id": [1, 5]},
        {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
        {"rms_norm_eps": 1e-5, "final_logit_softcapping": None},
        {"layer_types": None, "num_kv_shared_layers": 0, "use_double_wide_mlp": False},
        {"per_layer_config": {"4": {"head_dim": 16}, "9": {"head_dim": 16}}},
        {"model_type": "gemma4_text", "hidden_act": "silu", "mine": [1, {}]},
    ],
)
@torch.no_grad()
def test_the_numbers_of_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    folder_with(change, tmp_path)
    if change.get("layer_types", 0) is None:  # the file's layers are of other kinds
        options = {k: v for k, v in (FLAT | change).items() if v is not GONE}
        theirs = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**options)).eval()
        theirs.save_pretrained(tmp_path)
    theirs = transformers.Gemma4ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = Gemma4ForCausalLM.from_pretrained(tmp_path, dtype="float32")
    batch = ids(2, 20) % 96
    torch.testing.assert_close(ours(batch).logits, theirs(batch).logits, atol=2e-5, rtol=1e-5)


BOOLEANS = (
    "attention_bias",
    "attention_k_eq_v",
    "use_double_wide_mlp",
    "enable_moe_block",
    "tie_word_embeddings",
    "use_cache",
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "global_head_dim",
    "sliding_window",
    "max_position_embeddings",
    "num_kv_shared_layers",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
)
NUMBERS = ("rms_norm_eps", "initializer_range", "final_logit_softcapping")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        *((name, {name: value}) for name in BOOLEANS for value in ("false", 0, 1, "", [])),
        *((name, {name: value}) for name in SIZES for value in ("8", 8.5, True, -1, 2**31, [8])),
        *((name, {name: 10**30}) for name in SIZES),
        *((name, {name: 10**7}) for name in ("num_hidden_layers",)),
        *(
            (name, {name: value})
            for name in NUMBERS
            for value in ("1", math.nan, math.inf, -math.inf, -1.0, 1e300, 10**400, True, [1.0], {})
        ),
        ("rms_norm_eps", {"rms_norm_eps": None}),
        ("rms_norm_eps", {"rms_norm_eps": 0}),
        ("initializer_range", {"initializer_range": None}),
        ("final_logit_softcapping", {"final_logit_softcapping": 0}),
        *((name, {name: -1}) for name in ("pad_token_id", "bos_token_id", "eos_token_id")),
        *((name, {name: 96}) for name in ("pad_token_id", "bos_token_id", "eos_token_id")),
        *((name, {name: "1"}) for name in ("pad_token_id", "bos_token_id", "eos_token_id")),
        ("eos_token_id", {"eos_token_id": [1, 96]}),
        ("eos_token_id", {"eos_token_id": [1, None]}),
        ("pad_token_id", {"pad_token_id": [0]}),
        ("dtype", {"dtype": 5}),
        ("dtype", {"dtype": "int8"}),
        ("dtype", {"dtype": ["float32"]}),
        ("dtype", {"dtype": GONE, "torch_dtype": "half"}),
        ("layer_types", {"layer_types": 5}),
        ("layer_types", {"layer_types": "sliding_attention"}),
        ("layer_types", {"layer_types": [5] * 10}),
        ("layer_types", {"layer_types": [["x"]] * 10}),
        ("layer_types", {"layer_types": []}),
        ("text_config", {"text_config": 5}),
        ("text_config", {"text_config": [1]}),
        (
            "text_config.model_type",
            {"model_type": "gemma4", "text_config": {"model_type": "llama"}},
        ),
        ("model_type", {"model_type": "gemma3_text"}),
        ("model_type", {"model_type": "gemma4_assistant"}),
        ("model_type", {"model_type": 5}),
        ("model_type", {"model_type": ["gemma4"]}),
        ("hidden_activation", {"hidden_activation": "silu"}),
        ("hidden_activation", {"hidden_activation": None}),
        ("use_bidirectional_attention", {"use_bidirectional_attention": True}),
        ("use_bidirectional_attention", {"use_bidirectional_attention": ["all"]}),
        ("attn_logit_softcapping", {"attn_logit_softcapping": 50.0}),
        ("per_layer_config", {"per_layer_config": 5}),
        ("per_layer_config", {"per_layer_config": {"4": {"head_dim": 16}}}),
        ("rope_scaling", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("rope_theta", {"rope_theta": 5000.0}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("rope_parameters", {"rope_parameters": {}}),
        ("rope_parameters", {"rope_parameters": 5}),
        ("rope_parameters", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("rope_parameters", {"rope_parameters": {S: ROPE[S]}}),
        ("rope_parameters", {"rope_parameters": {F: ROPE[F]}}),
        ("rope_parameters", {"rope_parameters": {**ROPE, "chunked_attention": ROPE[F]}}),
        (f"rope_parameters.{S}", {"rope_parameters": {**ROPE, S: None}}),
        (f"rope_parameters.{S}", {"rope_parameters": {**ROPE, S: [1]}}),
        (f"rope_parameters.{S}", rope(S, high_freq_factor=4.0)),
        (f"rope_parameters.{S}.factor", rope(S, factor=8.0)),
        (f"rope_parameters.{S}.partial_rotary_factor", rope(S, partial_rotary_factor=0.5)),
        (f"rope_parameters.{S}.rope_type", rope(S, rope_type="yarn")),
        (f"rope_parameters.{S}.rope_type", rope(S, rope_type=["default"])),
        (f"rope_parameters.{S}.rope_theta", rope(S, rope_theta=GONE)),
        *(
            (f"rope_parameters.{F}.{key}", rope(F, **{key: value}))
            for key in ("rope_theta", "factor", "partial_rotary_factor")
            for value in (math.nan, math.inf, -1.0, 0, "1", 1e300, None, True, [])
        ),
        (f"rope_parameters.{F}.partial_rotary_factor", rope(F, partial_rotary_factor=1.5)),
    ],
)
def test_one_sentence_names_file_and_field(
    field: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder_with(change, tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/config.json: ")) as error:
        Gemma4TextConfig.from_pretrained(tmp_path)
    said = str(error.value)
    assert field in said and len(said) < 400 and "\n" not in said
    with pytest.raises(ValueError, match=re.escape(said)):
        Gemma4ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 2**24),
        ("head_dim", 2**24),
        ("num_hidden_layers", 1000),
        ("hidden_size", 10**6),
    ],
)
def test_sizes_are_compared_before_memory_is_asked_for(
    field: str, value: int, tmp_path: Path
) -> None:
    change = {field: value}
    if field == "num_hidden_layers":
        change["layer_types"] = None
    folder_with(change, tmp_path)
    with pytest.raises(ValueError, match=r"config\.json|model\.safetensors: tensor"):
        Gemma4ForCausalLM.from_pretrained(tmp_path)
