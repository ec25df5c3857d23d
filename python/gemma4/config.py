"""The shape of a Gemma 4 text model, read from either spelling of config.json.

Published files name the full-attention layers' sizes in flat keys (`global_head_dim`,
`num_global_key_value_heads`); transformers 5.24 writes them as `per_layer_config`, a table of
overrides per layer. Both give the same object; `to_dict` writes the flat spelling, which every
reader knows. The table of released sizes takes this file past 400 lines.
"""

import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"

_DEFAULT_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
_ROPE_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}


@dataclass
class Gemma4TextConfig:
    """Sizes and switches of a Gemma 4 text model; the names are transformers' own.

    `layer_types` defaults to five sliding layers, then a full one. Raises ValueError, naming the
    key, for a combination that no model can have.
    """

    vocab_size: int = 262_144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    global_head_dim: int = 512
    num_global_key_value_heads: int | None = None
    layer_types: list[str] | None = None
    sliding_window: int = 512
    max_position_embeddings: int = 131_072
    rope_parameters: dict[str, dict[str, Any]] | None = None
    rms_norm_eps: float = 1e-6
    hidden_activation: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    use_bidirectional_attention: str | None = None
    hidden_size_per_layer_input: int = 256
    vocab_size_per_layer_input: int = 262_144
    enable_moe_block: bool = False
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.layer_types is None:
            self.layer_types = [
                FULL if (i + 1) % 6 == 0 else SLIDING for i in range(self.num_hidden_layers)
            ]
        self.layer_types = list(self.layer_types)
        self._check_sizes()
        if self.layer_types[-1] != FULL:
            warnings.warn(
                f"the last layer must use {FULL}, got {self.layer_types[-1]}: it is forced",
                stacklevel=3,
            )
            self.layer_types[-1] = FULL
        self.rope_parameters = _checked_rope(self.rope_parameters or _DEFAULT_ROPE)
        self._check_options()

    def _check_sizes(self) -> None:
        if isinstance(self.sliding_window, (list, tuple)):
            raise ValueError(
                f"sliding_window must be one number of keys, got the pair {self.sliding_window}"
            )
        for name in (
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
        ):
            _check_integer(name, getattr(self, name), 1)
        for name in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
            _check_integer(name, getattr(self, name), 0)
        if self.num_global_key_value_heads is not None:
            _check_integer("num_global_key_value_heads", self.num_global_key_value_heads, 1)
        _check_positive("rms_norm_eps", self.rms_norm_eps)
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must have one entry per layer, {self.num_hidden_layers}, "
                f"got {len(self.layer_types)}"
            )
        for kind in self.layer_types:
            if kind not in (SLIDING, FULL):
                raise ValueError(f"layer_types must hold {SLIDING} or {FULL}, got {kind!r}")

    def _check_options(self) -> None:
        for kind in (SLIDING, FULL):
            if self.head_size(kind) % 2:
                raise ValueError(f"the head size of {kind} must be even: {self.head_size(kind)}")
            if self.num_attention_heads % self.kv_heads(kind):
                raise ValueError(
                    f"num_attention_heads ({self.num_attention_heads}) must be a multiple of the "
                    f"KV heads of {kind} ({self.kv_heads(kind)})"
                )
        if self.hidden_activation != "gelu_pytorch_tanh":
            raise ValueError(
                f"hidden_activation must be gelu_pytorch_tanh, got {self.hidden_activation!r}"
            )
        if self.use_bidirectional_attention not in (None, "all", "vision"):
            raise ValueError(
                "use_bidirectional_attention must be null, 'all' or 'vision', "
                f"got {self.use_bidirectional_attention!r}"
            )
        if self.final_logit_softcapping is not None:
            _check_positive("final_logit_softcapping", self.final_logit_softcapping)
        if self.hidden_size_per_layer_input and self.vocab_size_per_layer_input < 1:
            raise ValueError("hidden_size_per_layer_input needs a vocab_size_per_layer_input")
        if self.enable_moe_block:
            for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
                _check_integer(f"enable_moe_block: {name}", getattr(self, name), 1)
            if self.top_k_experts > self.num_experts:
                raise ValueError(
                    f"top_k_experts ({self.top_k_experts}) must not exceed num_experts "
                    f"({self.num_experts})"
                )
        self._check_sharing()

    def _check_sharing(self) -> None:
        shared, layers = self.num_kv_shared_layers, self.num_hidden_layers
        if not 0 <= shared < layers:
            raise ValueError(
                f"num_kv_shared_layers must lie in 0..{layers - 1}, got {shared} (a model whose "
                "layers all borrow keys is a drafter: it runs on its target's cache alone)"
            )
        owned = self.layer_types[: layers - shared]
        for i in range(layers - shared, layers):
            if self.layer_types[i] not in owned:
                raise ValueError(
                    f"num_kv_shared_layers = {shared}: layer {i} ({self.layer_types[i]}) borrows "
                    "its keys, and no earlier layer of its kind owns any"
                )

    def head_size(self, kind: str) -> int:
        """Channels of a head on layers of `kind`."""
        return self.head_dim if kind == SLIDING else self.global_head_dim

    def kv_heads(self, kind: str) -> int:
        """KV heads on layers of `kind`; the global count applies under attention_k_eq_v alone."""
        if kind == FULL and self.attention_k_eq_v and self.num_global_key_value_heads:
            return self.num_global_key_value_heads
        return self.num_key_value_heads

    def kv_owner(self, layer: int) -> int:
        """The layer whose keys and values `layer` reads: itself, or the last owner of its kind."""
        first_shared = self.num_hidden_layers - self.num_kv_shared_layers
        if layer < first_shared:
            return layer
        kind = self.layer_types[layer]
        return max(i for i in range(first_shared) if self.layer_types[i] == kind)

    def mlp_width(self, layer: int) -> int:
        """Feed-forward width: doubled on the layers that borrow keys if use_double_wide_mlp."""
        doubled = self.use_double_wide_mlp and self.kv_owner(layer) != layer
        return self.intermediate_size * (2 if doubled else 1)

    @property
    def bidirectional(self) -> bool:
        """Whether text attends to what follows it; "vision" is causal for text."""
        return self.use_bidirectional_attention == "all"

    def window(self, kind: str) -> tuple[int, int]:
        """(keys visible at and before a query, keys after it); 0 and -1 mean no bound."""
        if kind == FULL:
            return 0, -1
        if self.bidirectional:
            # The reference: |i - j| <= W // 2 + 1.
            return self.sliding_window // 2 + 2, self.sliding_window // 2 + 1
        return self.sliding_window, -1

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Gemma4TextConfig":
        """From the contents of a config.json, multimodal (`text_config`) or not."""
        if "quantization_config" in data:
            method = data["quantization_config"].get("quant_method", "unknown")
            raise ValueError(f"quantised checkpoints are not supported (quant_method {method})")
        text = dict(data.get("text_config") or data)
        if text.get("attn_logit_softcapping"):
            raise ValueError("attn_logit_softcapping is not a Gemma 4 option")
        text["dtype"] = (
            text.get("dtype", text.get("torch_dtype") or data.get("dtype")) or "bfloat16"
        )
        if "tie_word_embeddings" in data:
            text.setdefault("tie_word_embeddings", data["tie_word_embeddings"])
        names = {field.name for field in fields(cls)}
        known = {name: value for name, value in text.items() if name in names}
        # transformers' unified text class has no PLE and leaves the keys out.
        if "unified" in str(text.get("model_type", "")):
            known.setdefault("hidden_size_per_layer_input", 0)
        known["hidden_size_per_layer_input"] = known.get("hidden_size_per_layer_input", 256) or 0
        known["num_kv_shared_layers"] = known.get("num_kv_shared_layers") or 0
        known.update(_per_layer(text))
        return cls(**known)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Gemma4TextConfig":
        """From a folder's config.json."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{path} holds no config.json")
        return cls.from_dict(read_json(file))

    def to_dict(self) -> dict[str, Any]:
        """The flat spelling, ready for config.json."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", **data}

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json into a folder, made if need be."""
        Path(path).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(path) / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def preset(cls, name: str) -> "Gemma4TextConfig":
        """The released sizes: "E2B", "E4B", "12B", "26B-A4B", "31B"."""
        if name not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {name!r}")
        return cls(**_PRESETS[name])


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, naming the file, if it holds none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return data


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _checked_rope(rope: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    checked = {}
    for kind in (SLIDING, FULL):
        entry = rope.get(kind, _DEFAULT_ROPE[kind]) if isinstance(rope, dict) else None
        if not isinstance(entry, dict):
            raise ValueError(f"rope_parameters must map {kind} to its parameters, got {rope!r}")
        entry = {"rope_type": "default", **entry}
        if unknown := set(entry) - _ROPE_KEYS:
            raise ValueError(f"rope_parameters[{kind}] has unknown keys: {sorted(unknown)}")
        if entry["rope_type"] not in ("default", "proportional"):
            raise ValueError(
                f"rope_parameters[{kind}]: rope_type must be default or proportional, "
                f"got {entry['rope_type']!r}"
            )
        entry.setdefault("rope_theta", _DEFAULT_ROPE[kind]["rope_theta"])
        part = entry.get("partial_rotary_factor", 1.0)
        for name in ("rope_theta", "factor", "partial_rotary_factor"):
            _check_positive(f"rope_parameters[{kind}]: {name}", entry.get(name, 1.0))
        if part > 1 or (entry["rope_type"] == "default" and part != 1):
            raise ValueError(
                f"rope_parameters[{kind}]: partial_rotary_factor must lie in (0, 1] and needs "
                f"rope_type proportional, got {part} with {entry['rope_type']}"
            )
        checked[kind] = entry
    return checked


def _per_layer(text: dict[str, Any]) -> dict[str, Any]:
    """`per_layer_config` as the flat keys; its layers must all be the full ones, and agree."""
    table = text.get("per_layer_config")
    if not table:
        return {}
    # Keys are decimal strings, zero-padded to the width of the layer count.
    try:
        overrides = {int(index): dict(entry) for index, entry in table.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"per_layer_config must map layer numbers to overrides, got {table!r}"
        ) from None
    first = next(iter(overrides.values()))
    kinds = text.get("layer_types")
    if kinds is not None:
        full = {i for i, kind in enumerate(kinds) if kind == FULL} | {len(kinds) - 1}
        if set(overrides) != full:
            raise ValueError(
                f"per_layer_config must cover the {FULL} layers {sorted(full)}, "
                f"got {sorted(overrides)}"
            )
    for index, entry in overrides.items():
        if entry != first or set(entry) - {"head_dim", "num_key_value_heads"}:
            raise ValueError(
                "per_layer_config may give head_dim and num_key_value_heads, the same on every "
                f"{FULL} layer, got {entry} on layer {index}"
            )
    flat = {"global_head_dim": first.get("head_dim", text.get("head_dim", 256))}
    if "num_key_value_heads" in first:
        flat["num_global_key_value_heads"] = first["num_key_value_heads"]
        if not text.get("attention_k_eq_v"):
            raise ValueError(
                "per_layer_config: num_key_value_heads on full layers needs attention_k_eq_v"
            )
    return flat


def _pattern(sliding: int, repeats: int) -> list[str]:
    return ([SLIDING] * sliding + [FULL]) * repeats


_E = dict(final_logit_softcapping=30.0, num_attention_heads=8)
_LARGE = dict(
    final_logit_softcapping=30.0,
    attention_k_eq_v=True,
    hidden_size_per_layer_input=0,
    sliding_window=1024,
    max_position_embeddings=262_144,
    use_bidirectional_attention="vision",
)
_PRESETS: dict[str, dict[str, Any]] = {
    "E2B": dict(
        **_E,
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        num_key_value_heads=1,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        layer_types=_pattern(4, 7),
    ),
    "E4B": dict(
        **_E,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=42,
        num_key_value_heads=2,
        num_kv_shared_layers=18,
        layer_types=_pattern(5, 7),
    ),
    "12B": dict(
        **_LARGE,
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=1,
        layer_types=_pattern(5, 8),
    ),
    "26B-A4B": dict(
        **_LARGE,
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        layer_types=_pattern(5, 5),
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "31B": dict(
        **_LARGE,
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
        layer_types=_pattern(5, 10),
    ),
}
