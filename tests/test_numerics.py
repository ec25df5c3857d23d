"""How far the kernels are from float64, on average, beside plain torch in the same dtype.

The op tests bound every single value; here a kernel may not be worse than what it replaces.
"""

import pytest
import torch
from support import float64
from support.backends import Backend

import gemma4_kernels

T = 64
pytestmark = pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)


def norm(b: Backend, dtype):
    return {"x": b.randn(T, 2560, dtype=dtype), "weight": b.weight(2560, dtype=dtype), "eps": 1e-6}


def add_norm(b: Backend, dtype):
    return {
        "x": b.randn(T, 2816, dtype=dtype, std=3.0),
        "residual": b.randn(T, 2816, dtype=dtype),
        **{n: b.weight(2816, dtype=dtype) for n in ("post_weight", "next_weight")},
        "scale": b.weight(1, dtype=dtype),
        "eps": 1e-6,
    }


def moe_norm(b: Backend, dtype):
    return {
        "x": b.randn(T, 2816, dtype=dtype, std=3.0),
        **{n: b.weight(2816, dtype=dtype) for n in ("weight", "scale")},
        "eps": 1e-6,
    }


def qkv(head_dim, last):
    """Positions up to `last`; frequencies of theta 1e4, or of 1e6 with a quarter of them alive."""

    def make(b: Backend, dtype):
        half = head_dim // 2
        inv_freq = (1e4 if head_dim == 256 else 1e6) ** (-torch.arange(half) / half)
        inv_freq[64 if head_dim == 512 else half :] = 0.0
        return {
            "q": b.randn(T, 4, head_dim, dtype=dtype),
            **{n: b.randn(T, 2, head_dim, dtype=dtype) for n in "kv"},
            **{n: b.weight(head_dim, dtype=dtype) for n in ("q_weight", "k_weight")},
            "positions": b.to(torch.linspace(last - 1000, last, T).long()),
            "inv_freq": b.to(inv_freq.float()),
            "eps": 1e-6,
        }

    return make


def ple(b: Backend, dtype):
    return {
        "ids": b.to(torch.randint(0, 50, (T,))),
        "table": b.randn(50, 3 * 256, dtype=dtype),
        "projected": b.randn(T, 3 * 256, dtype=dtype),
        "weight": b.weight(256, dtype=dtype),
        "eps": 1e-6,
    }


ROW_OPS = {
    "rms_norm": ("rms_norm", norm),
    "add_rms_norm": ("add_rms_norm", add_norm),
    "moe_norm": ("moe_norm", moe_norm),
    "qkv_norm_rope, sliding": ("qkv_norm_rope", qkv(256, 1000)),
    "qkv_norm_rope, full": ("qkv_norm_rope", qkv(512, 1000)),
    "qkv_norm_rope, far out": ("qkv_norm_rope", qkv(512, 262_143)),
    "geglu": ("geglu", lambda b, d: {"gate_up": b.randn(T, 2 * 2048, dtype=d)}),
    "ple_embed": ("ple_embed", ple),
    "ple_gate": (
        "ple_gate",
        lambda b, d: {
            "gate": b.randn(T, 256, dtype=d),
            "ple": b.randn(T, 2, 256, dtype=d),
            "layer": 1,
        },
    ),
    "softcap": ("softcap", lambda b, d: {"logits": b.randn(T, 4096, dtype=d, std=20), "cap": 30.0}),
}


def errors(results, exact):
    """The mean absolute error of each output."""
    results, exact = (x if isinstance(x, tuple) else (x,) for x in (results, exact))
    return [(r.double().cpu() - e).abs().mean().item() for r, e in zip(results, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", ROW_OPS)
def test_row_ops(backend, case, dtype):
    name, make = ROW_OPS[case]
    arguments = make(backend, dtype)
    exact = getattr(float64, name)(**arguments)
    by_kernel, by_twin = (
        errors(getattr(ops, name)(**arguments), exact) for ops in (backend.ops, gemma4_kernels)
    )
    # In fp32 the order of a sum and the library's tanh are all the error there is.
    factor = 1.5 if dtype == torch.float32 else 1.05
    for kernel, twin in zip(by_kernel, by_twin, strict=True):
        assert kernel <= factor * twin


@pytest.mark.parametrize("tokens", [1, 20, 150])
def test_moe_experts(backend, tokens):
    """Few tokens, some, many; 1.2 times, as sums of products in another order go."""
    num_experts, k, width, hidden, dtype = 8, 2, 64, 48, torch.bfloat16
    arguments = {
        "x": backend.randn(tokens, width, dtype=dtype),
        "gate_up": backend.randn(num_experts, 2 * hidden, width, dtype=dtype, std=0.2),
        "down": backend.randn(num_experts, width, hidden, dtype=dtype, std=0.15),
        "experts": backend.to(torch.rand(tokens, num_experts).argsort(-1)[:, :k].int()),
        "weights": backend.to(torch.rand(tokens, k) + 0.2),
    }
    exact = float64.moe_experts(**arguments)
    (by_kernel,), (by_twin,) = (
        errors(ops.moe_experts(**arguments), exact) for ops in (backend.ops, gemma4_kernels)
    )
    assert by_kernel <= 1.2 * by_twin


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
