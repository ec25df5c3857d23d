import pytest
import torch
from support import float64
from support.expect import NoHostReads, assert_close_to_float64
from test_attention_prefill import CASES, bad_inputs, inputs


def gradients(attention, arguments, options, grad_out, grad_lse):
    leaves = {name: arguments[name].detach().requires_grad_() for name in "qkv"}
    out, lse = attention(**(arguments | leaves), **options)
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + (lse.where(lse.isfinite(), 0) * grad_lse).sum()
    return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)


def assert_gradients(backend, case, dtype, with_lse):
    assert_close(backend, *inputs(backend, case, dtype), dtype, with_lse)


def assert_close(backend, arguments, longest, options, dtype, with_lse, grad_out=None):
    heads, tokens = arguments["q"].shape[1], arguments["q"].shape[0]
    if grad_out is None:
        grad_out = backend.randn(*arguments["q"].shape, dtype=dtype)
    grad_lse = backend.randn(heads, tokens) if with_lse else None
    actual = gradients(
        backend.ops.attention_prefill,
        arguments,
        longest | options | dict(return_lse=with_lse),
        grad_out,
        grad_lse,
    )
    exact = {
        name: x.cpu().double() if x.is_floating_point() else x.cpu()
        for name, x in arguments.items()
    }
    expected = gradients(
        float64.attention_packed,
        exact,
        options,
        grad_out.double().cpu(),
        None if grad_lse is None else grad_lse.double().cpu(),
    )
    for a, e in zip(actual, expected, strict=True):
        # rowsum(do out) is made from the rounded output: an error of u |do| |out| |q or k|.
        size = e.abs().max() + 1 if e.numel() else None
        rounded = e + torch.finfo(dtype).eps / 2 * size if e.numel() else None
        terms = 4 * arguments["q"].shape[-1]
        # What cancels in do · v - rowsum(do out) is several times the largest gradient.
        magnitude = None if size is None else 4 * size
        assert_close_to_float64(a, e, dtype, rounded=rounded, terms=terms, magnitude=magnitude)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "no sequence"])
def test_gradient(backend, poisoned_memory, case, with_lse, dtype):
    assert_gradients(backend, case, dtype, with_lse)


@pytest.mark.parametrize(
    "case", ["window of many tiles", "ragged", "softcap", "both sides", "more queries than keys"]
)
def test_gradient_in_row_blocks(backend, monkeypatch, case):
    monkeypatch.setattr("gemma4_kernels.reference.attention.SCORE_ELEMENTS", 1)
    assert_gradients(backend, case, torch.float32, with_lse=True)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradient_of_one_input(backend, wanted):
    arguments, longest, _ = inputs(backend, "packed", torch.float32)
    arguments[wanted].requires_grad_()
    out, lse = backend.ops.attention_prefill(**arguments, **longest)
    assert lse is None
    out.sum().backward()
    assert arguments[wanted].grad.isfinite().all()


def test_pages_have_no_gradient(backend):
    arguments = bad_inputs(backend)
    arguments |= {name: backend.randn(10, 5, 1, 64) for name in "kv"}
    arguments["q"].requires_grad_()
    table = backend.to(torch.zeros(4, 9, dtype=torch.int32))
    out, _ = backend.ops.attention_prefill(**arguments, block_table=table)
    with pytest.raises(RuntimeError, match="no backward for K and V in pages"):
        out.sum().backward()


OPTIONS = {
    "causal": {},
    "window and softcap": dict(window=50, softcap=3.0),
    "window both ways": dict(causal=False, window=20, window_right=30),
    "no mask": dict(causal=False),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("kb", [99, 227])
def test_tiles(on_card, kb, head_dim, options):
    """Each tile that a card may get, several of them each way, ragged, and 3 heads a key head."""
    backend, options = on_card(f"{kb} KB"), OPTIONS[options]
    arguments = {
        "q": backend.randn(50, 3, head_dim, dtype=torch.bfloat16, std=head_dim**-0.25),
        "k": backend.randn(112, 1, head_dim, dtype=torch.bfloat16, std=head_dim**-0.25),
        "v": backend.randn(112, 1, head_dim, dtype=torch.bfloat16),
        "cu_seqlens_q": backend.int32(0, 45, 50),
        "cu_seqlens_k": backend.int32(0, 107, 112),
    }
    longest = dict(max_seqlen_q=45, max_seqlen_k=107)
    assert_close(backend, arguments, longest, options, torch.bfloat16, with_lse=True)


@pytest.mark.parametrize("odd", [0, 1])
def test_strided(backend, odd):
    """Heads of one projection, a loss that gives one gradient for all, and odd addresses."""
    arguments, longest, options = inputs(backend, "packed", torch.bfloat16)
    tokens = arguments["q"].shape[0]
    packed = backend.randn(tokens, 8 * 64 + 8, dtype=torch.bfloat16, std=0.5)
    heads = packed[:, odd : odd + 8 * 64].unflatten(1, (8, 64))
    for name, part in zip("qkv", heads.split((4, 2, 2), 1), strict=True):
        arguments[name] = part
    one = backend.to(torch.ones((), dtype=torch.bfloat16)).expand(tokens, 4, 64)
    assert_close(backend, arguments, longest, options, torch.bfloat16, True, grad_out=one)


def test_scores_far_below_zero(backend):
    """exp(-lse) overflows: what stands beside the last rows and keys must not come near it."""
    arguments, longest, _ = inputs(backend, "tail of the keys", torch.bfloat16)
    arguments["q"].abs_().add_(1.0)
    arguments["k"].abs_().add_(1.0).neg_()
    options = dict(causal=False)
    assert_close(backend, arguments, longest, options, torch.bfloat16, with_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_no_query_sees(backend, dtype):
    """Their gradient is zero, whatever they hold."""
    arguments, longest, _ = inputs(backend, "tail of the keys", dtype)
    leaves = {name: arguments[name].clone() for name in "qkv"}
    hidden = torch.zeros(85, dtype=torch.bool)
    hidden[:37] = hidden[40:46] = hidden[47:52] = hidden[52:68] = True
    leaves["k"][hidden] = leaves["v"][hidden] = float("nan")
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, _ = backend.ops.attention_prefill(**(arguments | leaves), **longest, window=1)
    out.sum().backward()
    for name in "kv":
        assert (leaves[name].grad[hidden] == 0).all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


def test_tokens_outside_of_all_sequences(backend, poisoned_memory):
    arguments, longest, _ = inputs(backend, "packed", torch.bfloat16)
    arguments["cu_seqlens_q"] = arguments["cu_seqlens_k"] = backend.int32(3, 9, 25)
    leaves = {name: arguments[name].clone().requires_grad_() for name in "qkv"}
    if backend.name == "eager":
        with pytest.raises(ValueError, match="cu_seqlens_q must begin at 0, got 3"):
            backend.ops.attention_prefill(**(arguments | leaves), **longest)
        return
    out, _ = backend.ops.attention_prefill(**(arguments | leaves), **longest)
    out.sum().backward()
    for leaf in leaves.values():
        assert (leaf.grad[:3] == 0).all()
        assert (leaf.grad[3:] != 0).any() and leaf.grad.isfinite().all()


def test_graph_safe(backend):
    if backend.name == "eager":
        pytest.skip("the eager twin reads the lengths")
    arguments, longest, _ = inputs(backend, "packed", torch.bfloat16)
    leaves = [arguments[name].requires_grad_() for name in "qkv"]
    out, _ = backend.ops.attention_prefill(**arguments, **longest)
    with NoHostReads():
        torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("head_dim", [256, 512])
def test_error_beside_plain_autograd(backend, head_dim):
    """No further from the exact gradients than autograd through whole rows of scores, with the
    probabilities rounded to 16 bits."""
    dtype, tokens = torch.bfloat16, 120
    arguments = {
        "q": backend.randn(tokens, 2, head_dim, dtype=dtype, std=head_dim**-0.25),
        "k": backend.randn(tokens, 1, head_dim, dtype=dtype, std=head_dim**-0.25),
        "v": backend.randn(tokens, 1, head_dim, dtype=dtype),
        "cu_seqlens_q": backend.int32(0, tokens),
        "cu_seqlens_k": backend.int32(0, tokens),
    }
    grad = backend.randn(tokens, 2, head_dim, dtype=dtype)
    longest = dict(max_seqlen_q=tokens, max_seqlen_k=tokens)
    actual = gradients(backend.ops.attention_prefill, arguments, longest, grad, None)

    def by_rows(acc):
        leaves = [arguments[name].cpu().to(acc).requires_grad_() for name in "qkv"]
        q, k, v = leaves
        wide = torch.promote_types(acc, torch.float32)
        scores = torch.einsum("ihc,jc->hij", q, k[:, 0]).to(wide)
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
        p = scores.softmax(-1).to(acc)
        out = torch.einsum("hij,jc->ihc", p, v[:, 0])
        return torch.autograd.grad(out, leaves, grad.cpu().to(acc))

    exact, plain = by_rows(torch.float64), by_rows(dtype)
    for a, p, e in zip(actual, plain, exact, strict=True):
        error = (a.cpu().double() - e).abs().mean()
        assert error <= 1.2 * (p.double() - e).abs().mean()
