"""Every tile that the attention planner may choose, and scores that strain the running softmax."""

from itertools import accumulate

import pytest
import torch
from support import emulated
from support.attention import check

OPTIONS = {
    "causal": {},
    "window and softcap": dict(window=50, softcap=3.0),
    "window both ways": dict(causal=False, window=20, window_right=30),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("card", ["99 KB", "227 KB", "Hopper", "cuda"])
def test_prefill_tiles(on_card, card, head_dim, options, dtype):
    """3 heads a key head: rows of a tile belong to no whole number of tokens."""
    backend, options = on_card(card), OPTIONS[options]
    tokens, keys = 45, 107
    q = backend.randn(tokens, 6, head_dim, dtype=dtype, std=head_dim**-0.25)
    k = backend.randn(keys, 2, head_dim, dtype=dtype, std=head_dim**-0.25)
    v = backend.randn(keys, 2, head_dim, dtype=dtype)
    cu_q, cu_k = backend.int32(0, tokens), backend.int32(0, keys)
    actual = backend.ops.attention_prefill(
        q, k, v, cu_q, cu_k, tokens, keys, return_lse=True, **options
    )
    check(actual, q, k, v, dtype, **options)


@pytest.mark.parametrize("options", [*OPTIONS, "all"])
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize("card", ["Hopper", "cuda"])
def test_packed_tiles(on_card, card, head_dim, paged, options):
    """Sequences of no key, of no token, of fewer and of more keys than tiles in flight; what no
    sequence owns is NaN."""
    backend = on_card(card)
    options = OPTIONS.get(options, dict(causal=False))
    lengths = (0, 5), (30, 30), (3, 0), (2, 150), (70, 300)
    queries, keys = zip(*lengths, strict=True)
    dtype, group, page = torch.bfloat16, 3, 16
    q = backend.randn(sum(queries), group, head_dim, dtype=dtype, std=head_dim**-0.25)
    k, v = (backend.nan(sum(keys), 1, head_dim, dtype=dtype) for _ in "kv")
    pages = backend.to(torch.randperm(len(keys) * 19).int().view(len(keys), 19))
    k_pages, v_pages = (backend.nan(pages.numel(), page, 1, head_dim, dtype=dtype) for _ in "kv")
    first_q = first_k = 0
    expected = []
    for (n, s), row in zip(lengths, pages, strict=True):
        own_q, own = slice(first_q, first_q + n), slice(first_k, first_k + s)
        k[own] = backend.randn(s, 1, head_dim, dtype=dtype, std=head_dim**-0.25)
        v[own] = backend.randn(s, 1, head_dim, dtype=dtype)
        for key in range(s):
            k_pages[row[key // page], key % page] = k[first_k + key]
            v_pages[row[key // page], key % page] = v[first_k + key]
        expected.append((own_q, q[own_q], k[own], v[own]))
        first_q, first_k = first_q + n, first_k + s
    cu_q, cu_k = (backend.int32(*accumulate(x, initial=0)) for x in (queries, keys))
    held = (k_pages, v_pages) if paged else (k, v)
    out, lse = backend.ops.attention_prefill(
        q,
        *held,
        cu_q,
        cu_k,
        max(queries),
        max(keys),
        return_lse=True,
        block_table=pages if paged else None,
        **options,
    )
    for own, *tensors in expected:
        if tensors[1].shape[0] == 0:
            assert not out[own].any() and (lse[:, own] == -torch.inf).all()
        elif own.start < own.stop:
            check((out[own], lse[:, own]), *tensors, **options)


@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_decode_over_splits(on_card, head_dim, new_tokens):
    """Lengths at, before and past the bounds of splits, of 64 keys and of more; a batch of one
    gives the bits of the batch."""
    backend = on_card("99 KB")
    lengths = (600, 64, 65, 384, 7)
    dtype, heads = torch.bfloat16, 4
    q = backend.randn(len(lengths), new_tokens, heads, head_dim, dtype=dtype, std=head_dim**-0.25)
    k = backend.nan(len(lengths), 600, 1, head_dim, dtype=dtype)
    v = k.clone()
    for b, length in enumerate(lengths):
        k[b, :length] = backend.randn(length, 1, head_dim, dtype=dtype, std=head_dim**-0.25)
        v[b, :length] = backend.randn(length, 1, head_dim, dtype=dtype)
    out, lse = backend.ops.attention_decode(q, k, v, backend.int32(*lengths))
    for b, length in enumerate(lengths):
        check((out[b], lse[b]), q[b], k[b, :length], v[b, :length])
    alone, _ = backend.ops.attention_decode(q[1:2], k[1:2], v[1:2], backend.int32(lengths[1]))
    assert torch.equal(alone[0], out[1])


def decode(backend, q, k, v):
    return backend.ops.attention_decode(q[None], k[None], v[None], backend.int32(len(k)))


@pytest.mark.parametrize("size", [1e4, -1e4, 3e4])
def test_large_scores(on_card, size):
    """Equal scores of any size weigh all keys alike; one that is larger takes all."""
    backend = on_card("99 KB")
    q = torch.full((1, 2, 64), 4.0, dtype=torch.bfloat16)
    k = torch.full((300, 1, 64), size / 256, dtype=torch.bfloat16)
    v = backend.randn(300, 1, 64, dtype=torch.bfloat16)
    out, lse = decode(backend, q, k, v)
    check((out[0], lse[0]), q, k, v)
    k[271] += 4.0
    out, lse = decode(backend, q, k, v)
    assert torch.equal(out[0, 0, 0], v[271, 0])


def test_a_single_visible_key(on_card):
    backend = on_card("99 KB")
    q = backend.randn(40, 2, 256, dtype=torch.bfloat16)
    k, v = backend.randn(2, 40, 1, 256, dtype=torch.bfloat16).unbind(0)
    cu = backend.int32(0, 40)
    out, lse = backend.ops.attention_prefill(q, k, v, cu, cu, 40, 40, window=1, return_lse=True)
    assert torch.equal(out, v.expand(-1, 2, -1))
    scores = (q.double() * k.double()).sum(-1).T
    assert torch.allclose(lse.double(), scores, rtol=1e-5, atol=1e-3)


def test_many_keys(on_card, monkeypatch):
    """Half of the weight on the first key, the rest spread thin over the others, which are no
    multiple of any tile or split: a sum that bf16 or a lost rescaling would not hold. The card is
    large enough for all splits that there are."""
    backend = on_card("99 KB")
    monkeypatch.setattr(emulated.control().settings, "sm_count", 132)
    keys = 33000
    q = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    q[..., 0] = 1.0
    k = torch.zeros(keys, 1, 64, dtype=torch.bfloat16)
    k[0, 0, 0] = 10.375  # about ln 33000
    v = torch.ones(keys, 1, 64, dtype=torch.bfloat16)
    v[0] = -1.0
    out, lse = decode(backend, q, k, v)
    first = torch.tensor(10.375, dtype=torch.float64).exp()
    expected = (keys - 1 - first) / (keys - 1 + first)
    assert out.double().flatten()[0].item() == pytest.approx(expected.item(), abs=2e-3)
    assert lse.item() == pytest.approx((keys - 1 + first).log().item(), rel=1e-6)
