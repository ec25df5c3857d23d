"""The shape of a Gemma 4 text model, with every field checked.

config_file.py reads its spellings, presets.py has the released sizes.
"""

import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from .config_file import FULL, SLIDING, read_fields
from .files import Json, finish, read_json, replacing, short, write_json
from .presets import RELEASED

DTYPES = ("float32", "bfloat16", "float16", "float64")
# Beyond any model, and small enough that a module tree of such sizes is made in no time on meta.
MOST_LAYERS, MOST_EXPERTS, MOST_SIZE, MOST_TOKENS = 1024, 2**16, 2**24, 2**31 - 1

_DEFAULT_ROPE: dict[str, Json] = {
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

    # What programs around a model look up in its config.
    model_type: ClassVar[str] = "gemma4_text"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    vocab_size: int = 262_144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    global_head_dim: int = 512
    num_global_key_value_heads: int | None = None
    layer_types: list[str] = None  # type: ignore[assignment]  # filled by __post_init__
    sliding_window: int = 512
    max_position_embeddings: int = 131_072
    rope_parameters: dict[str, Json] = None  # type: ignore[assignment]  # likewise
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
        self._check_sizes()
        if self.layer_types is None:
            self.layer_types = [
                FULL if (i + 1) % 6 == 0 else SLIDING for i in range(self.num_hidden_layers)
            ]
        self._check_layer_types()
        if self.layer_types[-1] != FULL:
            warnings.warn(
                f"the last layer must use {FULL}, got {self.layer_types[-1]}: it is forced",
                stacklevel=3,
            )
            self.layer_types[-1] = FULL
        self._check_switches()
        rope = _DEFAULT_ROPE if self.rope_parameters is None else self.rope_parameters
        self.rope_parameters = _checked_rope(rope, set(self.layer_types))
        self._check_options()

    def _check_sizes(self) -> None:
        if isinstance(self.sliding_window, (list, tuple)):
            raise ValueError(
                "sliding_window must be one number of keys, got the pair "
                f"{short(self.sliding_window)}"
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "global_head_dim",
        ):
            _check_integer(name, getattr(self, name), 1)
        _check_integer("num_hidden_layers", self.num_hidden_layers, 1, MOST_LAYERS)
        for name in ("sliding_window", "max_position_embeddings"):
            _check_integer(name, getattr(self, name), 1, MOST_TOKENS)
        for name in (
            "num_kv_shared_layers",
            "hidden_size_per_layer_input",
            "vocab_size_per_layer_input",
        ):
            _check_integer(name, getattr(self, name), 0)
        if self.num_global_key_value_heads is not None:
            _check_integer("num_global_key_value_heads", self.num_global_key_value_heads, 1)

    def _check_layer_types(self) -> None:
        if not isinstance(self.layer_types, (list, tuple)):
            raise ValueError(
                f"layer_types must be a list of {SLIDING} and {FULL}, got {short(self.layer_types)}"
            )
        self.layer_types = list(self.layer_types)
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must have one entry per layer, {self.num_hidden_layers}, "
                f"got {len(self.layer_types)}"
            )
        for kind in self.layer_types:
            if kind not in (SLIDING, FULL):
                raise ValueError(f"layer_types must hold {SLIDING} or {FULL}, got {short(kind)}")

    def _check_switches(self) -> None:
        for name in (
            "attention_bias",
            "attention_k_eq_v",
            "use_double_wide_mlp",
            "enable_moe_block",
            "tie_word_embeddings",
            "use_cache",
        ):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {short(value)}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, (list, tuple))
            for index in value if several else [] if value is None else [value]:
                _check_integer(name, index, 0, self.vocab_size - 1)
        name = self.dtype.removeprefix("torch.") if isinstance(self.dtype, str) else self.dtype
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {short(self.dtype)}")
        self.dtype = name

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
                f"hidden_activation must be gelu_pytorch_tanh, got {short(self.hidden_activation)}"
            )
        if self.use_bidirectional_attention not in (None, "all", "vision"):
            raise ValueError(
                "use_bidirectional_attention must be null, 'all' or 'vision', "
                f"got {short(self.use_bidirectional_attention)}"
            )
        _check_number("rms_norm_eps", self.rms_norm_eps, 1e-30, 1.0)
        _check_number("initializer_range", self.initializer_range, 0.0, 1e3)
        if self.final_logit_softcapping is not None:
            _check_number("final_logit_softcapping", self.final_logit_softcapping, 1e-6, 1e6)
        if self.hidden_size_per_layer_input and self.vocab_size_per_layer_input < 1:
            raise ValueError("hidden_size_per_layer_input needs a vocab_size_per_layer_input")
        if self.enable_moe_block:
            for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
                most = MOST_SIZE if name == "moe_intermediate_size" else MOST_EXPERTS
                _check_integer(f"enable_moe_block: {name}", getattr(self, name), 1, most)
            experts, chosen, _ = self.expert_sizes
            if chosen > experts:
                raise ValueError(
                    f"top_k_experts ({chosen}) must not exceed num_experts ({experts})"
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
        return next(i for i in reversed(range(first_shared)) if self.layer_types[i] == kind)

    def mlp_width(self, layer: int) -> int:
        """Feed-forward width: doubled on the layers that borrow keys if use_double_wide_mlp."""
        doubled = self.use_double_wide_mlp and self.kv_owner(layer) != layer
        return self.intermediate_size * (2 if doubled else 1)

    @property
    def expert_sizes(self) -> tuple[int, int, int]:
        """num_experts, top_k_experts and moe_intermediate_size of a model that has experts."""
        experts, chosen, width = self.num_experts, self.top_k_experts, self.moe_intermediate_size
        assert experts is not None and chosen is not None and width is not None
        return experts, chosen, width

    def get_text_config(self) -> "Gemma4TextConfig":
        """Itself: what programs ask a config for that may be a multimodal model's."""
        return self

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
    def from_dict(cls, data: Json) -> "Gemma4TextConfig":
        """From the contents of a config.json, multimodal (`text_config`) or not."""
        return cls(**read_fields(data, {field.name for field in fields(cls)}))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Gemma4TextConfig":
        """From a folder's config.json, or the keys of a .gguf file.

        ValueError names the file, the field, what it must be and what it is.
        """
        if Path(path).is_file():
            # Made of a config itself, and read by few.
            from .checkpoint import gguf

            return gguf.config_of(gguf.read_shards(Path(path)))
        file = Path(path) / "config.json"
        finish(Path(path))
        if not file.is_file():
            raise FileNotFoundError(f"{path} holds no config.json")
        data = read_json(file)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def to_dict(self) -> Json:
        """The flat spelling, ready for config.json."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"architectures": ["Gemma4ForCausalLM"], "model_type": self.model_type, **data}

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json into a folder, made if need be."""
        with replacing(Path(path)) as (staging, _):
            self.write(staging)

    def write(self, folder: Path) -> None:
        """Writes config.json into a folder that is there."""
        write_json(folder / "config.json", self.to_dict())

    @classmethod
    def preset(cls, name: str) -> "Gemma4TextConfig":
        """The released sizes: "E2B", "E4B", "12B", "26B-A4B", "31B"."""
        if name not in RELEASED:
            raise ValueError(f"preset must be one of {', '.join(RELEASED)}, got {name!r}")
        return cls(**RELEASED[name])


def _check_integer(name: str, value: object, least: int, most: int = MOST_SIZE) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer of {least} to {most}, got {short(value)}")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    # An integer beyond the floats fails the comparison, as NaN does.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{name} must be a number of {least:g} to {most:g}, got {short(value)}")


def _checked_rope(rope: object, kinds: set[str]) -> dict[str, Json]:
    """Each kind's rope parameters. What transformers would ignore without a word is refused."""
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters must map layer kinds to objects, got {short(rope)}")
    if unknown := set(rope) - {SLIDING, FULL}:
        raise ValueError(
            f"rope_parameters must have the keys {SLIDING} and {FULL}, "
            f"got {short(sorted(map(str, unknown)))}"
        )
    checked = {kind: _checked_rope_entry(kind, entry) for kind, entry in rope.items()}
    for kind in (SLIDING, FULL):
        if kind in kinds and kind not in checked:
            raise ValueError(f"rope_parameters must have the key {kind}, got {short(list(rope))}")
    return {**_DEFAULT_ROPE, **checked}


def _checked_rope_entry(kind: str, entry: object) -> Json:
    name = f"rope_parameters.{kind}"
    if not isinstance(entry, dict):
        raise ValueError(f"{name} must be an object, got {short(entry)}")
    entry = dict(entry)
    entry.setdefault("rope_type", entry.pop("type", "default"))
    if unknown := set(entry) - _ROPE_KEYS:
        raise ValueError(
            f"{name} must have no keys but {', '.join(sorted(_ROPE_KEYS))}, "
            f"got {short(sorted(map(str, unknown)))}"
        )
    if entry["rope_type"] not in ("default", "proportional"):
        raise ValueError(
            f"{name}.rope_type must be default or proportional, got {short(entry['rope_type'])}"
        )
    for key, least, most in (
        ("factor", 1e-6, 1e6),
        ("partial_rotary_factor", 1e-6, 1.0),
        ("rope_theta", 1.0, 1e15),
    ):
        if key in entry:
            _check_number(f"{name}.{key}", entry[key], least, most)
    if "rope_theta" not in entry:
        raise ValueError(f"{name}.rope_theta must be given, got {short(entry)}")
    if entry["rope_type"] == "default":
        for key in ("factor", "partial_rotary_factor"):
            if entry.get(key, 1) != 1:
                raise ValueError(
                    f"{name}.{key} must be 1 or absent where rope_type is default, got {entry[key]}"
                )
    return entry
