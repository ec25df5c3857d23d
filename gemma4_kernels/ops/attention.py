"""Attention over packed sequences and over a cache."""

import torch
from torch import Tensor

from ..autocast import cast, product_dtype
from ..opset import HALF, Args, Gradient, NoGradient, Op, needs_grad, new
from ..reference import attention as reference

# Those that csrc/attention has tiles for; its launchers refuse others, whoever calls.
HEAD_DIMS = (64, 128, 256, 512)
# Query heads that may share a KV head in `qkv_attention_decode`.
MOST_GROUP = 16


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _head_dim_unserved(q: Tensor) -> str | None:
    if q.shape[-1:] not in [(head_dim,) for head_dim in HEAD_DIMS]:
        return f"it is for head_dim {HEAD_DIMS}, got {list(q.shape)}"
    return None


def _prefill_unserved(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None) -> str | None:
    # Packed k and v of one step are copied where they do not fit; a cache would be at every step.
    return _head_dim_unserved(q) or (None if block_table is None else _cache_unserved(k=k, v=v))


def _decode_unserved(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    return _head_dim_unserved(q) or _cache_unserved(k_cache=k_cache, v_cache=v_cache)


def _cache_unserved(**caches: Tensor) -> str | None:
    layouts = []
    for name, x in caches.items():
        strides = [1 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
        fits = strides[-1:] == [1] and all(stride == 1 or stride % 8 == 0 for stride in strides)
        if not fits or x.storage_offset() % 8 != 0:
            return (
                f"{name} must begin on a multiple of 16 bytes, with contiguous heads and strides "
                f"that are multiples of 8 elements, got strides {list(x.stride())} from "
                f"{x.storage_offset()} on"
            )
        layouts.append(strides)
    if layouts[0] != layouts[1]:
        both = " and ".join(str(list(x.stride())) for x in caches.values())
        return f"{' and '.join(caches)} must have the same strides, got {both}"
    return None


def _packed_out(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    tokens = q.shape[0] if return_lse else 0
    return new(q, *q.shape), new(q, q.shape[1], tokens, dtype=_lse_dtype(q))


_attention_prefill_backward = Op(
    "attention_prefill_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v,"
    " Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float scale, bool causal, int window, int window_right, float softcap)"
    " -> (Tensor, Tensor, Tensor)",
    reference.attention_prefill_backward,
    outputs=lambda q, k, v: (new(q, *q.shape), new(k, *k.shape), new(v, *v.shape)),
    dtypes=HALF,
    unserved=_head_dim_unserved,
    gradient=NoGradient("second derivatives are not offered"),
)


def _keep_packed(inputs: Args, output: tuple[Tensor, Tensor]) -> Args:
    q, k, v, *rest = inputs
    return q, k, v, *output, *rest


def _backward(
    kept: Args, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *rest, block_table, has_lse = kept
    if block_table is not None:
        raise RuntimeError("attention_prefill has no backward for K and V in pages (block_table)")
    if not has_lse:
        raise RuntimeError("attention_prefill needs return_lse=True to be differentiated")
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grads = _attention_prefill_backward.registered(grad_out, grad_lse, q, k, v, out, lse, *rest)
    return (*grads, *[None] * 11)


_attention_prefill = Op(
    "attention_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool causal, int window,"
    " int window_right, float softcap, Tensor? block_table, bool return_lse) -> (Tensor, Tensor)",
    reference.attention_prefill,
    check=reference.check_attention_prefill,
    outputs=_packed_out,
    dtypes=HALF,
    unserved=_prefill_unserved,
    gradient=Gradient(_keep_packed, _backward),
)


def attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float = 1.0,
    causal: bool = True,
    window: int = 0,
    window_right: int = -1,
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale q kᵀ) v over packed sequences of any lengths, memory linear in their length.

    q [T, H, C]; k, v [S, G, C], or pages [pages, page_size, G, C] with block_table [B, pages]
    integers; H a multiple of G. Sequence b owns queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1
    and cu_seqlens_k likewise its keys ([B + 1] int32, on the device); its queries are the tail of
    its keys.
    A query at key position i sees key j if j <= i (causal) or j <= i + window_right (not causal,
    -1: no bound), and i - window < j (window counts keys, the query's own included; 0: no bound).
    softcap > 0 replaces a score s by softcap · tanh(s / softcap).

    Returns out [T, H, C] and, with return_lse, the log-sum-exp of the scores [H, T] in fp32. A
    query that sees no key gives 0 and -inf. q, k and v have one dtype, and under autocast are cast
    to its dtype. Differentiable without a block_table, which the backward refuses.

    The eager twin reads the lengths and raises ValueError unless both cu_seqlens begin at 0 and
    never decrease, cu_seqlens_q ends at T, no sequence is longer than max_seqlen_q or max_seqlen_k,
    and its keys and pages are there. A kernel waits for no device: queries of no sequence or past
    max_seqlen_q give 0 and -inf, keys end where the memory does, and that block_table names pages
    must hold on the device.
    """
    dtype = product_dtype(q)
    if dtype is not None:
        q, k, v = cast(dtype, q, k, v)
    # The registered gradient, which needs the lse, recomputes the scores block by block; plain
    # autograd through the twin would keep all of them.
    training = needs_grad(q, k, v)
    out, lse = _attention_prefill(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        causal,
        window,
        window_right,
        softcap,
        block_table,
        training or return_lse,
    )
    return out, lse if return_lse else None


def _rows_out(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    batch, num_new, heads, _ = q.shape
    lse_shape = (batch, heads, num_new if return_lse else 0)
    return new(q, *q.shape), new(q, *lse_shape, dtype=_lse_dtype(q))


_attention_decode = Op(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens,"
    " Tensor? block_table, float scale, int window, bool ring, float softcap, bool return_lse)"
    " -> (Tensor, Tensor)",
    reference.attention_decode,
    check=reference.check_attention_decode,
    outputs=_rows_out,
    dtypes=HALF,
    unserved=_decode_unserved,
    gradient=NoGradient("it reads a cache; use attention_prefill for training"),
)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None = None,
    *,
    scale: float = 1.0,
    window: int = 0,
    ring: bool = False,
    softcap: float = 0.0,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last few tokens of each sequence over its cache.

    q [B, N, H, C]; k_cache, v_cache [B, S, G, C] (position p in slot p, or p mod S with ring), or
    pages [pages, page_size, G, C] with block_table [B, pages] integers; seq_lens [B] int32 counts
    the keys of each row, its N new ones included; 0 leaves a row out. scale, window and softcap as
    in `attention_prefill`; a ring needs a window, and S >= window + N - 1. Slots outside the
    visible range are never used.

    Returns out [B, N, H, C] and, unless return_lse is False, the log-sum-exp [B, H, N] in fp32.
    Dtypes as in `attention_prefill`. Has no backward.

    The eager twin raises ValueError for a seq_lens outside 0..S (in a ring: below 0); a kernel
    takes the nearer of the two. That block_table names pages must hold on the device.
    """
    dtype = product_dtype(q)
    if dtype is not None:
        q, k_cache, v_cache = cast(dtype, q, k_cache, v_cache)
    args = (q, k_cache, v_cache, seq_lens, block_table, scale, window, ring, softcap, return_lse)
    out, lse = _attention_decode(*args)
    return out, lse if return_lse else None


def _qkv_unserved(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    if q.ndim == 3 and k_cache.ndim == 4 and q.shape[1] > MOST_GROUP * k_cache.shape[2]:
        return f"at most {MOST_GROUP} query heads may share a KV head, got {list(q.shape)}"
    return _decode_unserved(q, k_cache, v_cache)


_qkv_attention_decode = Op(
    "qkv_attention_decode(Tensor q, Tensor? k, Tensor? v, Tensor q_weight, Tensor? k_weight,"
    " Tensor positions, Tensor inv_freq, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor seq_lens,"
    " Tensor? block_table, Tensor(c!) counters, float eps, float scale, int window, bool ring,"
    " float softcap) -> Tensor",
    reference.qkv_attention_decode,
    check=reference.check_qkv_attention_decode,
    outputs=lambda q: new(q, *q.shape),
    dtypes=HALF,
    beside=("q_weight", "k_weight"),
    unserved=_qkv_unserved,
)


def qkv_attention_decode(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None = None,
    *,
    counters: Tensor,
    eps: float = 1e-6,
    scale: float = 1.0,
    window: int = 0,
    ring: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """One new token of each sequence: `qkv_norm_rope`, its key into the cache, `attention_decode`.

    q [B, H, C], k and v [B, G, C], q_weight, k_weight, positions [B], inv_freq and eps are those of
    `qkv_norm_rope`; without k the caches hold the new key already (a layer that borrows them).
    k_cache, v_cache, seq_lens [B], block_table, scale, window, ring and softcap are those of
    `attention_decode`; seq_lens counts the new token, whose place is that of key seq_lens - 1. A
    length of 0 leaves a row out: nothing is written. counters [B, G, 9] are int32 zeros and are so
    again behind the call: one tensor serves all layers of a step.

    Returns out [B, H, C] in the dtype of q, of which q, k and v are normed and rotated as the two
    ops in a row make them. Has no backward.

    The eager twin raises ValueError for a seq_lens outside 0..S (in a ring: below 0); a kernel
    takes the nearer of the two, and writes no key that has no place.
    """
    # As in `qkv_norm_rope_cache`.
    if needs_grad(q, k, v, q_weight, k_weight):
        raise RuntimeError(
            "qkv_attention_decode has no backward; use qkv_norm_rope and attention_prefill, or "
            "torch.no_grad()"
        )
    cache = k_cache, v_cache, seq_lens, block_table, counters
    options = eps, scale, window, ring, softcap
    args = (q, k, v, q_weight, k_weight, positions, inv_freq, *cache, *options)
    return _qkv_attention_decode(*args)
