"""Each argument of each op, broken: refused by its name, on every backend, before anything runs.

The values come from the argument's type in the schema.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from support.backends import BF16
from support.cases import public
from support.marks import emulated_backend
from support.samples import run, served
from torch import Tensor

import gemma4_kernels
from gemma4_kernels import opset

OPS = [name for name in opset.OPS if not name.endswith("_backward")]


def other_tensors(x: Tensor) -> Iterator[tuple[str, Any]]:
    """What x is not: a tensor, of its dtype, rank and sizes, on its device."""
    yield "a list", x.tolist()
    yield "numpy", numpy.zeros(x.shape, dtype=numpy.float32)
    yield "a number", 1.5
    yield "text", "x"
    for dtype in (torch.bool, torch.complex64, torch.int32 if x.is_floating_point() else BF16):
        yield f"as {dtype}", x.to(dtype)
    yield "a rank more", x[None]
    yield "no rank", x.flatten()[0]
    yield "elsewhere", x.to("meta")
    for d in range(x.ndim):
        yield f"+1 at {d}", x.new_zeros([n + (i == d) for i, n in enumerate(x.shape)])
        yield f"0 at {d}", x.new_zeros([n * (i != d) for i, n in enumerate(x.shape)])


OTHER_VALUES = {
    "float": ("1", [1.0], True, None, 1j, math.nan, math.inf, -math.inf, -1.0),
    "int": ("1", [1], True, None, 1.5, math.nan, -1, -2, 1 << 40, 1 << 70),
    "bool": ("no", [True], None, 1, 0.0),
}
# What is no break: the sizes that an op leaves open, and numbers that mean something.
TAKEN = {
    "rms_norm": {"x": ("a rank more", "+1 at 0", "0 at 0")},
    "moe_norm": {"x": ("a rank more", "+1 at 0", "0 at 0")},
    "geglu": {"gate_up": ("a rank more", "elsewhere", "+1 at 0", "0 at 0", "0 at 1")},
    "softcap": {
        "logits": ("a rank more", "no rank", "elsewhere", "+1 at 0", "0 at 0", "+1 at 1", "0 at 1")
    },
    "softcap_argmax": {"logits": ("a rank more", "elsewhere", "+1 at 0", "0 at 0", "+1 at 1")},
    "qkv_norm_rope": {"q": ("+1 at 1", "0 at 1")},
    "qkv_norm_rope_cache": {"q": ("+1 at 1", "0 at 1")},
    "attention_prefill": {
        "q": ("0 at 1",),
        "max_seqlen_q": (1 << 40,),
        "max_seqlen_k": (1 << 40,),
        "scale": (-1.0,),
        "window": (1 << 40,),
        "window_right": (-1, 1 << 40),
        "block_table": ("+1 at 1",),
    },
    "attention_decode": {
        "q": ("+1 at 1", "0 at 1", "0 at 2"),
        "scale": (-1.0,),
        "window": (1 << 40,),
        "block_table": ("+1 at 1",),
    },
    "qkv_attention_decode": {
        "q": ("0 at 1",),
        "scale": (-1.0,),
        "window": (1 << 40,),
        "block_table": ("+1 at 1",),
    },
    "linear_packed": {"x": ("+1 at 0", "0 at 0")},
    "moe_route": {"logits": ("+1 at 0", "0 at 0")},
    "moe_open": {"router": ("+1 at 0", "0 at 0")},
    "ple_embed": {"table": ("+1 at 0", "0 at 0")},
    "sample": {
        "logits": ("+1 at 1",),
        "counters": ("+1 at 0",),
        "eos": ("+1 at 0", "0 at 0"),
        "top_k": (1 << 40,),
        "pad": (-1, -2, 1 << 40),
    },
    "ple_gate": {"ple": ("+1 at 1",)},
    "softcap_cross_entropy": {"logits": ("+1 at 1",)},
}
# Sizes that lengths must agree with, which the eager twin alone reads; CONTRACT breaks the lengths.
READ = {
    "attention_prefill": {"q": ("+1 at 0", "0 at 0"), "block_table": ("0 at 1",)},
    "attention_decode": {"block_table": ("0 at 1",)},
    "qkv_attention_decode": {"block_table": ("0 at 1",)},
}


def broken(name: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(argument, what is wrong with it, arguments) for all arguments of the op."""
    arguments = served(name)
    for argument in opset.OPS[name].registered.default._schema.arguments:
        value = arguments[argument.name]
        if isinstance(value, Tensor):
            others = list(other_tensors(value))
            if "Optional" not in str(argument.type):
                others.append((None, None))
        elif value is None:
            continue  # scales of a cache in e4m3, which have a test of their own
        else:
            others = [(other, other) for other in OTHER_VALUES[str(argument.type)]]
        for wrong, other in others:
            taken = TAKEN.get(name, {}).get(argument.name, ())
            if not any(type(wrong) is type(t) and wrong == t for t in taken):
                yield argument.name, wrong, arguments | {argument.name: other}


def elsewhere(arguments: dict[str, Any]) -> dict[str, Any]:
    """On meta tensors, as the compiler's are: what was there comes here."""
    return {
        name: x
        if not isinstance(x, Tensor)
        else torch.zeros_like(x, device="cpu")
        if x.is_meta
        else x.to("meta")
        for name, x in arguments.items()
    }


def why_not_refused(name: str, argument: str, wrong: Any, arguments: dict[str, Any]) -> str | None:
    """None if the call raises a sentence that names the argument.

    What two tensors disagree on is said of one of them, whichever.
    """
    try:
        getattr(gemma4_kernels, name)(**public(name, arguments))
    except (TypeError, ValueError) as error:
        agreement = isinstance(wrong, str) and isinstance(arguments[argument], Tensor)
        named = served(name) if agreement and not wrong.startswith("as ") else [argument]
        return None if any(re.search(rf"\b{n}\b", str(error)) for n in named) else repr(error)
    except Exception as error:
        return f"comes from inside: {error!r}"
    return "is taken"


@pytest.mark.parametrize("where", ["eager", "emulated", "meta"])
@pytest.mark.parametrize("name", OPS)
def test_every_broken_argument_is_refused_by_its_name(name, where):
    if where == "emulated":
        emulated_backend()
    for argument, wrong, arguments in broken(name):
        if where != "eager" and wrong in READ.get(name, {}).get(argument, ()):
            continue
        if where == "meta" and (name, argument, wrong) == ("ple_embed", "table", "elsewhere"):
            continue  # a table may stay on the host
        given = elsewhere(arguments) if where == "meta" else arguments
        reason = why_not_refused(name, argument, wrong, given)
        assert reason is None, f"{argument} ({wrong!r}) {reason}"


@pytest.mark.parametrize("name", OPS)
def test_what_is_no_break_is_taken(backend, name):
    """What the breaks are made from, and what TAKEN leaves out."""
    arguments = {n: backend.to(x) if isinstance(x, Tensor) else x for n, x in served(name).items()}
    getattr(backend.ops, name)(**public(name, arguments))
    for argument, others in TAKEN.get(name, {}).items():
        values = dict(other_tensors(arguments[argument])) if isinstance(others[0], str) else {}
        for other in others:
            changed = arguments | {argument: values.get(other, other)}
            getattr(backend.ops, name)(**public(name, changed))


def test_breaks_are_many():
    """On each of the three backends."""
    assert sum(len(list(broken(name))) for name in OPS) > 900
    assert set(TAKEN) | set(READ) <= set(OPS)


@pytest.mark.parametrize("name", ["attention_prefill", "attention_decode", "moe_experts"])
def test_autocast_hides_no_broken_argument(name):
    for argument, wrong, arguments in broken(name):
        if not isinstance(arguments[argument], Tensor) or "as " in str(wrong):
            with torch.autocast("cpu", BF16):
                reason = why_not_refused(name, argument, wrong, arguments)
            assert reason is None, f"{argument} ({wrong!r}) {reason}"


@pytest.mark.parametrize("name", ["softcap", "rms_norm", "attention_decode"])
def test_the_registered_op_refuses_too(name):
    for argument, value in (("cap", math.nan), ("eps", -1.0), ("softcap", math.inf)):
        if argument in opset.OPS[name].names:
            arguments = served(name) | {argument: value}
            with pytest.raises(ValueError, match=f"{argument} must be"):
                opset.OPS[name].registered(**arguments)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("qkv_norm_rope", "positions"),
        ("qkv_norm_rope_cache", "positions"),
        ("qkv_norm_rope_cache", "slots"),
        ("ple_embed", "ids"),
        ("moe_experts", "experts"),
        ("attention_prefill", "block_table"),
        ("attention_decode", "block_table"),
    ],
)
def test_integers_of_every_width(backend, name, argument, dtype):
    arguments = served(name)
    given = (arguments | {argument: arguments[argument].to(d)} for d in (torch.int64, dtype))
    assert all(map(torch.equal, *(run(backend, name, a) for a in given)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_past_a_narrow_range(backend, dtype):
    """Row 300 of a table, which no 8 bits count, beside ids of 8 bits."""
    table, projected = (backend.randn(n, 32, dtype=BF16) for n in (301, 2))
    weight = backend.weight(16, dtype=BF16)
    wide = backend.ops.ple_embed(
        backend.to(torch.tensor([5, -1], dtype=dtype)), table, projected, weight
    )
    narrow = backend.to(torch.tensor([5, -1], dtype=torch.int8))
    assert torch.equal(backend.ops.ple_embed(narrow, table, projected, weight), wide)
