"""What the host cannot know without waiting for a device, and what comes of it there."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import BF16, Backend
from support.cases import public
from support.samples import ints, run, served
from torch import Tensor

import gemma4_kernels


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


def nan_rows(*rows: int) -> Callable[..., None]:
    """The results of these rows alone are NaN, and so is their gradient."""

    def check(backend: Backend, name: str, arguments: dict[str, Any]) -> None:
        logits = arguments["logits"].clone().requires_grad_()
        nll, _ = getattr(backend.ops, name)(**arguments | {"logits": logits})
        (grad,) = torch.autograd.grad(nll.sum(), logits)
        for x in (nll[:, None], grad):
            assert x.isnan().all(1).nonzero().flatten().tolist() == list(rows)
            assert x.isnan().any(1).sum() == len(rows)

    return check


def empty(*shape: int) -> Callable[..., None]:
    def check(backend: Backend, name: str, arguments: dict[str, Any]) -> None:
        assert list(run(backend, name, arguments)[0].shape) == list(shape)

    return check


CU = "cu_seqlens_q", "cu_seqlens_k"
SCALES = "gate_up_scales", "gate_up_row_scales", "down_scales", "down_row_scales"
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
    "a new key past the slots": (
        "qkv_attention_decode",
        {"seq_lens": ints(9, 12)},
        r"seq_lens\[0\] must lie in 0..8, block_table's keys, got 9",
        same_as(seq_lens=ints(8, 8), k=None, v=None, k_weight=None),
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
    "targets past the vocabulary": (
        "softcap_cross_entropy",
        {"targets": ints(64, 63, 1 << 30)},
        r"targets must lie in 0..63, or be -100 for none, got 1073741824",
        nan_rows(0, 2),
    ),
    "targets below the vocabulary": (
        "softcap_cross_entropy",
        {"targets": ints(-100, -1, 0)},
        r"targets must lie in 0..63, or be -100 for none, got -1",
        nan_rows(1),
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
            **dict.fromkeys(SCALES),
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
    gemma4_kernels.moe_experts(**public("moe_experts", arguments)).sum().backward()
    assert (gate_up.grad == 0).all()


@pytest.mark.parametrize("name", ["attention_prefill", "attention_decode"])
def test_pages_that_are_not_there(name):
    """A kernel must be able to trust the table: only the twin looks."""
    arguments = served(name) | {"block_table": ints([2], [0])}
    with pytest.raises(ValueError, match=r"block_table must lie in 0..1 where it is used, got \[2"):
        getattr(gemma4_kernels, name)(**arguments)
