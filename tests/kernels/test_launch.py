"""What a launch may be: more rows and sequences than a grid's y and z hold, no more blocks than a
card starts, workspaces that do not follow what was reserved, and no cache copied in silence."""

import pytest
import torch
from support import emulated
from support.attention import check
from support.backends import BF16
from support.marks import emulated_backend, needs_compiler

from gemma4_kernels import opset

pytestmark = needs_compiler
MANY = 70_000  # a grid's y and z end at 65,535
SOME = (0, 1, 65_534, 65_535, 65_536, MANY - 1)


@pytest.fixture
def backend(monkeypatch):
    """The emulated one, each call run once: its time goes into blocks that find nothing to do."""
    monkeypatch.setattr(emulated.control().settings, "max_seconds", 600.0)
    monkeypatch.setattr(emulated.control().settings, "races", False)
    with emulated.one_schedule():
        yield emulated_backend()


def lengths_of(every):
    lengths = torch.full((MANY,), every, dtype=torch.int32)
    lengths[list(SOME)] = 1
    return lengths


def one_token_each(backend, every):
    """q, k and v of sequences of one token, and where each begins."""
    lengths = lengths_of(every)
    tokens = int(lengths.sum())
    q = backend.randn(tokens, 1, 64, dtype=BF16)
    k, v = (backend.randn(tokens, 1, 64, dtype=BF16) for _ in "kv")
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    return q, k, v, starts


@pytest.mark.parametrize("every", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_prefill_of_many_sequences(backend, every):
    """A query that sees its own key alone gets its value."""
    q, k, v, starts = one_token_each(backend, every)
    out, lse = backend.ops.attention_prefill(q, k, v, starts, starts, 1, 1, return_lse=True)
    assert torch.equal(out, v)
    exact = (q.double() * k.double()).sum(-1).T
    assert torch.allclose(lse.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_prefill_backward_of_many_sequences(backend):
    q, k, v, starts = one_token_each(backend, 0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad = backend.randn(*q.shape, dtype=BF16)
    out, _ = backend.ops.attention_prefill(*leaves, starts, starts, 1, 1)
    out.backward(grad)
    assert torch.equal(v.grad, grad)
    assert q.grad.abs().max() < 0.1 and k.grad.abs().max() < 0.1  # of one weight, always 1


@pytest.mark.slow
def test_decode_of_many_sequences(backend):
    k, v = (backend.randn(MANY, 1, 1, 64, dtype=BF16) for _ in "kv")
    q = backend.randn(MANY, 1, 1, 64, dtype=BF16)
    lengths = lengths_of(0)
    out, _ = backend.ops.attention_decode(q, k, v, lengths)
    assert torch.equal(out, v * (lengths == 1).to(BF16)[:, None, None, None])


@pytest.mark.slow
def test_softcap_argmax_of_many_rows(backend):
    """Past 65,535 rows it is launched again."""
    best = torch.arange(MANY) % 7
    logits = torch.zeros(MANY, 8)[:, :7].scatter(1, best[:, None], 5.0)
    assert torch.equal(backend.ops.softcap_argmax(logits, 30.0), best)


@pytest.mark.slow
def test_elementwise_kernels_walk_over_rows(backend):
    """Eight rows a block: y ends at 524,280 of them."""
    x = backend.randn(530_000, 2, std=2.0)
    gate, up = x.double().unbind(1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    exact = 0.5 * gate * (1 + inner.tanh()) * up
    y = backend.ops.geglu(x)
    assert torch.allclose(y[:, 0].double(), exact, rtol=1e-5, atol=1e-5)


def test_a_grid_that_no_card_starts_is_refused_by_name(backend):
    heads = 65_536
    q = torch.zeros(1, heads, 64, dtype=BF16)
    cu = backend.int32(0, 1)
    with pytest.raises(RuntimeError, match="attention_prefill: no card starts 1 x 65536 x 1 bl"):
        backend.ops.attention_prefill(q, q, q, cu, cu, 1, 1)


def workspace_bytes(backend, monkeypatch, batch, new_tokens, heads, slots):
    """Of the fp32 results that decode's parts of the keys leave, no key being there."""
    control = emulated.control()
    monkeypatch.setattr(control.settings, "profile", True)
    control.reset_counts()
    q = torch.zeros(batch, new_tokens, heads, 512, dtype=BF16)
    cache = torch.zeros(1, 1, 1, 512, dtype=BF16).expand(batch, slots, 1, 512)
    lengths = torch.zeros(batch, dtype=torch.int32)
    out, _ = backend.ops.attention_decode(q, cache, cache, lengths)
    assert not out.any()
    return sum(b.bytes for b in control.counts().buffers if b.name == "partial_out")


WORKSPACES = {  # batch, new tokens, heads: splits
    (1, 1, 8): 64,
    (2, 16, 16): 16,
    (16, 1, 16): 64,
    (64, 1, 8): 16,
}


@pytest.mark.parametrize("shape", WORKSPACES, ids=str)
def test_workspace_of_decode_is_bounded(backend, monkeypatch, shape):
    """However much is reserved; a million slots are what a long context has."""
    monkeypatch.setattr(emulated.control().settings, "sm_count", 132)
    batch, new_tokens, heads = shape
    held = workspace_bytes(backend, monkeypatch, batch, new_tokens, heads, 2**20)
    splits = WORKSPACES[shape]
    parts = splits + (-(-splits // 8) if splits > 8 else 0)  # and of merges of eight
    # Each launch is counted with its buffers: the parts are written by one and read by the next.
    assert held // 2 == parts * batch * new_tokens * heads * 512 * 4 <= 64 << 20


def test_bits_of_decode_do_not_depend_on_what_is_reserved(backend):
    q = backend.randn(1, 1, 2, 64, dtype=BF16)
    k, v = (backend.nan(1, 40_000, 1, 64, dtype=BF16) for _ in "kv")
    k[:, :700], v[:, :700] = (backend.randn(1, 700, 1, 64, dtype=BF16) for _ in "kv")
    length = backend.int32(700)
    roomy = backend.ops.attention_decode(q, k, v, length)
    for slots in (700, 701, 3000):
        tight = backend.ops.attention_decode(q, k[:, :slots], v[:, :slots], length)
        assert all(map(torch.equal, tight, roomy))


def transposed(cache):
    """The same values, with other strides."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def test_caches_of_unlike_strides_are_named(backend):
    """One offset finds a key and its value, or no kernel does; the op's twin serves them."""
    kernels = getattr(torch.ops, emulated.NAME)
    q = backend.randn(2, 3, 4, 64, dtype=BF16)
    k, v = (backend.randn(2, 50, 2, 64, dtype=BF16) for _ in "kv")
    v = transposed(v)
    lengths = backend.int32(50, 31)
    with pytest.raises(RuntimeError, match="k_cache and v_cache must have the same strides"):
        kernels.attention_decode(q, k, v, None, None, lengths, None, 1.0, 0, False, 0.0, True)
    opset.warn.cache_clear()
    with pytest.warns(UserWarning, match="k_cache and v_cache must have the same strides, got "):
        out, lse = backend.ops.attention_decode(q, k, v, lengths)
    for b, length in enumerate((50, 31)):
        check((out[b], lse[b]), q[b], k[b, :length], v[b, :length])
    pages = torch.tensor([[1, 0]], dtype=torch.int32)
    cu_q, cu_k = backend.int32(0, 3), backend.int32(0, 90)
    with pytest.warns(UserWarning, match="k and v must have the same strides, got "):
        out, lse = backend.ops.attention_prefill(
            q[0], k, v, cu_q, cu_k, 3, 90, block_table=pages, return_lse=True
        )
    check((out, lse), q[0], *(x.flip(0).flatten(0, 1)[:90] for x in (k, v)))


def test_packed_keys_and_values_of_unlike_strides_are_copied(backend, recwarn):
    opset.warn.cache_clear()
    q = backend.randn(5, 4, 64, dtype=BF16)
    k, v = (backend.randn(50, 2, 64, dtype=BF16) for _ in "kv")
    cu_q, cu_k = backend.int32(0, 5), backend.int32(0, 50)
    for keys, values in ((transposed(k[None])[0], v), (k, transposed(v[None])[0])):
        actual = backend.ops.attention_prefill(q, keys, values, cu_q, cu_k, 5, 50, return_lse=True)
        check(actual, q, k, v)
    assert not recwarn


def misaligned(cache):
    """The same values, beginning two bytes further."""
    memory = torch.empty(cache.numel() + 1, dtype=cache.dtype)
    return memory[1:].view(cache.shape).copy_(cache)


@pytest.mark.parametrize("name", ["k", "v"])
def test_no_cache_is_copied(backend, name):
    """The kernels' own op refuses it; a copy would cost a cache's time and memory at each step."""
    kernels = getattr(torch.ops, emulated.NAME)
    cache = backend.randn(2, 16, 2, 64, dtype=BF16)
    caches = [misaligned(cache) if n == name else cache for n in "kv"]
    q = backend.randn(2, 1, 4, 64, dtype=BF16)
    lengths, pages = backend.int32(16, 9), torch.zeros(2, 1, dtype=torch.int32)
    sentence = f"{name}.* must begin on a multiple of 16 bytes"
    with pytest.raises(RuntimeError, match=sentence):
        kernels.attention_decode(q, *caches, None, None, lengths, None, 1.0, 0, False, 0.0, True)
    cu = backend.int32(0, 1, 2)
    with pytest.raises(RuntimeError, match=sentence):
        kernels.attention_prefill(
            q[:, 0], *caches, cu, cu, 1, 16, 1.0, True, 0, -1, 0.0, pages, False
        )


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_that_no_kernel_reads_is_named(backend, name):
    """The op's twin serves it, and says so."""
    arguments = dict(
        q=backend.randn(2, 1, 4, 64, dtype=BF16),
        k_cache=backend.randn(2, 16, 2, 64, dtype=BF16),
        v_cache=backend.randn(2, 16, 2, 64, dtype=BF16),
    )
    opset.warn.cache_clear()
    arguments[name] = misaligned(arguments[name])
    with pytest.warns(UserWarning, match=f"{name} must begin on a multiple of 16 bytes"):
        out, lse = backend.ops.attention_decode(**arguments, seq_lens=backend.int32(16, 9))
    q, k, v = arguments.values()
    for b, length in enumerate((16, 9)):
        check((out[b], lse[b]), q[b], k[b, :length], v[b, :length])
