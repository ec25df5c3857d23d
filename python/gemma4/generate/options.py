"""What `generate` can be told, and what it refuses by name."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..files import Json, read_json, replacing, write_json

DEFAULT_NEW_TOKENS = 256
# Below it, one fp32 rounding of a logit of 10 already decides, and dividing by it may overflow.
LEAST_TEMPERATURE = 1e-6


@dataclass
class GenerationConfig:
    """How to choose tokens and when to stop; read from generation_config.json.

    Names and meanings are transformers'. Every field is an argument of `generate` too, where None
    means: as the model's configuration says.

    max_new_tokens, else what max_length leaves beside the prompt, else 256; min_new_tokens must
    come before an eos_token_id (one id or several) may. Ended rows are filled with pad_token_id.
    stop_strings: one or several; a row ends with the token that completes one (needs `tokenizer`).
    repetition_penalty divides positive logits of the tokens that a row holds, and multiplies
    negative ones. do_sample: draw from softmax(logits / temperature), of the top_k best tokens
    (0: all), of the best that make up top_p, and of those at least min_p times as probable as the
    best; a temperature below 1e-6 is greedy. num_return_sequences: continuations of each prompt.
    return_dict_in_generate: a `GenerateOutput`, with output_scores and output_logits on demand.

    Raises ValueError, naming the option, for one of a wrong type or out of range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = 0
    stop_strings: str | list[str] | None = None
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _RULES:
            raise AttributeError(f"generate has no option {name}")
        holds, rule = _RULES[name]
        optional = getattr(type(self), name) is None or name == "pad_token_id"
        if not (optional and value is None) and not holds(value):
            raise ValueError(f"{name} must be {rule}, got {value!r}")
        super().__setattr__(name, value)

    @property
    def eos_ids(self) -> list[int]:
        eos = self.eos_token_id
        return list(eos) if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]

    @property
    def stops(self) -> list[str]:
        stops = self.stop_strings
        return [stops] if isinstance(stops, str) else list(stops or [])

    @property
    def samples(self) -> bool:
        return self.do_sample and self.temperature >= LEAST_TEMPERATURE

    def new_tokens(self, width: int) -> int:
        """How many tokens may follow a prompt of `width`; ValueError if max_length leaves none."""
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens or DEFAULT_NEW_TOKENS
        if self.max_length <= width:
            raise ValueError(
                f"max_length must exceed the prompt's {width} tokens, got {self.max_length}"
            )
        return self.max_length - width

    def check(self, vocab_size: int, width: int) -> None:
        """Raises ValueError for ids beyond the vocabulary and options that exclude each other."""
        pad = [] if self.pad_token_id is None else [self.pad_token_id]
        for name, ids in (("eos_token_id", self.eos_ids), ("pad_token_id", pad)):
            for index in ids:
                if index >= vocab_size:
                    raise ValueError(f"{name} must lie in 0..{vocab_size - 1}, got {index}")
        new = self.new_tokens(width)
        if (self.min_new_tokens or 0) > new:
            raise ValueError(
                f"min_new_tokens must be at most the {new} tokens that may be made, "
                f"got {self.min_new_tokens}"
            )
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                "num_return_sequences above 1 needs do_sample=True: greedy ones are all the same"
            )
        for name in ("output_scores", "output_logits"):
            if getattr(self, name) and not self.return_dict_in_generate:
                raise ValueError(f"{name} needs return_dict_in_generate=True")

    def updated(self, given: Mapping[str, object]) -> "GenerationConfig":
        """With the options in `given` that are not None; a length there replaces both lengths."""
        changes: Json = {name: value for name, value in given.items() if value is not None}
        if changes.keys() & {"max_new_tokens", "max_length"}:
            changes = {"max_new_tokens": None, "max_length": None, **changes}
        return replace(self, **changes)

    def updated_from(self, folder: Path) -> "GenerationConfig":
        """With what the folder's generation_config.json says, if there is one.

        Raises ValueError, naming the file, for what `generate` would not take as an argument; what
        it does not know at all is passed over, with a warning if it would change the answer.
        """
        file = folder / "generation_config.json"
        if not file.is_file():
            return self
        given = read_json(file)
        for name, value in given.items():
            if name in _NOT_TAKEN and not _changes_nothing(name, value):
                warnings.warn(f"{file}: {_refusal(name)}", stacklevel=2)
        try:
            return self.updated({name: given[name] for name in given if name in _RULES})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def save_pretrained(self, path: str | Path) -> None:
        """Writes generation_config.json into a folder, made if need be."""
        data = {name: value for name, value in asdict(self).items() if value is not None}
        with replacing(Path(path)) as (staging, _):
            write_json(staging / "generation_config.json", data)


class Configured(Protocol):
    """transformers' configuration."""

    def to_dict(self) -> Json: ...


def chosen(
    own: GenerationConfig,
    passed: GenerationConfig | Configured | None,
    given: Mapping[str, object],
) -> GenerationConfig:
    """The model's `own` options, under those of a `passed` configuration (this class or
    transformers'), under the `given` arguments.

    Raises TypeError for an option that nobody knows, ValueError for one that is not taken.
    """
    if isinstance(passed, GenerationConfig):
        own = (
            passed
            if passed.eos_token_id is not None
            else passed.updated({"eos_token_id": own.eos_token_id})
        )
    elif passed is not None:
        if not hasattr(passed, "to_dict"):
            raise TypeError(f"generation_config must be a GenerationConfig, got {passed!r}")
        theirs = passed.to_dict()
        _refuse({name: theirs[name] for name in theirs if name in _NOT_TAKEN})
        own = own.updated({name: theirs[name] for name in theirs if name in _RULES})
    _refuse(given)
    return own.updated({name: given[name] for name in given if name in _RULES})


def _refuse(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if name in _RULES:
            continue
        if name not in _NOT_TAKEN:
            close = get_close_matches(name, _RULES, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"generate takes no argument {name}{hint}")
        if not _changes_nothing(name, value):
            raise ValueError(f"generate: {_refusal(name)}")


def _refusal(name: str) -> str:
    return f"{name} is not taken; the nearest is {_NOT_TAKEN[name][1]}"


def _changes_nothing(name: str, value: object) -> bool:
    neutral = _NOT_TAKEN[name][0]
    if isinstance(value, Tensor):
        return 0 in neutral and not value.any()
    return value is None or any(type(value) is not str and value == same for same in neutral)


Rule = tuple[Callable[[object], bool], str]


def _whole(least: int) -> Rule:
    def holds(value: object) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least

    return holds, f"a whole number of at least {least}"


def _number(test: Callable[[float], bool], rule: str) -> Rule:
    def holds(value: object) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and test(float(value))

    return holds, f"a number {rule}"


def _one_or_list(rule: Rule, name: str) -> Rule:
    def holds(value: object) -> bool:
        return all(map(rule[0], value)) if isinstance(value, (list, tuple)) else rule[0](value)

    return holds, f"{name} or a list of them"


_FLAG: Rule = (lambda value: isinstance(value, bool), "True or False")
_POSITIVE = _number(lambda x: 0 < x < math.inf, "above 0")
_RULES: dict[str, Rule] = {
    "max_new_tokens": _whole(1),
    "max_length": _whole(1),
    "min_new_tokens": _whole(0),
    "do_sample": _FLAG,
    "temperature": (_POSITIVE[0], "a number above 0 (do_sample=False is greedy)"),
    "top_k": _whole(0),
    "top_p": _number(lambda p: 0 < p <= 1, "in (0, 1]"),
    "min_p": _number(lambda p: 0 <= p <= 1, "in [0, 1]"),
    "repetition_penalty": _POSITIVE,
    "eos_token_id": _one_or_list(_whole(0), "a token id"),
    "pad_token_id": _whole(0),
    "stop_strings": _one_or_list((lambda s: isinstance(s, str) and s != "", ""), "a string"),
    "num_return_sequences": _whole(1),
    "return_dict_in_generate": _FLAG,
    "output_scores": _FLAG,
    "output_logits": _FLAG,
}

_BEAMS = "num_return_sequences with do_sample=True"
_OWN = "a logits_processor of your own"
_CUT = "top_k, top_p or min_p"
_DRAFTS = "plain decoding, or drafts of your own checked by model(...) and taken back by cache.trim"
# What transformers' generate takes and this one does not: the values that change nothing, and are
# let pass, and what comes nearest.
_NOT_TAKEN: dict[str, tuple[tuple[object, ...], str]] = {
    "inputs": ((), "input_ids"),
    "position_ids": ((), "attention_mask, from which positions follow"),
    "token_type_ids": ((0,), "input_ids of text alone"),
    "mm_token_type_ids": ((0,), "input_ids of text alone"),
    "pixel_values": ((), "input_ids of text alone"),
    "input_features": ((), "input_ids of text alone"),
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "diversity_penalty": ((0,), _BEAMS),
    "early_stopping": ((False,), _BEAMS),
    "length_penalty": ((1, 0), _BEAMS),
    "constraints": ((), _OWN),
    "force_words_ids": ((), _OWN),
    "assistant_model": ((), _DRAFTS),
    "assistant_tokenizer": ((), _DRAFTS),
    "prompt_lookup_num_tokens": ((0,), _DRAFTS),
    "assistant_early_exit": ((), _DRAFTS),
    "penalty_alpha": ((0,), _CUT),
    "typical_p": ((1,), _CUT),
    "epsilon_cutoff": ((0,), _CUT),
    "eta_cutoff": ((0,), _CUT),
    "top_h": ((), _CUT),
    "no_repeat_ngram_size": ((0,), "repetition_penalty"),
    "encoder_repetition_penalty": ((1,), "repetition_penalty"),
    "encoder_no_repeat_ngram_size": ((0,), "repetition_penalty"),
    "bad_words_ids": (([],), _OWN),
    "sequence_bias": (([], {}), _OWN),
    "suppress_tokens": (([],), _OWN),
    "begin_suppress_tokens": (([],), _OWN),
    "forced_bos_token_id": ((), _OWN),
    "forced_eos_token_id": ((), _OWN),
    "exponential_decay_length_penalty": ((), _OWN),
    "prefix_allowed_tokens_fn": ((), _OWN),
    "guidance_scale": ((1,), _OWN),
    "watermarking_config": ((), _OWN),
    "renormalize_logits": ((False,), "GenerateOutput.log_probabilities()"),
    "remove_invalid_values": ((False,), "finite logits, which generate checks"),
    "token_healing": ((False,), "a prompt that ends with a whole word"),
    "min_length": ((0,), "min_new_tokens"),
    "max_time": ((), "a function among stopping_criteria"),
    "use_cache": ((True,), "use_cache=True, the only way"),
    "cache_implementation": ((), "past_key_values"),
    "output_attentions": ((False,), "output_scores or output_logits"),
    "output_hidden_states": ((False,), "model(..., output_hidden_states=True)"),
    "synced_gpus": ((False,), "the same max_new_tokens on every rank"),
    "custom_generate": ((), "a loop of your own over gemma4.decode.Decoder"),
}
