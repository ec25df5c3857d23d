"""Each argument of each op, broken: refused by its name, on every backend, before anything runs.

The values come from the argument's type in the schema. What the host cannot know without waiting
for a device stands in CONTRACT, with what comes of it there. Over 400 lines: two tables.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from support.backends import BF16, Backend
from support.marks import emulated_backend
from support.samples import served
from torch import Tensor

import gemma4_kernels
from gemma4_kernels import opset

OPS = [name for name in opset.OPS if not name.endswith("_backward")]


def run(backend: Backend, name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """What the op returns and writes, from copies of the arguments."""
    copies = {
        n: backend.to(x).clone() if isinstance(x, Tensor) else x for n, x in arguments.items()
    }
    result = getattr(backend.ops, name)(**copies)
    written = [copies[n] for n in ("k_cache", "v_cache") if name.endswith("cache")]
    return [*(result if isinstance(result, tuple) else (result,)), *written]


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


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
    "moe_route": {"logits": ("+1 at 0", "0 at 0")},
    "ple_embed": {"table": ("+1 at 0", "0 at 0")},
    "ple_gate": {"ple": ("+1 at 1",)},
}
# Sizes that lengths must agree with, which the eager twin alone reads; CONTRACT breaks the lengths.
READ = {
    "attention_prefill": {"q": ("+1 at 0", "0 at 0"), "block_table": ("0 at 1",)},
    "attention_decode": {"block_table": ("0 at 1",)},
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
        getattr(gemma4_kernels, name)(**arguments)
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
    getattr(backend.ops, name)(**arguments)
    for argument, others in TAKEN.get(name, {}).items():
        values = dict(other_tensors(arguments[argument])) if isinstance(others[0], str) else {}
        for other in others:
            getattr(backend.ops, name)(**arguments | {argument: values.get(other, other)})


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


def zero_rows(begin: int, end: int) -> Callable[..., None]:
    """All is finite, and these rows, which no sequence owns, see no key."""

    def check(backend: Backend, name: str, arguments: dict[str, Any]) -> None:
        out, lse = run(backend, name, arguments)
        assert out.isfinite().all() and not lse.isnan().any()
        assert (out[begin:end] == 0).all() and (lse[:, begin:end] == -math.inf).all()

    return check


def same_as(**others: Tensor) -> Callable[..., None]:
    def check(backend: Backend, name: str, arguments: dict[str, Any]) -> None:
        results = (run(backend, name, given) for given in (arguments, arguments | others))
        assert all(map(torch.equal, *results))

    return check


def largest(backend: Backend, name: str, arguments: dict[str, Any]) -> None:
    (y,) = run(backend, name, arguments)
    assert (y == torch.finfo(torch.float16).max).all()


def empty(*shape: int) -> Callable[..., None]:
    def check(backend: Backend, name: str, arguments: dict[str, Any]) -> None:
        assert list(run(backend, name, arguments)[0].shape) == list(shape)

    return check


CU = "cu_seqlens_q", "cu_seqlens_k"
FP16 = {"dtype": torch.float16}
# Op, arguments, what the eager twin says, which reads such values on the host, and what a kernel
# does, whose device nobody waits for. No sentence: the twin does the same.
CONTRACT = {
    "queries begin late": (
        "attention_prefill",
        {CU[0]: ints(1, 3, 5)},
        "begin at 0",
        zero_rows(0, 1),
    ),
    "queries end early": ("attention_prefill", {CU[0]: ints(0, 2, 4)}, "end at", zero_rows(4, 5)),
    "queries end late": ("attention_prefill", {CU[0]: ints(0, 3, 6)}, "end at", zero_rows(0, 0)),
    "queries decrease": (
        "attention_prefill",
        {CU[0]: ints(0, 3, 1)},
        "end at|decr",
        zero_rows(3, 5),
    ),
    "keys begin late": ("attention_prefill", {CU[1]: ints(1, 2, 5)}, "begin at 0", zero_rows(0, 0)),
    "keys decrease": ("attention_prefill", {CU[1]: ints(0, 3, 2)}, "decrease", zero_rows(0, 0)),
    "more queries than said": (
        "attention_prefill",
        {CU[0]: ints(0, 1, 5), "max_seqlen_q": 3},
        "max_seqlen_q must not fall below the longest sequence, 4",
        zero_rows(4, 5),
    ),
    "more keys than pages": (
        "attention_prefill",
        {CU[1]: ints(0, 2, 9), "max_seqlen_k": 7},
        "block_table must have pages for the 7 keys of sequence 1, got 1 of 4",
        zero_rows(0, 0),
    ),
    "more keys than slots": (
        "attention_decode",
        {"seq_lens": ints(3, 9)},
        r"seq_lens\[1\] must lie in 0..8, block_table's keys, got 9",
        same_as(seq_lens=ints(3, 8)),
    ),
    "fewer keys than none": (
        "attention_decode",
        {"seq_lens": ints(-1, 8)},
        r"seq_lens\[0\] must lie in 0..8",
        same_as(seq_lens=ints(0, 8)),
    ),
    "a slot past the cache": (
        "qkv_norm_rope_cache",
        {"slots": ints(0, 16, 9)},
        "slots must lie below the cache's 16 slots",
        same_as(slots=ints(0, -1, 9)),
    ),
    "a slot below the cache": (
        "qkv_norm_rope_cache",
        {"slots": ints(0, -5, 9)},
        None,
        same_as(slots=ints(0, -1, 9)),
    ),
    "expert 1000 of 4": (
        "moe_experts",
        {"experts": ints([0, 1000], [1, 2], [2, 0])},
        "experts must lie in 0..3, or be -1 or 4 for none, got 1000",
        same_as(experts=ints([0, 4], [1, 2], [2, 0])),
    ),
    "expert -2": (
        "moe_experts",
        {"experts": ints([0, -2], [1, 2], [2, 0])},
        "experts must lie in 0..3, or be -1 or 4 for none, got -2",
        same_as(experts=ints([0, 4], [1, 2], [2, 0])),
    ),
    "expert -1": (
        "moe_experts",
        {"experts": ints([0, -1], [-1, 2], [-1, -1])},
        None,
        same_as(experts=ints([0, 4], [4, 2], [4, 4])),
    ),
    "ids past the table": (
        "ple_embed",
        {"ids": ints(0, 5, 1 << 30)},
        None,
        same_as(ids=ints(0, -1, -1)),
    ),
    "a product past fp16": (
        "geglu",
        {"gate_up": torch.full((1, 64), 300.0, **FP16)},
        None,
        largest,
    ),
    "a gate past fp16": (
        "ple_gate",
        {"gate": torch.full((1, 16), 300.0, **FP16), "ple": torch.full((1, 2, 16), 300.0, **FP16)},
        None,
        largest,
    ),
    "experts past fp16": (
        "moe_experts",
        {
            "x": torch.full((3, 64), 1.0, **FP16),
            "gate_up": torch.full((4, 32, 64), 300.0 / 64, **FP16),
            "down": torch.full((4, 64, 16), 1.0, **FP16),
            "weights": torch.full((3, 2), 1.0),
        },
        None,
        largest,
    ),
    "no new tokens": (
        "attention_decode",
        {"q": torch.ones(2, 0, 4, 64, dtype=BF16)},
        None,
        empty(2, 0, 4, 64),
    ),
    "no rows": (
        "attention_decode",
        {
            "q": torch.ones(0, 1, 4, 64, dtype=BF16),
            "seq_lens": ints(),
            "block_table": torch.ones(0, 1, dtype=torch.int32),
        },
        None,
        empty(0, 1, 4, 64),
    ),
    "no sequences": (
        "attention_prefill",
        {
            "q": torch.ones(0, 4, 64, dtype=BF16),
            "block_table": torch.ones(0, 1, dtype=torch.int32),
            CU[0]: ints(0),
            CU[1]: ints(0),
        },
        None,
        empty(0, 4, 64),
    ),
    "sequences of nothing": (
        "attention_prefill",
        {"q": torch.ones(0, 4, 64, dtype=BF16), CU[0]: ints(0, 0, 0), CU[1]: ints(0, 2, 5)},
        None,
        empty(0, 4, 64),
    ),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CONTRACT)
def test_what_only_the_device_knows(backend, case):
    name, changed, sentence, check = CONTRACT[case]
    arguments = served(name) | changed
    if sentence is not None and backend.name == "eager":
        with pytest.raises(ValueError, match=sentence):
            run(backend, name, arguments)
    else:
        check(backend, name, arguments)


def test_what_is_held_back_in_fp16_passes_no_gradient():
    arguments = served("moe_experts") | CONTRACT["experts past fp16"][1]
    gate_up = arguments["gate_up"].requires_grad_()
    gemma4_kernels.moe_experts(**arguments).sum().backward()
    assert (gate_up.grad == 0).all()


@pytest.mark.parametrize("name", ["attention_prefill", "attention_decode"])
def test_pages_that_are_not_there(name):
    """A kernel must be able to trust the table: only the twin looks."""
    arguments = served(name) | {"block_table": ints([2], [0])}
    with pytest.raises(ValueError, match=r"block_table must lie in 0..1 where it is used, got \[2"):
        getattr(gemma4_kernels, name)(**arguments)
