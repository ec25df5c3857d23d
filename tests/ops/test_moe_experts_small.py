import pytest
import torch
from support import cases, float64
from support.backends import BF16, FP16, FP32, in_dtypes
from support.expect import assert_close_to_float64, assert_refused
from support.marks import all_dtypes

CASES = {  # T, E, K, D, F, columns of the dense product
    "no tokens": (0, 4, 2, 16, 8, 8),
    "one token": (1, 8, 2, 64, 24, 40),
    "one expert": (5, 1, 1, 16, 8, 16),
    "all experts": (5, 4, 4, 24, 8, 72),
    "26B-A4B, narrow": (1, 128, 8, 88, 48, 136),
    "eight tokens, wider than a block's step": (8, 40, 8, 520, 136, 1096),
    "nine tokens": (9, 128, 8, 72, 24, 64),
    "16 tokens of few experts": (16, 6, 3, 136, 40, 520),
    "as many assignments as there may be": (16, 128, 8, 32, 16, 24),
}
OTHER_SIZES = {  # no kernel: the twin
    "17 tokens": (17, 8, 2, 16, 8, 8),
    "too many assignments": (16, 16, 9, 16, 8, 8),
    "too many experts": (1, 136, 2, 16, 8, 8),
    "odd widths": (3, 5, 3, 37, 11, 7),
    "odd dense width": (3, 8, 2, 16, 8, 11),
    "no dense columns": (2, 4, 2, 16, 8, 0),
}
kernels_alone = pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)


def inputs(backend, case, dtype):
    """Matrices of idle experts hold NaN: nobody reads them."""
    arguments = cases.moe_experts_small(backend, *{**CASES, **OTHER_SIZES}[case], dtype=dtype)
    routing = (arguments[name] for name in ("logits", "per_expert_scale", "k"))
    _, chosen = float64.moe_route(*routing)
    idle = [e for e in range(arguments["down"].shape[0]) if e not in chosen]
    for name in ("gate_up", "down"):
        arguments[name][idle] = float("nan")
    return arguments


def check(backend, arguments, dtype):
    results = backend.ops.moe_experts_small(**arguments)
    exact = float64.moe_experts_small(**arguments)
    rounded = float64.moe_experts_small(**arguments, dtype=dtype)
    terms = sum(arguments["down"].shape[1:]), max(arguments["dense"].shape[1], 1)
    for i, result in enumerate(results):
        assert result.is_contiguous()
        most = dict(magnitude=exact[i].abs().amax()) if i and result.numel() else {}
        assert_close_to_float64(result, exact[i], dtype, rounded=rounded[i], terms=terms[i], **most)


@all_dtypes
@pytest.mark.parametrize("case", [*CASES, *OTHER_SIZES])
def test_moe_experts_small(backend, poisoned_memory, case, dtype):
    check(backend, inputs(backend, case, dtype), dtype)


def test_equal_logits_go_to_the_lower_expert(backend):
    arguments = inputs(backend, "one token", BF16)
    arguments |= cases.moe_experts_small(backend, *CASES["one token"], dtype=BF16)
    arguments["logits"][0] = 0
    arguments["gate_up"][2:] = arguments["down"][2:] = float("nan")
    check(backend, arguments, BF16)


def test_strided(backend):
    arguments = inputs(backend, "nine tokens", BF16)
    for n, name in enumerate(("x", "dense_x"), 2):
        wide = backend.randn(9, n * 72, dtype=BF16)
        arguments[name] = wide[:, 8 : 8 + arguments[name].shape[1]]
    wide = backend.nan(9, 3 * 128, dtype=BF16)
    wide[:, 1:129] = arguments["logits"]
    arguments["logits"] = wide[:, 1:129]
    check(backend, arguments, BF16)


@pytest.mark.parametrize("mix", [{"logits": FP32}, {"per_expert_scale": FP32}], ids=str)
def test_mixed_dtypes(backend, mix):
    check(backend, in_dtypes(inputs(backend, "nine tokens", BF16), **mix), BF16)


@kernels_alone
@pytest.mark.parametrize("case", ["one token", "nine tokens", "16 tokens of few experts"])
def test_numbers_are_those_of_its_parts(backend, case):
    """To the bit: the same choice and the same sums."""
    arguments = inputs(backend, case, BF16)
    y, dense_y = backend.ops.moe_experts_small(**arguments)
    routing = (arguments[name] for name in ("logits", "per_expert_scale", "k"))
    weights, experts = backend.ops.moe_route(*routing)
    matrices = arguments["gate_up"], arguments["down"]
    assert torch.equal(y, backend.ops.moe_experts(arguments["x"], *matrices, experts, weights))
    dense, _ = backend.ops.linear_small(arguments["dense_x"], arguments["dense"])
    assert torch.equal(dense_y, dense)


@kernels_alone
@pytest.mark.parametrize("case", ["eight tokens, wider than a block's step", "nine tokens"])
def test_a_tokens_bits_do_not_depend_on_the_others(backend, case):
    arguments = inputs(backend, case, BF16)
    together = backend.ops.moe_experts_small(**arguments)
    for token in (0, 3, arguments["x"].shape[0] - 1):
        names = ("x", "logits", "dense_x")
        rows = {name: arguments[name][token : token + 1] for name in names}
        alone = backend.ops.moe_experts_small(**arguments | rows)
        assert all(torch.equal(a[0], b[token]) for a, b in zip(alone, together, strict=True))


def test_fp16_saturates(backend):
    """gelu(300) 300 is past fp16's largest value, and so is what down makes of it."""
    arguments = cases.moe_experts_small(backend, 1, 2, 1, 16, 8, 8, dtype=FP16)
    arguments["x"][:] = 1.0
    arguments["gate_up"][:] = 300.0 / 16
    arguments["down"][:] = 1.0
    arguments["per_expert_scale"][:] = 1.0
    y, _ = backend.ops.moe_experts_small(**arguments)
    assert (y == 65504).all()


BAD = {
    "logits": (lambda x: x[:, :32], ValueError, r"logits must have shape \[9, 128\], got \[9, 32"),
    "k": (lambda k: 0, ValueError, r"k must lie in 1..E = 128, got 0"),
    "dense": (lambda x: x[:8], ValueError, r"dense must be \[72, N\], got \[8, 64\]"),
    "dense_x": (lambda x: x[:2], ValueError, r"dense_x must have shape \[9, 64\], got \[2, 64\]"),
    "down": (lambda x: x[0], ValueError, r"down must be \[E, D, F\], got \[72, 24\]"),
    "gate_up": (lambda x: x.half(), TypeError, "gate_up must be torch.float32 or of the dtype"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(backend, name):
    change, error, sentence = BAD[name]
    arguments = inputs(backend, "nine tokens", BF16)
    changed = arguments | {name: change(arguments[name])}
    assert_refused(backend.ops.moe_experts_small, changed, error, sentence)
