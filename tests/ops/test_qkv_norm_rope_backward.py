import pytest
import torch
from support import cases
from support.backends import BF16, FP16, FP32, in_dtypes
from support.gradients import assert_gradients, drawn
from support.marks import all_dtypes

CASES = {  # tokens, query heads, KV heads (None: borrows keys), C, live pairs, V given
    "one token": (1, 2, 1, 256, 128, True),
    "generic 128": (5, 8, 4, 128, 64, True),
    "more tokens than blocks": (24, 2, 1, 256, 128, True),
    "more heads than groups": (3, 9, 4, 256, 128, True),
    "sliding, borrowed keys": (5, 3, None, 256, 128, False),
    "full": (11, 4, 1, 512, 64, True),
    "full, V from K": (11, 3, 2, 512, 64, False),
}
# Enough for what is not about sizes.
SIZES = ("more tokens than blocks", "full, V from K")


def inputs(backend, case, dtype=FP32, **options):
    tokens, heads, kv_heads, head_dim, live, with_v = CASES[case]
    options |= dict(with_v=with_v, live=live, positions=torch.randperm(1000)[:tokens])
    arguments = cases.qkv_norm_rope(
        backend, tokens, heads, kv_heads, head_dim, dtype=dtype, **options
    )
    names = ("q", "k", "v", "q_weight", "k_weight")
    return arguments, tuple(name for name in names if arguments[name] is not None)


@all_dtypes
@pytest.mark.parametrize("case", CASES)
def test_gradients(backend, poisoned_memory, case, dtype):
    assert_gradients(backend, "qkv_norm_rope", *inputs(backend, case, dtype))


MIXES = {
    "autocast to bf16": (BF16, {"q_weight": FP32, "k_weight": FP32}),
    "two of 16 bits": (FP16, {"q_weight": BF16, "k_weight": BF16}),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", SIZES)
def test_weights_of_another_dtype(backend, poisoned_memory, case, mix):
    dtype, dtypes = MIXES[mix]
    arguments, wanted = inputs(backend, case, dtype)
    assert_gradients(backend, "qkv_norm_rope", in_dtypes(arguments, **dtypes), wanted)


@pytest.mark.parametrize("wanted", [("q", "k"), ("q_weight",), ("k_weight",)], ids=str)
def test_some_gradients(backend, poisoned_memory, wanted):
    arguments, _ = inputs(backend, "full, V from K", BF16)
    assert_gradients(backend, "qkv_norm_rope", arguments, wanted)


@pytest.mark.parametrize("unused", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize("case", SIZES)
def test_one_result_is_not_used(backend, poisoned_memory, case, unused):
    arguments, wanted = inputs(backend, case)
    grads = drawn(backend, "qkv_norm_rope", arguments)
    grads[unused] = None
    without = {0: ("q", "q_weight"), 1: ("k_weight",), 2: ()}[unused]
    if unused and "v" in wanted:
        without += ("kv"[unused - 1],)
    wanted = tuple(name for name in wanted if name not in without)
    assert_gradients(backend, "qkv_norm_rope", arguments, wanted, grads)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_heads_outermost(backend, dtype):
    """[H, T, C] memory seen as [T, H, C], of inputs and of gradients."""
    arguments, wanted = inputs(backend, "full", dtype, packed=False)
    grads = drawn(backend, "qkv_norm_rope", arguments)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in grads]
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    assert_gradients(backend, "qkv_norm_rope", arguments, wanted, turned)


def test_odd_addresses(backend):
    arguments, wanted = inputs(backend, "more tokens than blocks", BF16)
    for name in ("q", "q_weight", "inv_freq"):
        x = arguments[name]
        odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
        arguments[name] = odd
    assert_gradients(backend, "qkv_norm_rope", arguments, wanted)
