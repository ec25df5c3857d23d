import warnings

import pytest
import torch
from support import cases, float64
from support.backends import BF16, FP16, FP32, in_dtypes
from support.expect import NoHostReads, assert_close_to_float64, assert_refused
from support.marks import all_dtypes

from gemma4_kernels import opset

CASES = {  # T, E, K, D, F, how experts are drawn
    "no tokens": (0, 4, 2, 16, 8, "random"),
    "no choices": (5, 4, 0, 16, 8, "random"),
    "no experts": (5, 0, 0, 16, 8, "random"),
    "no hidden width": (5, 4, 2, 16, 0, "random"),
    "one token": (1, 8, 2, 64, 24, "random"),
    "one expert": (5, 1, 1, 16, 8, "random"),
    "all experts": (5, 4, 4, 16, 8, "random"),
    "best alone": (9, 8, 1, 32, 16, "random"),
    "odd widths": (7, 5, 3, 37, 11, "random"),
    "idle experts": (3, 64, 2, 16, 8, "random"),
    "all on one expert": (70, 4, 1, 16, 8, "expert 2"),
    "some skipped": (20, 6, 3, 32, 16, "half skipped"),
    "all skipped": (4, 6, 2, 32, 16, "all skipped"),
    "more tokens than a tile": (150, 8, 2, 32, 16, "random"),
    "26B-A4B, narrow": (4, 128, 8, 88, 48, "random"),
    "eight tokens, wider than a block's step": (8, 40, 8, 520, 136, "random"),
    "nine tokens": (9, 128, 8, 72, 24, "random"),
    "several tiles of 32": (70, 16, 1, 72, 24, "expert 2"),
    "several tiles of 64, skipped": (150, 6, 3, 136, 72, "half skipped"),
    "several tiles of 128": (300, 2, 1, 136, 72, "random"),
    "width 24": (9, 4, 2, 64, 24, "random"),
    "width 44": (9, 4, 2, 64, 44, "random"),
    "width 88": (9, 4, 2, 64, 88, "random"),
    "width 176": (9, 4, 2, 64, 176, "random"),
    "2F below D": (9, 4, 2, 64, 16, "random"),
    "2F equals D": (9, 4, 2, 64, 32, "random"),
    "2F above D": (9, 4, 2, 64, 48, "random"),
    "2F equals D equals E": (9, 16, 2, 16, 8, "random"),
}


def inputs(backend, case, dtype):
    """Weights of skipped slots and matrices of idle experts hold NaN: nobody reads them."""
    tokens, num_experts, k, width, hidden, draw = CASES[case]
    arguments = cases.moe_experts(backend, tokens, num_experts, k, width, hidden, dtype=dtype)
    chosen = arguments["experts"]
    if draw == "expert 2":
        chosen[:] = 2
    elif draw != "random":
        skipped = backend.to(torch.rand(tokens, k) < (0.5 if draw == "half skipped" else 2.0))
        chosen[skipped] = num_experts
        arguments["weights"][skipped] = float("nan")
    idle = [e for e in range(num_experts) if e not in chosen]
    for name in ("gate_up", "down"):
        arguments[name][idle] = float("nan")
    return arguments


def check(backend, arguments, dtype):
    y = backend.ops.moe_experts(**arguments)
    assert y.is_contiguous()
    # What fp32 weights are multiplied as.
    arguments = in_dtypes(arguments, gate_up=dtype, down=dtype)
    exact = float64.moe_experts(**arguments)
    rounded = float64.moe_experts(**arguments, dtype=dtype)
    # Two chained sums of D and F products.
    terms = sum(arguments["down"].shape[1:])
    assert_close_to_float64(y, exact, dtype, rounded=rounded, terms=terms)


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_moe_experts(backend, poisoned_memory, case, dtype):
    check(backend, inputs(backend, case, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [n for n in CASES if CASES[n][0] > 60])
def test_tiles_on_hopper(on_card, poisoned_memory, case, dtype):
    """The same tiles with the products that sm_90a is compiled with."""
    backend = on_card("Hopper")
    check(backend, inputs(backend, case, dtype), dtype)


def fp32_weights(backend, case, dtype):
    """Values that 16 bits do not hold, so that their rounding shows."""
    return in_dtypes(inputs(backend, case, FP32), x=dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_fp32_weights(backend, poisoned_memory, case, dtype):
    check(backend, fp32_weights(backend, case, dtype), dtype)


@pytest.mark.parametrize("case", [n for n in CASES if CASES[n][0] > 60])
def test_fp32_weights_on_hopper(on_card, poisoned_memory, case):
    backend = on_card("Hopper")
    check(backend, fp32_weights(backend, case, BF16), BF16)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
def test_dtypes_of_index_and_weight(backend, index, weight):
    arguments = inputs(backend, "some skipped", torch.bfloat16)
    arguments["experts"] = arguments["experts"].to(index)
    arguments["weights"] = arguments["weights"].to(weight)
    check(backend, arguments, torch.bfloat16)


@pytest.mark.parametrize("index", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("case", ["one token", "nine tokens", "several tiles of 64, skipped"])
@pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)
def test_ids_of_no_expert_are_skipped(backend, poisoned_memory, case, index):
    """-1 as in an expert map, E, and anything beyond."""
    arguments = inputs(backend, case, torch.bfloat16)
    experts, num_experts = arguments["experts"].to(index), arguments["down"].shape[0]
    beyond = num_experts if num_experts <= torch.iinfo(index).max else -2
    for n, nobody in enumerate((-1, beyond, torch.iinfo(index).min)):
        experts.flatten()[n::5] = nobody
    arguments["experts"] = experts
    idle = [e for e in range(num_experts) if e not in experts]
    arguments["gate_up"][idle] = arguments["down"][idle] = float("nan")
    skipped = (experts < 0) | (experts.long() >= num_experts)
    exact = arguments | {"weights": arguments["weights"].masked_fill(skipped, float("nan"))}
    check(backend, exact, torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 12, 200], ids=["few", "some", "tiles"])
def test_fp16_saturates(backend, tokens):
    """gelu(300) 300 is past fp16's largest value, and so is what down makes of it."""
    largest = 65504.0
    chosen = torch.arange(tokens)[:, None] % 2
    x = backend.to(torch.full((tokens, 16), 1.0, dtype=FP16))
    gate_up = torch.full((2, 16, 16), 300.0 / 16, dtype=FP16)
    gate_up[1, 8:] = -300.0 / 16
    down = torch.full((2, 16, 8), 0.0, dtype=FP16)
    down[:, :, 0] = 0.5  # half of one hidden value
    down[:, 3:6] = 1.0  # eight of them
    y = backend.ops.moe_experts(
        x,
        backend.to(gate_up),
        backend.to(down),
        backend.to(chosen),
        backend.to(torch.ones(tokens, 1)),
    )
    expected = torch.full((16,), largest / 2)
    expected[3:6] = largest
    assert torch.equal(y.cpu(), (expected * (1 - 2 * chosen)).to(FP16))


def test_strided(backend):
    arguments = inputs(backend, "width 24", torch.float32)
    arguments["x"] = backend.randn(9, 3 * 64)[:, 64:128]
    check(backend, arguments, torch.float32)
    arguments["x"] = backend.randn(64, 9).T
    arguments["gate_up"] = arguments["gate_up"].transpose(1, 2).contiguous().transpose(1, 2)
    arguments["experts"] = arguments["experts"].T.contiguous().T
    arguments["weights"] = arguments["weights"].T.contiguous().T
    check(backend, arguments, torch.float32)


@pytest.mark.parametrize(("gate_first", "expected"), [(True, 1.954598), (False, 0.841192 * 2)])
def test_gelu_is_the_tanh_form_of_the_first_half(backend, gate_first, expected):
    """Gate 2, up 1: the erf form would give 1.954500, SiLU 1.761594."""
    rows = [[2.0], [1.0]] if gate_first else [[1.0], [2.0]]
    y = backend.ops.moe_experts(
        backend.to(torch.ones(1, 1)),
        backend.to(torch.tensor([rows])),
        backend.to(torch.ones(1, 1, 1)),
        backend.int32(0)[None],
        backend.to(torch.ones(1, 1)),
    )
    assert y.item() == pytest.approx(expected, abs=1e-6)


def test_order_of_the_choices_does_not_matter(backend):
    arguments = inputs(backend, "more tokens than a tile", torch.float32)
    y = backend.ops.moe_experts(**arguments)
    for name in ("experts", "weights"):
        arguments[name] = arguments[name].flip(1)
    exact = y.double().cpu()
    assert_close_to_float64(backend.ops.moe_experts(**arguments), exact, torch.float32, terms=48)


def test_tokens_do_not_depend_on_their_neighbours(backend):
    """A NaN stays in its own row."""
    arguments = inputs(backend, "more tokens than a tile", torch.float32)
    arguments["x"][3] = float("nan")
    y = backend.ops.moe_experts(**arguments)
    assert y[3].isnan().all()
    assert torch.cat([y[:3], y[4:]]).isfinite().all()


def test_same_bits_every_time(backend):
    arguments = inputs(backend, "more tokens than a tile", torch.bfloat16)
    first = backend.ops.moe_experts(**arguments)
    for _ in range(3):
        assert torch.equal(backend.ops.moe_experts(**arguments), first)


@pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)
def test_bits_of_a_token_do_not_depend_on_the_others(backend):
    """While the weights are streamed past the tokens (up to 8 an expert), and again among tiles."""
    arguments = inputs(backend, "more tokens than a tile", torch.bfloat16)
    by_token = ("x", "experts", "weights")
    many = arguments["x"].shape[0]
    for counts in ((1, 5, 8, 9, 30), (40, many)):
        first = {n: a[: counts[0]] if n in by_token else a for n, a in arguments.items()}
        expected = backend.ops.moe_experts(**first)
        for count in counts[1:]:
            part = {n: a[:count] if n in by_token else a for n, a in arguments.items()}
            assert torch.equal(backend.ops.moe_experts(**part)[: counts[0]], expected)


@pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)
@pytest.mark.parametrize("case", ["one token", "idle experts", "more tokens than a tile"])
def test_routing_stays_on_the_device(backend, case):
    """What a CUDA graph needs: the host waits for nothing."""
    arguments = inputs(backend, case, torch.bfloat16)
    backend.ops.moe_experts(**arguments)
    with NoHostReads():
        backend.ops.moe_experts(**arguments)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            arguments["experts"].flatten()[0].item()


def test_a_call_without_a_kernel_is_named(backend):
    """Where there is a kernel, but not for this width, a warning says so; the CPU has none."""
    opset.warn.cache_clear()
    arguments = inputs(backend, "width 44", torch.bfloat16)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            backend.ops.moe_experts(**arguments)
    words = [str(w.message) for w in seen]
    expected = "moe_experts runs eager torch, without a kernel: it is for widths that are multiples"
    assert [w[: len(expected)] for w in words] == [expected] * (backend.name != "eager")


FLOATING = ("x", "gate_up", "down", "weights")
NOTHING = [n for n, (*sizes, draw) in CASES.items() if 0 in sizes or draw == "all skipped"]


def gradients(function, arguments, grad):
    leaves = {n: arguments[n].detach().clone().requires_grad_() for n in FLOATING}
    y = function(**(arguments | leaves))
    return torch.autograd.grad(y, list(leaves.values()), grad, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [n for n in CASES if n not in NOTHING])
def test_gradient(device_backend, poisoned_memory, case, dtype):
    """What emulated kernels make is in test_moe_experts_backward.py."""
    check_gradient(device_backend, case, dtype)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_gradient_by_kernels(backend, poisoned_memory):
    check_gradient(backend, "several tiles of 64, skipped", torch.bfloat16)


def check_gradient(backend, case, dtype):
    arguments = inputs(backend, case, dtype)
    grad = backend.randn(*arguments["x"].shape, dtype=dtype)
    actual = gradients(backend.ops.moe_experts, arguments, grad)
    exact = {n: x.double().cpu() if n in FLOATING else x.cpu() for n, x in arguments.items()}
    expected = gradients(float64.moe_experts, exact, grad.double().cpu())
    terms = sum(arguments["down"].shape[1:]) + arguments["x"].shape[0]
    for name, a, e in zip(FLOATING, actual, expected, strict=True):
        # A chain of at most six roundings, each to the size of the tensor's larger values.
        size = e.abs().max()
        rounded = e + 3 * torch.finfo(dtype).eps * size
        kind = arguments[name].dtype
        inner = torch.promote_types(dtype, torch.float32)
        assert_close_to_float64(
            a, e, kind, rounded=rounded, terms=terms, magnitude=size, inner=inner
        )


@pytest.mark.parametrize("case", NOTHING)
def test_gradient_of_nothing_is_zero(device_backend, poisoned_memory, case):
    arguments = inputs(device_backend, case, torch.float32)
    grad = device_backend.randn(*arguments["x"].shape)
    for gradient in gradients(device_backend.ops.moe_experts, arguments, grad):
        assert (gradient == 0).all()


def test_gradient_of_idle_experts_is_zero(backend, poisoned_memory):
    arguments = inputs(backend, "all on one expert", torch.float32)
    grad = backend.randn(*arguments["x"].shape)
    _, gate_up, down, _ = gradients(backend.ops.moe_experts, arguments, grad)
    for gradient in (gate_up, down):
        assert (gradient[[0, 1, 3]] == 0).all()
        assert gradient[2].abs().max() > 0


def test_gradient_of_skipped_weights_is_zero(backend, poisoned_memory):
    arguments = inputs(backend, "some skipped", torch.float32)
    grad = backend.randn(*arguments["x"].shape)
    *_, weights = gradients(backend.ops.moe_experts, arguments, grad)
    skipped = arguments["experts"] == 6
    assert (weights[skipped] == 0).all() and (weights[~skipped] != 0).all()


BAD = {
    "integer x": ({"x": lambda x: x.int()}, TypeError, "x must be a floating.*got torch.int32"),
    "batched x": ({"x": lambda x: x[None]}, ValueError, r"x must be \[T, D\], got \[1, 20, 32\]"),
    "gate_up dtype": (
        {"gate_up": lambda g: g.half()},
        TypeError,
        "gate_up must be torch.float32 or of the dtype of x, torch.float32, got torch.float16",
    ),
    "gate_up device": (
        {"gate_up": lambda g: g.to("meta")},
        ValueError,
        "gate_up must be on the device of x, c.*, got meta",
    ),
    "gate_up transposed": (
        {"gate_up": lambda g: g[:, :30].transpose(1, 2)},
        ValueError,
        r"gate_up must have shape \[6, 32, 32\], got \[6, 32, 30\]",
    ),
    "odd gate_up": (
        {"gate_up": lambda g: g[:, :31]},
        ValueError,
        r"gate_up must have shape \[6, 32, 32\], got \[6, 31, 32\]",
    ),
    "experts of gate_up": (
        {"gate_up": lambda g: g[:5]},
        ValueError,
        r"gate_up must have shape \[6, 32, 32\], got \[5, 32, 32\]",
    ),
    "down dtype": (
        {"down": lambda d: d.double()},
        TypeError,
        "down must be torch.float32 or of the dtype of x, torch.float32, got torch.float64",
    ),
    "down transposed": (
        {"down": lambda d: d.transpose(1, 2)},
        ValueError,
        r"down must be \[E, 32, F\], got \[E, 16, F\]",
    ),
    "flat down": (
        {"down": lambda d: d[0]},
        ValueError,
        r"down must be \[E, D, F\], got \[32, 16\]",
    ),
    "float experts": (
        {"experts": lambda e: e.float()},
        TypeError,
        "experts must hold integers, got torch.float32",
    ),
    "tokens of experts": (
        {"experts": lambda e: e[:19]},
        ValueError,
        r"experts must be \[20, K\], got \[19, 3\]",
    ),
    "flat experts": (
        {"experts": lambda e: e[:, 0]},
        ValueError,
        r"experts must be \[20, K\], got \[20\]",
    ),
    "experts device": (
        {"experts": lambda e: e.to("meta")},
        ValueError,
        "experts must be on the device of x, c.*, got meta",
    ),
    "integer weights": (
        {"weights": lambda w: w.int()},
        TypeError,
        "weights must be a floating.*got torch.int32",
    ),
    "weights shape": (
        {"weights": lambda w: w[:, :2]},
        ValueError,
        r"weights must have shape \[20, 3\], got \[20, 2\]",
    ),
    "weights device": (
        {"weights": lambda w: w.to("meta")},
        ValueError,
        "weights must be on the device of x, c.*, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, case):
    changes, error, sentence = BAD[case]
    arguments = inputs(backend, "some skipped", torch.float32)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    assert_refused(backend.ops.moe_experts, arguments, error, sentence)
