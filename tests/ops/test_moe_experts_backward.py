"""Gradients of the experts: the backward op itself, of which the kernels make all."""

import pytest
import torch
from support import backward_cases, cases, float64
from support.backends import BF16, EAGER, FP16, FP32, in_dtypes

import gemma4_kernels
from gemma4_kernels import opset

BACKWARD = opset.OPS["moe_experts_backward"]
MADE = "x", "gate_up", "down", "weights"
# Assignments of each expert, how many are skipped, K, D, F: an expert more than a tile of tokens,
# stages that end early, tiles that are no wider than a chunk.
CASES = {
    "ragged": ((0, 1, 63, 65), 3, 1, 72, 72),
    "more than a tile": ((129, 0), 0, 1, 136, 24),
    "every stage": ((200,), 0, 1, 16, 8),
    "eight choices": ((12,) * 10, 8, 8, 40, 16),
    "wide": ((5, 64), 0, 1, 200, 136),
}


def inputs(backend, case, dtype, *wanted):
    """Experts of each token in no order; weights of what is skipped and of idle experts are NaN."""
    counts, skipped, k, width, hidden = CASES[case]
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    nobody = torch.tensor([-1, len(counts)])[torch.arange(skipped) % 2]
    tokens = (len(experts) + skipped) // k
    # Token t has every tokens-th: distinct ones, as no expert has more than there are tokens.
    chosen = torch.cat([experts, nobody]).view(k, tokens).T[torch.randperm(tokens)].contiguous()
    forward = cases.moe_experts(backend, tokens, len(counts), k, width, hidden, dtype=dtype)
    forward["experts"] = backend.to(chosen.int())
    forward["weights"][(forward["experts"] < 0) | (forward["experts"] == len(counts))] = torch.nan
    idle = [e for e, count in enumerate(counts) if count == 0]
    forward["gate_up"][idle] = forward["down"][idle] = torch.nan
    return backward_cases.moe_experts_backward(backend, forward, *wanted)


def call(backend, arguments):
    assert backend is not None
    return BACKWARD.registered(*arguments.values())


def differentiated(function, arguments):
    """What autograd makes of the forward."""
    leaves = {n: arguments[n].detach().cpu().requires_grad_() for n in MADE}
    given = cases.public("moe_experts", {n: arguments[n] for n in opset.OPS["moe_experts"].names})
    y = function(**(given | leaves | {"experts": arguments["experts"].cpu()}))
    return torch.autograd.grad(y, list(leaves.values()), arguments["grad"].to(y))


def in_float64(arguments):
    return {n: x.double() if n in (*MADE, "grad") else x for n, x in arguments.items()}


def check(arguments, gradients, dtype):
    """The error is no larger than what autograd makes of the eager twin in the same dtype."""
    weights = in_dtypes(arguments, gate_up=dtype, down=dtype)
    exact = differentiated(float64.moe_experts, in_float64(weights))
    twin = opset.OPS["moe_experts"].twin
    names = opset.OPS["moe_experts"].names
    rounded = differentiated(
        lambda **given: twin(*cases.complete("moe_experts", given).values()),
        {n: weights[n] for n in (*names, "grad")},
    )
    for name, gradient, by_twin, e in zip(MADE, gradients, rounded, exact, strict=True):
        assert gradient.dtype == arguments[name].dtype and gradient.is_contiguous()
        gradient = gradient.cpu().double()
        assert (gradient[e == 0] == 0).all(), f"{name} has a gradient where there is none"
        error, allowed = ((x.double() - e).square().mean().sqrt() for x in (gradient, by_twin))
        assert error <= 1.05 * allowed, f"{name}: error {error}, the twin's {allowed}"
        # None is far off, where a wrong one would hide in the mean.
        worst, most = (gradient - e).abs().max(), (by_twin.double() - e).abs().max()
        assert worst <= 3 * most, f"{name}: error {worst}, the twin's at most {most}"


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(backend, poisoned_memory, case, dtype):
    arguments = inputs(backend, case, dtype)
    check(arguments, call(backend, arguments), dtype)


@pytest.mark.parametrize("case", ["ragged", "wide"])
def test_gradients_on_hopper(on_card, poisoned_memory, case):
    arguments = inputs(on_card("Hopper"), case, BF16)
    check(arguments, call(EAGER, arguments), BF16)


@pytest.mark.parametrize("card", ["99 KB", "Hopper"])
def test_fp32_weights(on_card, poisoned_memory, card):
    """Values that 16 bits do not hold, so that their rounding shows; their gradients are fp32."""
    backend = on_card(card)
    arguments = in_dtypes(inputs(backend, "ragged", FP32), x=BF16, grad=BF16)
    check(arguments, call(backend, arguments), BF16)


WANTED = [(1, 0, 0, 1), (0, 0, 0, 1), (0, 1, 0, 0), (0, 0, 1, 0), (1, 1, 1, 0)]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_what_is_wanted_alone_is_made(backend, poisoned_memory, wanted):
    arguments = inputs(backend, "eight choices", BF16)
    whole = call(backend, arguments)
    wants = dict(zip(BACKWARD.names[-4:], map(bool, wanted), strict=True))
    for want, made, other in zip(wanted, call(backend, arguments | wants), whole, strict=True):
        assert torch.equal(made, other) if want else made.shape == (0,)


def test_strided(backend, poisoned_memory):
    """And routing weights in 16 bits, whose gradient is too."""
    arguments = in_dtypes(inputs(backend, "eight choices", BF16), weights=BF16)
    for name in ("x", "grad"):
        wide = backend.nan(arguments[name].shape[0], 64, dtype=BF16)
        wide[:, 8:48] = arguments[name]
        arguments[name] = wide[:, 8:48]
    arguments["experts"] = arguments["experts"].T.contiguous().T
    check(arguments, call(backend, arguments), BF16)


def test_what_fp16_holds_back_has_no_gradient(backend):
    """gelu(300) 300 is past its largest value: neither gate nor up moves it."""
    tokens = 3
    ones = backend.to(torch.ones(tokens, 1))
    arguments = {
        "x": backend.to(torch.ones(tokens, 16, dtype=FP16)),
        "gate_up": backend.to(torch.full((1, 16, 16), 300.0 / 16, dtype=FP16)),
        "down": backend.to(torch.full((1, 16, 8), 1e-3, dtype=FP16)),
        "experts": backend.int32(0, 0, 0)[:, None],
        "weights": ones,
    }
    arguments["gate_up"][0, 7] = arguments["gate_up"][0, 15] = 1.0 / 16  # the last one moves
    given = backward_cases.moe_experts_backward(backend, arguments)
    given["grad"] = torch.ones_like(given["x"])
    dx, d_gate_up, d_down, d_weights = call(backend, given)
    moves = torch.tensor([False] * 7 + [True])
    assert torch.equal((d_gate_up[0] != 0).any(1).cpu(), moves.repeat(2))
    assert (dx != 0).all() and (d_down[0, :, 0] == 3 * 65504.0).logical_or(
        d_down[0, :, 0].isinf()
    ).all()
    assert d_weights.cpu().flatten().tolist() == pytest.approx(
        [16 * 0.001 * (7 * 65504 + 0.8412)] * tokens, rel=2e-3
    )


@pytest.mark.parametrize("empty", [(0, 4, 2, 16, 8), (5, 4, 0, 16, 8), (5, 4, 2, 16, 0)], ids=str)
def test_nothing_to_do_is_zero(backend, poisoned_memory, empty):
    forward = cases.moe_experts(backend, *empty, dtype=BF16)
    arguments = backward_cases.moe_experts_backward(backend, forward)
    for name, gradient in zip(MADE, call(backend, arguments), strict=True):
        assert gradient.shape == arguments[name].shape and (gradient == 0).all()


def test_packed_weights_have_none(backend):
    """Their x and routing weights have, by the eager twin."""
    forward = cases.moe_experts(backend, 3, 2, 1, 64, 64, dtype=BF16, form={})
    leaves = {n: forward[n].requires_grad_() for n in ("x", "weights")}
    y = gemma4_kernels.moe_experts(**forward)
    for gradient in torch.autograd.grad(y.float().sum(), list(leaves.values())):
        assert gradient.abs().max() > 0
