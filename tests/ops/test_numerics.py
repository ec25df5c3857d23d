"""How far the kernels are from float64, on average, beside plain torch in the same dtype.

The op tests bound every single value; here a kernel may not be worse than what it replaces.
"""

import pytest
import torch
from support import cases, float64
from support.cases import complete, public
from support.small_calls import CASES, case_of

import gemma4_kernels

pytestmark = pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)
T = 64
# By the name of a case; those that turn heads stand in ROPE.
ROW_OPS = [name for name, (op, *_) in CASES.items() if hasattr(float64, op) and "rope" not in op]
ROPE = {  # head_dim, live pairs, their theta, the last position
    "sliding": (256, 128, 1e4, 1000),
    "full": (512, 64, 1e6, 1000),
    "far out": (512, 64, 1e6, 262_143),
}


def errors(results, exact):
    """The mean absolute error of each output."""
    results, exact = (x if isinstance(x, tuple) else (x,) for x in (results, exact))
    return [(r.double().cpu() - e).abs().mean().item() for r, e in zip(results, exact, strict=True)]


def assert_no_worse(backend, op, arguments, factor):
    arguments = public(op, complete(op, arguments))
    exact = getattr(float64, op)(**arguments)
    by_kernel, by_twin = (
        errors(getattr(ops, op)(**arguments), exact) for ops in (backend.ops, gemma4_kernels)
    )
    for kernel, twin in zip(by_kernel, by_twin, strict=True):
        assert kernel <= factor * twin


# In fp32 the order of a sum and the library's tanh are all the error there is.
FACTORS = {torch.bfloat16: 1.05, torch.float16: 1.05, torch.float32: 1.5}
all_factors = pytest.mark.parametrize("dtype", FACTORS, ids=str)


@all_factors
@pytest.mark.parametrize("case", ROW_OPS)
def test_row_ops(backend, case, dtype):
    op, arguments = case_of(backend, case, dtype)
    assert_no_worse(backend, op, arguments, FACTORS[dtype])


@all_factors
@pytest.mark.parametrize("case", ROPE)
def test_rope(backend, case, dtype):
    head_dim, live, theta, last = ROPE[case]
    arguments = cases.qkv_norm_rope(backend, T, 4, 2, head_dim, dtype=dtype)
    arguments["inv_freq"] = backend.to(cases.frequencies(head_dim, live, theta))
    arguments["positions"] = backend.to(torch.linspace(last - 1000, last, T).long())
    assert_no_worse(backend, "qkv_norm_rope", arguments, FACTORS[dtype])


@pytest.mark.parametrize("tokens", [1, 20, 150])
def test_moe_experts(backend, tokens):
    """Few tokens, some, many; 1.2 times, as sums of products in another order go."""
    arguments = cases.moe_experts(backend, tokens, 8, 2, 64, 48, dtype=torch.bfloat16)
    assert_no_worse(backend, "moe_experts", arguments, 1.2)


def softmax_attention(q, k, v, window, dtype):
    """With whole rows of scores: products in fp32 of values in `dtype`, softmax in fp32, the
    probabilities rounded to `dtype`. In float64 throughout, the exact result."""
    acc = torch.promote_types(dtype, torch.float32)
    queries, keys = q.shape[0], k.shape[0]
    position = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)
    hidden = (key > position) | (key <= position - window)
    scores = torch.einsum("ihc,jhc->hij", q.to(acc), k.to(acc).expand(-1, q.shape[1], -1))
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(dtype)
    return torch.einsum("hij,jhc->ihc", p.to(acc), v.to(acc).expand(-1, q.shape[1], -1)).to(dtype)


LONG = {  # queries, keys, heads, head_dim, window
    "prefill 256, window 1024": (1024, 2048, 1, 256, 1024),
    "prefill 512": (1024, 1024, 1, 512, 1 << 30),
    "tail 512 of 4096": (48, 4096, 2, 512, 1 << 30),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
def test_attention_over_thousands_of_keys(backend, case):
    queries, keys, heads, head_dim, window = LONG[case]
    dtype = torch.bfloat16
    q = backend.randn(queries, heads, head_dim, dtype=dtype, std=head_dim**-0.25)
    k = backend.randn(keys, 1, head_dim, dtype=dtype, std=head_dim**-0.25)
    v = backend.randn(keys, 1, head_dim, dtype=dtype)
    exact = softmax_attention(*(x.double().cpu() for x in (q, k, v)), window, torch.float64)
    plain = softmax_attention(*(x.cpu() for x in (q, k, v)), window, dtype)
    cu_q, cu_k = backend.int32(0, queries), backend.int32(0, keys)
    out, _ = backend.ops.attention_prefill(
        q, k, v, cu_q, cu_k, queries, keys, window=window if window < keys else 0
    )
    (by_kernel,), (by_plain,) = errors(out, exact), errors(plain, exact)
    assert by_kernel <= 1.2 * by_plain
