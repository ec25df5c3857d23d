"""What an argument of an op must be, by its name and by the kind that a schema gives it."""

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

# What a number may not fall below, in every op that takes an argument of this name.
LEAST = {
    **dict.fromkeys(("eps", "softcap", "temperature", "min_p"), 0.0),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k", "top_k"), 0),
    "window_right": -1,
}
MOST = torch.iinfo(torch.int64).max


def judge(name: str, kind: str) -> Callable[[object], None]:
    """What raises TypeError or ValueError unless a value is one of this kind, as in a schema."""
    least = LEAST.get(name, -math.inf)

    def tensor(value: object) -> None:
        if not isinstance(value, Tensor) and (value is not None or kind == "Tensor"):
            raise TypeError(f"{name} must be a tensor, got {_told(value)}")

    def flag(value: object) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {_told(value)}")

    def number(value: object) -> None:
        # The exact type first: an abstract one takes ten times as long.
        if type(value) is not float and not (
            isinstance(value, numbers.Real) and not isinstance(value, bool)
        ):
            raise TypeError(f"{name} must be a number, got {_told(value)}")
        if not math.isfinite(value) or value < least:
            sort = "finite" if least < 0 else "finite and at least 0"
            raise ValueError(f"{name} must be {sort}, got {value}")

    def integer(value: object) -> None:
        if type(value) is not int and not (
            isinstance(value, numbers.Integral) and not isinstance(value, bool)
        ):
            raise TypeError(f"{name} must be an integer, got {_told(value)}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if not value <= MOST:
            raise ValueError(f"{name} must be at most {MOST}, got {value}")

    return {"float": number, "int": integer, "bool": flag}.get(kind, tensor)


def _told(value: object) -> str:
    return "None" if value is None else f"{value!r:.40} of type {type(value).__name__}"
