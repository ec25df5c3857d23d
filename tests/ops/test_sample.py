import pytest
import torch
from support import cases, float64
from support.backends import EAGER, FP32, FP64
from support.expect import assert_refused
from support.marks import all_dtypes

from gemma4_kernels.reference import logits as reference

RACE = dict(temperature=0.7)
CASES = {  # rows, vocabulary, options; a block has 2,048 tokens, and as many keys in each round
    "no rows": (0, 97, RACE),
    "one token": (2, 1, RACE | dict(top_k=3)),
    "best": (5, 97, {}),
    "best of parts": (3, 5000, {}),
    "best, capped": (5, 1032, dict(cap=2.0)),
    "all": (5, 97, RACE),
    "all, whole vectors": (3, 4104, RACE),
    "all, capped": (3, 1032, RACE | dict(cap=2.0)),
    "all, hot": (3, 97, dict(temperature=30.0)),
    "top_k": (5, 97, RACE | dict(top_k=5)),
    "top_k of one": (5, 97, RACE | dict(top_k=1)),
    "top_k of parts": (3, 5000, RACE | dict(top_k=64)),
    "top_k of more": (3, 97, RACE | dict(top_k=200)),
    "top_k, capped": (3, 1032, RACE | dict(top_k=20, cap=2.0)),
    "top_k in three rounds": (2, 19_000, dict(temperature=3.0, top_k=255)),
    "top_p": (5, 97, RACE | dict(top_k=20, top_p=0.6)),
    "top_p of one": (5, 97, RACE | dict(top_k=20, top_p=1e-4)),
    "min_p": (5, 97, RACE | dict(top_k=20, min_p=0.3)),
    "all cuts": (5, 5000, dict(temperature=1.5, top_k=64, top_p=0.8, min_p=0.05)),
}
OTHERS = {  # no kernel: the twin
    "top_p of all": (5, 97, RACE | dict(top_p=0.6)),
    "min_p of all": (5, 97, RACE | dict(min_p=0.3)),
    "top_k too large": (3, 1032, RACE | dict(top_k=300)),
}


def drawn(backend, arguments):
    """The tokens, from copies of what is written."""
    copies = {n: arguments[n].clone() for n in ("ids", "done", "counters")}
    assert backend.ops.sample(**arguments | copies) is None
    assert not copies["counters"].any()
    return copies["ids"]


@all_dtypes
@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_sample(backend, poisoned_memory, case, dtype):
    rows, vocab_size, options = {**CASES, **OTHERS}[case]
    arguments = cases.sample(backend, rows, vocab_size, dtype=dtype, **options)
    arguments["seeds"] += 3
    cap, slack = options.get("cap", 0.0), 0.0
    if cap:  # three roundings of the twin, and capped logits that round to one value are equals
        slack = 2 * 3 * torch.finfo(dtype).eps * cap
    shared = {"cap": cap, "temperature": 0.0} | options
    for turn in range(3):
        arguments["positions"] += turn
        ids = drawn(backend, arguments)
        names = ("logits", "seeds", "positions")
        expected = float64.sample(*(arguments[n] for n in names), **shared, slack=slack)
        for token, possible in zip(ids.tolist(), expected, strict=True):
            assert token in possible, (turn, token, possible)


def test_philox():
    """Against the authors' known answers, and the formula of the tests, of any seed and counter."""
    mask = (1 << 64) - 1
    for low, high, seed, words in (
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, mask >> 1, mask, None),
        (123456, 1 << 40 | 5, 0x299F31D0A4093822, None),
    ):
        found = float64.philox(seed, low, high)
        assert words is None or tuple(found) == words
        signed = seed - (1 << 64) if seed >> 63 else seed
        made = reference.philox(*map(torch.tensor, (signed, low, high)))
        assert made.tolist() == found


@pytest.mark.parametrize("options", [RACE, RACE | dict(top_k=40, top_p=0.9, min_p=0.01)], ids=str)
def test_draws_are_the_twins(backend, options):
    """fp32 logits far enough apart: the very tokens, position by position."""
    arguments = cases.sample(backend, 2, 2056, std=1.0, **options)
    logits, seeds = (arguments[n].cpu() for n in ("logits", "seeds"))
    seen = set()
    for position in range(10):
        arguments["positions"][:] = position
        ids = drawn(backend, arguments).tolist()
        scores, kept = reference.cut(logits, 0.7, *(options.get(n, d) for n, d in DEFAULTS))
        at = torch.full((2,), position)
        scores = scores + reference.gumbel(seeds, at, kept, scores.shape[1])
        order = torch.arange(2056).expand(2, -1) if kept is None else kept
        assert ids == order.gather(1, scores.argmax(-1, True)).squeeze(-1).tolist()
        seen.add(tuple(ids))
    assert len(seen) > 7


DEFAULTS = (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))


@pytest.mark.parametrize("top_k", [0, 5])
def test_draws_follow_the_distribution(top_k):
    """Chi-squared of 4,000 rows that differ in seed or position alone; of 6 degrees of freedom it
    passes 35 once in 200,000 times. Of the twin, whose draws are the kernel's."""
    backend = EAGER
    p = torch.tensor([0.3, 0.02, 0.2, 0.05, 0.25, 0.08, 0.1], dtype=FP64)
    rows = 4000
    arguments = cases.sample(backend, rows, 7, temperature=2.0, top_k=top_k)
    arguments["logits"] = backend.to((2 * p.log()).float().expand(rows, -1).contiguous())
    arguments["seeds"] = backend.to(torch.arange(rows) // 50)
    arguments["positions"] = backend.to(torch.arange(rows) % 50)
    counts = torch.bincount(drawn(backend, arguments).cpu(), minlength=7).double()
    if top_k:
        p[[1, 3]] = 0
        assert not counts[[1, 3]].any()
    expected = rows * p / p.sum()
    assert ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() < 35


def test_a_row_alone_draws_as_in_a_batch(backend):
    for options in ({}, RACE, RACE | dict(top_k=8)):
        arguments = cases.sample(backend, 5, 2100, **options)
        together = drawn(backend, arguments).tolist()
        names = ("logits", "seeds", "positions", "ids", "done")
        for row in range(5):
            alone = arguments | {n: arguments[n][row : row + 1] for n in names}
            assert drawn(backend, alone).tolist() == together[row : row + 1]


@all_dtypes
def test_equals_go_to_the_lower_index(backend, dtype):
    logits = backend.to(torch.linspace(-20, 20, 41, dtype=dtype).repeat(3)[None])
    arguments = cases.sample(backend, 1, 123, dtype=dtype) | {"logits": logits}
    assert drawn(backend, arguments).item() == 40
    arguments["logits"] = logits.new_zeros(1, 123)
    assert drawn(backend, arguments).item() == 0
    # Of equals at the cut too: 4 of 128 are left to draw from, of which each thread has several.
    arguments |= dict(temperature=1.0, top_k=4, logits=logits.new_zeros(1, 128))
    seen = set()
    for position in range(24):
        arguments["positions"][:] = position
        seen.add(drawn(backend, arguments).item())
    assert seen == {0, 1, 2, 3}


def test_not_a_number_wins_and_the_first_of_them(backend):
    arguments = cases.sample(backend, 2, 97)
    arguments["logits"][1, 50] = arguments["logits"][1, 70] = float("nan")
    best = arguments["logits"][0].argmax().item()
    assert drawn(backend, arguments).tolist() == [best, 50]


@pytest.mark.parametrize("options", [{}, RACE, RACE | dict(top_k=3)], ids=str)
def test_ends_of_rows(backend, options):
    """A row that has ended is filled with pads, one that ends says so; others go on."""
    arguments = cases.sample(backend, 4, 97, **options)
    free = drawn(backend, arguments).tolist()
    done = backend.to(torch.tensor([0, 1, 0, 0]))
    eos = backend.to(torch.tensor([90, free[1], free[2]]))
    arguments |= {"done": done, "eos": eos, "pad": 5}
    backend.ops.sample(**arguments)
    ended = [int(i == 1 or token in (free[2], free[1], 90)) for i, token in enumerate(free)]
    assert ended[2] == 1 and done.tolist() == ended
    assert arguments["ids"].tolist() == [free[0], 5, free[2], free[3]]


def test_strided_logits_and_other_positions(backend):
    arguments = cases.sample(backend, 12, 64, temperature=1.0, top_k=7)
    logits = backend.randn(12, 3 * 64, std=3.0)
    for view in (logits[:, 64:128], logits.T[:12]):
        whole = arguments | {"logits": view.contiguous()}
        whole["counters"] = cases.sample_counters(view)
        assert torch.equal(drawn(backend, whole | {"logits": view}), drawn(backend, whole))
    expected = drawn(backend, arguments)
    arguments["positions"] = torch.stack([arguments["positions"].int()] * 2, 1)[:, 1]
    assert torch.equal(drawn(backend, arguments), expected)


BAD = {
    "integers": ({"logits": lambda x: x.int()}, TypeError, "logits must be a floating.*int32"),
    "no vocabulary": ({"logits": lambda x: x[:, :0]}, ValueError, r"logits must be \[B, V\]"),
    "few counters": (
        {"counters": lambda x: x[:0]},
        ValueError,
        r"counters must be at least 3 side by side, got \[0\]",
    ),
    "wide counters": ({"counters": lambda x: x.long()}, TypeError, "counters must hold int32"),
    "narrow ids": ({"ids": lambda x: x.int()}, TypeError, "ids must hold int64, got torch.int32"),
    "flags": ({"done": lambda x: x.bool()}, TypeError, "done must hold int64, got torch.bool"),
    "cap below zero": ({"cap": lambda x: -1.0}, ValueError, "cap must be at least 0, got -1"),
    "cold": ({"temperature": lambda x: -1.0}, ValueError, "temperature must be finite and at le"),
    "top_p of none": ({"top_p": lambda x: 0.0}, ValueError, r"top_p must lie in \(0, 1\], got 0"),
    "min_p past one": ({"min_p": lambda x: 1.5}, ValueError, "min_p must be at most 1, got 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = cases.sample(backend, 3, 8, dtype=FP32)
    arguments |= dict(cap=0.0, temperature=1.0, top_p=0.5, min_p=0.0, top_k=3)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.sample, arguments, error, sentence)


def test_what_is_written_lies_side_by_side(backend):
    arguments = cases.sample(backend, 3, 8)
    arguments["ids"] = torch.stack([arguments["ids"]] * 2, 1)[:, 0]
    with pytest.raises(ValueError, match="ids must be contiguous"):
        backend.ops.sample(**arguments)
