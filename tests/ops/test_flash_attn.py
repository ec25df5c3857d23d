"""flash-attn's functions: its masks and caches, written down here as its documentation has them."""

import pytest
import torch
from support.backends import BF16, Backend
from support.expect import assert_close_to_float64

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
        ("flash_attn_with_kvcache", "cache_leftpad", "pads"),
        ("flash_attn_with_kvcache", "alibi_slopes", "slopes"),
    ],
)
def test_what_is_not_supported_is_named(function, option, value):
    x = torch.zeros(1, 1, 1, 64)
    with pytest.raises(ValueError, match=f"{option} is not supported, got"):
        getattr(gemma4_kernels, function)(x, x, x, **{option: value})


def turned(x, cos, sin, positions, interleaved):
    """Channels in pairs as complex numbers, in float64: x [N, H, C] at positions [N]."""
    x, pairs = x.double().cpu(), cos.shape[1]
    factors = torch.complex(cos.double(), sin.double()).cpu()[positions][:, None]
    x, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    channels = torch.arange(2 * pairs)
    real, imag = channels.view(-1, 2).T if interleaved else channels.view(2, -1)
    z = torch.complex(x[..., real], x[..., imag]) * factors
    out = x.clone()
    out[..., real], out[..., imag] = z.real, z.imag
    return torch.cat([out, rest], -1)


@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("options", ["plain", "causal", "left and right"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_rotary(functions, interleaved, options, paged, num_new):
    """Three queries after one or three new keys, of which a part of each head is turned."""
    options, lengths = OPTIONS[options], (7, 20)
    q = functions.randn(2, 3, 4, 64, dtype=BF16)
    new_k, new_v = (functions.randn(2, num_new, 2, 64, dtype=BF16) for _ in "kv")
    caches = [functions.randn(*((4, 16) if paged else (2, 32)), 2, 64, dtype=BF16) for _ in "kv"]
    table = functions.to(torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)) if paged else None

    def view(cache, b):
        return cache[table[b].long()].flatten(0, 1) if paged else cache[b]

    angles = torch.rand(32, 24, dtype=torch.float64) * 6
    cos, sin = (functions.to(x.to(BF16)) for x in (angles.cos(), angles.sin()))
    out = flash_attn.flash_attn_with_kvcache(
        q,
        *caches,
        new_k,
        new_v,
        cos,
        sin,
        cache_seqlens=functions.int32(*lengths),
        block_table=table,
        rotary_interleaved=interleaved,
        **keywords(options),
    )
    one_by_one = options.get("causal") or "window_size" in options
    for b, length in enumerate(lengths):
        k, v = (view(cache, b)[: length + num_new] for cache in caches)
        positions = torch.arange(length, length + num_new)
        wanted_k = turned(new_k[b], cos, sin, positions, interleaved)
        assert_close_to_float64(k[length:], wanted_k, BF16)
        assert torch.equal(v[length:], new_v[b])
        positions = length + torch.arange(3) * (1 if one_by_one else 0)
        wanted_q = turned(q[b], cos, sin, positions, interleaved).to(BF16)
        close(out[b], expected(wanted_q, k, v, **options)[0])


def test_a_window_of_the_whole_cache_turns_queries_as_none():
    q, k, v = (torch.randn(1, 3, 1, 16) for _ in "qkv")
    cos = torch.rand(8, 8)

    def attend(**options):
        caches = (torch.zeros(1, 8, 1, 16) for _ in "kv")
        arguments = dict(rotary_cos=cos, rotary_sin=cos, cache_seqlens=0)
        return flash_attn.flash_attn_with_kvcache(q, *caches, k, v, **arguments, **options)

    assert torch.equal(attend(), attend(window_size=(8, 9)))
    assert not torch.equal(attend(), attend(window_size=(7, 9)))


@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_a_cache(functions, causal, num_new):
    """Sequences in rows of their own choice, and in the first of more rows than sequences."""
    q = functions.randn(2, num_new, 4, 64, dtype=BF16)
    new_k, new_v = (functions.randn(2, num_new, 2, 64, dtype=BF16) for _ in "kv")
    for rows in (functions.int32(2, 0), None):
        caches = [functions.randn(3, 16, 2, 64, dtype=BF16) for _ in "kv"]
        before = [cache.clone() for cache in caches]
        out = flash_attn.flash_attn_with_kvcache(
            q, *caches, new_k, new_v, cache_seqlens=9, cache_batch_idx=rows, causal=causal
        )
        for b, row in enumerate((2, 0) if rows is not None else (0, 1)):
            k, v = (cache[row, : 9 + num_new] for cache in caches)
            assert torch.equal(k[9:], new_k[b]) and torch.equal(v[9:], new_v[b])
            close(out[b], expected(q[b], k, v, causal=causal)[0])
            for cache, old in zip(caches, before, strict=True):
                cache[row, 9 : 9 + num_new] = old[row, 9 : 9 + num_new]
        assert all(map(torch.equal, caches, before))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 14), (9, 20), 15])
def test_keys_past_the_pages_are_refused(functions, lengths, causal):
    q = functions.randn(2, 3, 4, 64, dtype=BF16)
    new = functions.randn(2, 3, 2, 64, dtype=BF16)
    pages = functions.randn(4, 8, 2, 64, dtype=BF16)
    rows = functions.randn(2, 16, 2, 64, dtype=BF16)
    table = functions.to(torch.tensor([[3, 1], [0, 2]], dtype=torch.int32))
    if not isinstance(lengths, int):
        # Of lengths on a GPU the host knows nothing.
        lengths = functions.int32(*lengths) if functions.device == "cpu" else max(lengths)
    arguments = dict(cache_seqlens=lengths, causal=causal)
    with pytest.raises(ValueError, match=r"block_table must have room .* got room for 16"):
        flash_attn.flash_attn_with_kvcache(
            q, pages, pages.clone(), new, new, block_table=table, **arguments
        )
    with pytest.raises(ValueError, match=r"k_cache must have room .* got room for 16"):
        flash_attn.flash_attn_with_kvcache(q, rows, rows.clone(), new, new, **arguments)


X = torch.zeros(2, 3, 2, 64)
COS = torch.zeros(9, 32)
ROTARY = dict(k=X, v=X, rotary_cos=COS, rotary_sin=COS, cache_seqlens=0)
TABLE = torch.zeros(2, 1, dtype=torch.int32)
REFUSED = {
    "no q": (dict(q=None), TypeError, "q must be a tensor, got NoneType"),
    "k in a list": (dict(k=[1], v=X), TypeError, "k must be a tensor, got list"),
    "flat k_cache": (dict(k_cache=X[0]), ValueError, "k_cache must have 4 dimensions"),
    "other v_cache": (dict(v_cache=X[:, :2]), ValueError, "v_cache must have the shape of k_cache"),
    "k alone": (dict(k=X), ValueError, "k and v must come together"),
    "short v": (dict(k=X, v=X[:, :1]), ValueError, r"v must be \[2, 3, 2, 64\]"),
    "other dtype": (dict(k=X, v=X.half()), TypeError, "v must have k_cache's dtype"),
    "too few rows": (dict(q=X[:1].expand(5, 3, 2, 64)), ValueError, "k_cache must have a row for"),
    "negative length": (dict(cache_seqlens=-1), ValueError, "cache_seqlens .* got -1"),
    "length as text": (dict(cache_seqlens="1"), ValueError, "cache_seqlens .* got '1'"),
    "a negative length": (
        dict(cache_seqlens=torch.tensor([1, -1])),
        ValueError,
        "cache_seqlens must be counts of keys, got -1",
    ),
    "float lengths": (dict(cache_seqlens=torch.ones(2)), TypeError, "cache_seqlens must hold int"),
    "one length": (dict(cache_seqlens=TABLE[0]), ValueError, "cache_seqlens must have a row for"),
    "bool rows": (dict(cache_batch_idx=torch.ones(2) > 0), TypeError, "cache_batch_idx must hold"),
    "row 2 of 2": (
        dict(cache_batch_idx=torch.tensor([0, 2])),
        ValueError,
        r"cache_batch_idx must lie in 0..1, got \[0, 2\]",
    ),
    "rows and pages": (
        dict(cache_batch_idx=TABLE[:, 0], block_table=TABLE),
        ValueError,
        "cache_batch_idx and block_table must not come together",
    ),
    "flat table": (dict(block_table=TABLE[0]), ValueError, "block_table must have 2 dimensions"),
    "short table": (dict(block_table=TABLE[:1]), ValueError, "block_table must have a row for"),
    "page 2 of 2": (
        dict(k=X, v=X, cache_seqlens=0, block_table=TABLE + 2),
        ValueError,
        "block_table must lie in 0..1",
    ),
    "window of one": (dict(window_size=(1,)), ValueError, r"window_size .* got \(1,\)"),
    "window of texts": (dict(window_size=("1", 0)), ValueError, "window_size"),
    "window of -2": (dict(window_size=(-2, 0)), ValueError, r"window_size .* got \(-2, 0\)"),
    "rotary of no k": (dict(rotary_cos=COS, rotary_sin=COS), ValueError, "rotary_cos .* with k"),
    "no sin": (ROTARY | dict(rotary_sin=None), TypeError, "rotary_sin must be a tensor"),
    "integer cos": (ROTARY | dict(rotary_cos=COS.int()), TypeError, "rotary_cos must be a float"),
    "wide cos": (
        ROTARY | dict(rotary_cos=COS.repeat(1, 2)),
        ValueError,
        r"rotary_cos must be \[3 or more, 32 or fewer\]",
    ),
    "short sin": (ROTARY | dict(rotary_sin=COS[:2]), ValueError, "rotary_sin must be .3 or more"),
    "unlike": (ROTARY | dict(rotary_sin=COS[:8]), ValueError, "rotary_sin must have the shape of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_caches(case):
    arguments, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        flash_attn.flash_attn_with_kvcache(**dict(q=X, k_cache=X, v_cache=X) | arguments)


def test_bad_input():
    x = torch.zeros(1, 1, 1, 64)
    with pytest.raises(ValueError, match=r"q must have 4 dimensions, got \[1, 1, 64\]"):
        flash_attn.flash_attn_func(x[0], x, x)
    with pytest.raises(TypeError, match=r"v must be a tensor, got list"):
        flash_attn.flash_attn_func(x, x, [x])
    with pytest.raises(ValueError, match=r"window_size .* got \(-2, 0\)"):
        flash_attn.flash_attn_func(x, x, x, window_size=(-2, 0))
