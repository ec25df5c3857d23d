"""What the models return, and what `generate` returns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .cache import Cache
from .layout import Layout

T = TypeVar("T")


class Output(dict[str, Any]):
    """The entries that are not None, in the order in which the class annotates them.

    Read by attribute, name or place: `out.logits`, `out["logits"]`, `out[0]`, `out[:2]`. An absent
    entry's attribute is None. Iterating gives names, as in any dictionary; `to_tuple()` gives what
    can be unpacked. transformers' former name of `cache`, past_key_values, reads it too.
    """

    past_key_values: Cache | None
    # No entry: of a model's output, what the head needs to have nothing to do for padding.
    layout: Layout | None = None

    def __init__(
        self, entries: Mapping[str, object] | Iterable[tuple[str, object]] = (), /, **named: object
    ):
        names, given = type(self).__annotations__, dict(entries, **named)
        for name in given:
            if name not in names:
                raise TypeError(f"{type(self).__name__} holds {', '.join(names)}, got {name}")
        super().__init__({name: given[name] for name in names if given.get(name) is not None})

    def __init_subclass__(cls) -> None:
        for name in (*cls.__annotations__, "past_key_values"):
            setattr(cls, name, _entry(_name(name)))
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(zip(names, values, strict=True)),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
            flatten_with_keys_fn=lambda output: (
                [(pytree.MappingKey(name), value) for name, value in output.items()],
                list(output),
            ),
        )

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(_name(key)) if isinstance(key, str) else self.to_tuple()[key]

    def get(self, key: str, default: object = None) -> Any:
        return super().get(_name(key), default)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_name(key))


def _name(key: T) -> T | str:
    return "cache" if key == "past_key_values" else key


def _entry(name: str) -> property:
    def write(output: Output, value: object) -> None:
        output.pop(name, None)
        if value is not None:
            output[name] = value

    return property(lambda output: output.get(name), write)


class ModelOutput(Output):
    """last_hidden_state [B, S, D]; hidden_states as transformers has them: the scaled embedding,
    each layer's output but the last, and the normed last one."""

    last_hidden_state: Tensor
    cache: Cache | None
    hidden_states: tuple[Tensor, ...] | None


class CausalLMOutput(Output):
    """logits [B, S or logits_to_keep, V], zero in the padding; loss if labels were given."""

    loss: Tensor | None
    logits: Tensor
    cache: Cache | None
    hidden_states: tuple[Tensor, ...] | None


@dataclass
class GenerateOutput:
    """What `generate` returns with return_dict_in_generate.

    sequences [B, S + new]. For each new token, scores hold what it was drawn from, [B, V] after all
    processing, and logits what the model said, both fp32. past_key_values holds all but the last
    new token.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: Cache | None = None

    def log_probabilities(self) -> Tensor:
        """log p [B, new] of each new token under the scores; ValueError without output_scores."""
        if self.scores is None:
            raise ValueError("log_probabilities needs output_scores=True")
        scores = torch.stack(self.scores, 1)
        new = self.sequences[:, -scores.shape[1] :, None]
        return scores.log_softmax(-1).gather(-1, new).squeeze(-1)
