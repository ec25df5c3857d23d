import pytest
import torch
from support import float64
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # T, E, K
    "no tokens": (0, 8, 2),
    "one token": (1, 8, 2),
    "one expert": (3, 1, 1),
    "best alone": (5, 8, 1),
    "all experts": (5, 8, 8),
    "odd count": (7, 37, 5),
    "26B-A4B": (9, 128, 8),
    "more experts than four a lane": (5, 200, 8),
    "most experts": (3, 512, 32),
    "more tokens than a tile": (200, 16, 4),
}


def inputs(backend, case, dtype):
    tokens, num_experts, _ = CASES[case]
    # Logits on a grid, so that every dtype holds them and rows have equals.
    logits = torch.randint(-40, 40, (tokens, num_experts)) / 8
    scale = torch.rand(num_experts, dtype=torch.float64) * 1.5 + 0.5
    return backend.to(logits.to(dtype)), backend.to(scale.to(dtype))


def check(backend, logits, scale, k):
    weights, experts = backend.ops.moe_route(logits, scale, k)
    expected, chosen = float64.moe_route(logits, scale, k)
    assert experts.dtype == torch.int32
    assert experts.cpu().equal(chosen)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    assert_close_to_float64(weights, expected, dtype, terms=logits.shape[1])


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_moe_route(backend, poisoned_memory, case, dtype):
    """Equal logits go to the lower index; the choice is that of exact arithmetic."""
    check(backend, *inputs(backend, case, dtype), CASES[case][2])


def test_strided_and_of_any_value(backend):
    logits = backend.randn(16, 3 * 128, std=3.0)[:, 128:256]
    check(backend, logits, backend.randn(128, mean=1.0, std=0.3), 8)
    check(backend, logits.T, backend.randn(16, mean=1.0, std=0.3), 4)


def test_scale_of_another_dtype(backend):
    """The published checkpoints keep it in bf16, the router's product may be fp32."""
    logits, scale = inputs(backend, "26B-A4B", torch.float32)
    check(backend, logits, scale.bfloat16(), 8)
    check(backend, logits.bfloat16(), scale, 8)


def test_equal_logits_go_to_the_lower_index(backend):
    logits = backend.to(torch.zeros(2, 128))
    logits[1, 100] = logits[1, 60] = 1.0
    _, experts = backend.ops.moe_route(logits, backend.to(torch.ones(128)), 4)
    assert experts.tolist() == [[0, 1, 2, 3], [60, 100, 0, 1]]


def test_large_logits_do_not_overflow(backend):
    logits = backend.to(torch.tensor([[1000.0, 999.0, 0.0], [-1000.0, -2000.0, -999.0]]))
    weights, experts = backend.ops.moe_route(logits, backend.to(torch.ones(3)), 2)
    assert experts.tolist() == [[0, 1], [2, 0]]
    assert weights.flatten().tolist() == pytest.approx([0.731059, 0.268941] * 2, abs=1e-6)


def test_not_a_number_stays_in_its_row(backend):
    """Its weights are NaN, and its experts still are k different ones."""
    logits = backend.randn(3, 40)
    logits[1, 7] = float("nan")
    weights, experts = backend.ops.moe_route(logits, backend.to(torch.ones(40)), 4)
    assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()
    assert len(set(experts[1].tolist())) == 4 and experts.min() >= 0 and experts.max() < 40


def test_equals_softmax_over_the_chosen(backend):
    logits = backend.randn(50, 128, std=2.0)
    weights, experts = backend.ops.moe_route(logits, backend.to(torch.ones(128)), 8)
    values, indices = logits.cpu().double().topk(8)
    assert experts.cpu().long().sort().values.equal(indices.sort().values)
    assert (weights.cpu().double() - values.softmax(-1)).abs().max() < 1e-6


def test_softmax_is_fp32_for_bf16_logits(backend):
    logits, scale = inputs(backend, "26B-A4B", torch.bfloat16)
    weights, _ = backend.ops.moe_route(logits, torch.ones_like(scale), 8)
    assert weights.dtype == torch.float32
    assert (weights.cpu().double().sum(-1) - 1).abs().max() < 1e-6


BAD = {
    "integer logits": (
        {"logits": lambda x: x.int()},
        TypeError,
        "logits must be a floating.*got torch.int32",
    ),
    "batched logits": (
        {"logits": lambda x: x[None]},
        ValueError,
        r"logits must be \[T, E\], got \[1, 5, 8\]",
    ),
    "integer scale": (
        {"per_expert_scale": lambda s: s.int()},
        TypeError,
        "per_expert_scale must be a floating.*got torch.int32",
    ),
    "scale length": (
        {"per_expert_scale": lambda s: s[:7]},
        ValueError,
        r"per_expert_scale must have shape \[8\], got \[7\]",
    ),
    "scale device": (
        {"per_expert_scale": lambda s: s.to("meta")},
        ValueError,
        "per_expert_scale must be on the device of logits, c.*, got meta",
    ),
    "k of zero": ({"k": lambda _: 0}, ValueError, "k must lie in 1..E = 8, got 0"),
    "k too large": ({"k": lambda _: 9}, ValueError, "k must lie in 1..E = 8, got 9"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    logits, scale = inputs(backend, "best alone", torch.float32)
    arguments = {"logits": logits, "per_expert_scale": scale, "k": 2}
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.moe_route, arguments, error, sentence)
