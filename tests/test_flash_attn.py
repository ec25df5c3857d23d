"""flash-attn's functions: its masks and caches, written down here as its documentation has them."""

import pytest
import torch
from conftest import Backend

import gemma4_kernels
import gemma4_kernels.flash_attn as flash_attn


@pytest.fixture
def functions(backend, monkeypatch) -> Backend:
    monkeypatch.setattr(flash_attn, "ops", backend.ops)
    return backend


def expected(q, k, v, scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """One sequence in float64, from the whole mask."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhc,shc->hns", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(len(q))[:, None] + len(k) - len(q)
    j = torch.arange(len(k))
    left, right = window_size
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if left >= 0:
        hidden |= j < i - left
    if right >= 0:
        hidden |= j > i + right
    if causal:
        hidden |= j > i
    scores = scores.masked_fill(hidden, -torch.inf)
    p = scores.softmax(-1).nan_to_num()
    return torch.einsum("hns,shc->nhc", p, v), scores.logsumexp(-1)


def close(actual, wanted, atol=2e-2):
    torch.testing.assert_close(actual.double().cpu(), wanted, atol=atol, rtol=0)


OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "left window": dict(causal=True, window_size=(5, 0)),
    "left and right": dict(window_size=(3, 4)),
    "right alone": dict(window_size=(-1, 2)),
    "itself alone": dict(window_size=(0, 0)),
    "scale and softcap": dict(scale=0.3, softcap=2.0, causal=True),
}


def keywords(options):
    return {"softmax_scale" if name == "scale" else name: x for name, x in options.items()}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(13, 13), (5, 21)], ids=["same length", "tail"])
def test_flash_attn_func(functions, shape, options):
    options = OPTIONS[options]
    q = functions.randn(2, shape[0], 4, 64, dtype=torch.bfloat16)
    k, v = (functions.randn(2, shape[1], 2, 64, dtype=torch.bfloat16) for _ in "kv")
    out, lse, probabilities = flash_attn.flash_attn_func(
        q, k, v, return_attn_probs=True, **keywords(options)
    )
    assert probabilities is None
    alone = flash_attn.flash_attn_func(q, k, v, **keywords(options))
    for b in range(2):
        wanted, wanted_lse = expected(q[b], k[b], v[b], **options)
        close(out[b], wanted)
        close(alone[b], wanted)
        close(lse[b], wanted_lse, 1e-3)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("paged", [False, True], ids=["packed", "pages"])
def test_flash_attn_varlen_func(functions, paged, options):
    options, lengths_k = OPTIONS[options], (17, 4, 9)
    q = functions.randn(12, 4, 64, dtype=torch.bfloat16)
    k, v = (functions.randn(30, 2, 64, dtype=torch.bfloat16) for _ in "kv")
    cu_q, cu_k = functions.int32(0, 3, 3, 12), functions.int32(0, 17, 21, 30)
    keys, values, table = k, v, None
    if paged:
        keys, values = (functions.nan(4, 16, 2, 64, dtype=torch.bfloat16) for _ in "kv")
        table = functions.to(torch.tensor([[2, 0], [3, 3], [1, 1]], dtype=torch.int32))
        for b, (begin, length) in enumerate(zip((0, 17, 21), lengths_k, strict=True)):
            for j in range(length):
                page = int(table[b, j // 16])
                keys[page, j % 16], values[page, j % 16] = k[begin + j], v[begin + j]
    out = flash_attn.flash_attn_varlen_func(
        q, keys, values, cu_q, cu_k, 9, 17, block_table=table, **keywords(options)
    )
    for b in (0, 2):
        rows, cols = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        close(out[rows], expected(q[rows], k[cols], v[cols], **options)[0])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("num_new", [1, 3])
def test_flash_attn_with_kvcache(functions, num_new, paged, options):
    """New keys are written behind those of the cache, and seen."""
    options, lengths = OPTIONS[options], (7, 20)
    q = functions.randn(2, num_new, 4, 64, dtype=torch.bfloat16)
    new_k, new_v = (functions.randn(2, num_new, 2, 64, dtype=torch.bfloat16) for _ in "kv")
    shape = (4, 16) if paged else (2, 32)
    k_cache, v_cache = (functions.nan(*shape, 2, 64, dtype=torch.bfloat16) for _ in "kv")
    table = functions.to(torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)) if paged else None

    def view(cache, b):
        return cache[table[b].long()].flatten(0, 1) if paged else cache[b]

    for b, length in enumerate(lengths):
        for cache in (k_cache, v_cache):
            for j in range(length):
                row, slot = (int(table[b, j // 16]), j % 16) if paged else (b, j)
                cache[row, slot] = functions.randn(2, 64, dtype=torch.bfloat16)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        new_k,
        new_v,
        cache_seqlens=functions.int32(*lengths),
        block_table=table,
        return_softmax_lse=True,
        **keywords(options),
    )
    for b, length in enumerate(lengths):
        k, v = view(k_cache, b)[: length + num_new], view(v_cache, b)[: length + num_new]
        assert torch.equal(k[length:], new_k[b]) and torch.equal(v[length:], new_v[b])
        wanted, wanted_lse = expected(q[b], k, v, **options)
        close(out[b], wanted)
        close(lse[b], wanted_lse, 1e-3)


def test_the_cache_is_full_without_lengths(functions):
    q = functions.randn(2, 1, 2, 64, dtype=torch.bfloat16)
    k, v = (functions.randn(2, 9, 2, 64, dtype=torch.bfloat16) for _ in "kv")
    out = flash_attn.flash_attn_with_kvcache(q, k, v)
    assert torch.equal(out, flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=9))
    close(out[1], expected(q[1], k[1], v[1])[0])


def test_gradients():
    q, k, v = (torch.randn(2, 5, 2, 64, dtype=torch.float64).requires_grad_() for _ in "qkv")
    torch.autograd.gradcheck(
        lambda *x: flash_attn.flash_attn_func(*x, causal=True), (q, k, v), fast_mode=True
    )


@pytest.mark.parametrize(
    ("function", "option", "value"),
    [
        ("flash_attn_func", "dropout_p", 0.1),
        ("flash_attn_func", "alibi_slopes", torch.ones(2)),
        ("flash_attn_with_kvcache", "rotary_cos", "cos"),
        ("flash_attn_with_kvcache", "rotary_sin", "sin"),
        ("flash_attn_with_kvcache", "cache_batch_idx", "rows"),
        ("flash_attn_with_kvcache", "cache_leftpad", "pads"),
        ("flash_attn_with_kvcache", "alibi_slopes", "slopes"),
    ],
)
def test_what_is_not_supported_is_named(function, option, value):
    x = torch.zeros(1, 1, 1, 64)
    with pytest.raises(ValueError, match=f"{option} is not supported, got"):
        getattr(gemma4_kernels, function)(x, x, x, **{option: value})


def test_bad_input():
    x = torch.zeros(1, 1, 1, 64)
    with pytest.raises(ValueError, match=r"q must be \[B, N, H, C\].* got \[1, 1, 64\]"):
        flash_attn.flash_attn_func(x[0], x, x)
    with pytest.raises(ValueError, match=r"window_size .* got \(-2, 0\)"):
        flash_attn.flash_attn_func(x, x, x, window_size=(-2, 0))
    with pytest.raises(ValueError, match="k and v must come together"):
        flash_attn.flash_attn_with_kvcache(x, x, x, k=x)
