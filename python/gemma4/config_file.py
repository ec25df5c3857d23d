"""What a config.json says of the text model, whichever of its spellings the file uses.

Published files name the full-attention layers' sizes in flat keys (`global_head_dim`,
`num_global_key_value_heads`); transformers 5.24 writes them as `per_layer_config`, a table of
overrides per layer. Multimodal files hold all of it under `text_config`.
"""

from .files import Json, short

SLIDING, FULL = "sliding_attention", "full_attention"

WHOLE_MODELS = ("gemma4", "gemma4_unified")
TEXT_MODELS = ("gemma4_text", "gemma4_unified_text")
# Older models' spellings of rope_parameters, and an option of Gemma 2: nothing here reads them.
_FOREIGN = (
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "attn_logit_softcapping",
)


def read_fields(data: Json, names: set[str]) -> Json:
    """The fields `names` of a Gemma4TextConfig, from a config.json's content.

    Raises ValueError, naming the key, for a model that is not Gemma 4's and for spellings that this
    package does not read. How its weights are quantised is for the loader to read.
    """
    text = data if data.get("text_config") is None else data["text_config"]
    if not isinstance(text, dict):
        raise ValueError(f"text_config must be an object, got {short(text)}")
    _check_model_type(data, WHOLE_MODELS if text is not data else WHOLE_MODELS + TEXT_MODELS)
    if text is not data:
        _check_model_type(text, TEXT_MODELS, "text_config.")
    for name in _FOREIGN:
        # Gemma 2 files write false or 0 for no cap.
        if text.get(name) is not None and not (name == "attn_logit_softcapping" and not text[name]):
            raise ValueError(
                f"{name} must be absent from a Gemma 4 config, got {short(text[name])}"
            )
    known = {name: value for name, value in text.items() if name in names}
    if "tie_word_embeddings" in data:
        known.setdefault("tie_word_embeddings", data["tie_word_embeddings"])
    dtypes = (
        text.get("dtype"),
        text.get("torch_dtype"),
        data.get("dtype"),
        data.get("torch_dtype"),
    )
    known["dtype"] = next((dtype for dtype in dtypes if dtype is not None), "bfloat16")
    # transformers' unified text class has no PLE and leaves the keys out.
    if "unified" in str(text.get("model_type", "")):
        known.setdefault("hidden_size_per_layer_input", 0)
    for name in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if name in known and known[name] is None:
            known[name] = 0
    return known | _per_layer(text)


def _check_model_type(part: Json, known: tuple[str, ...], where: str = "") -> None:
    kind = part.get("model_type")
    if kind is not None and kind not in known:
        raise ValueError(f"{where}model_type must be one of {', '.join(known)}, got {short(kind)}")


def _per_layer(text: Json) -> Json:
    """`per_layer_config` as the flat keys; its layers must all be the full ones, and agree."""
    table = text.get("per_layer_config")
    if "per_layer_config" not in text:
        return {}
    if not table:  # no layer differs from the others
        return {"global_head_dim": text.get("head_dim", 256), "num_global_key_value_heads": None}
    # Keys are decimal strings, zero-padded to the width of the layer count.
    try:
        overrides = {int(index): dict(entry) for index, entry in table.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"per_layer_config must map layer numbers to overrides, got {short(table)}"
        ) from None
    first = next(iter(overrides.values()))
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        full = {i for i, kind in enumerate(kinds) if kind == FULL} | {len(kinds) - 1}
        if set(overrides) != full:
            raise ValueError(
                f"per_layer_config must cover the {FULL} layers {short(sorted(full))}, "
                f"got {short(sorted(overrides))}"
            )
    for index, entry in overrides.items():
        if entry != first or set(entry) - {"head_dim", "num_key_value_heads"}:
            raise ValueError(
                "per_layer_config may give head_dim and num_key_value_heads, the same on every "
                f"{FULL} layer, got {short(entry)} on layer {index}"
            )
    flat = {"global_head_dim": first.get("head_dim", text.get("head_dim", 256))}
    if "num_key_value_heads" in first:
        flat["num_global_key_value_heads"] = first["num_key_value_heads"]
        if not text.get("attention_k_eq_v"):
            raise ValueError(
                "per_layer_config: num_key_value_heads on full layers needs attention_k_eq_v"
            )
    return flat
