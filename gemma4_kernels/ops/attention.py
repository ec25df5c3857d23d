"""Attention over packed sequences."""

import torch
from torch import Tensor

from ..autocast import cast, product_dtype
from ..opset import HALF, Args, Gradient, NoGradient, Op, needs_grad, new
from ..reference import attention as reference

# Those that csrc/attention has tiles for; its launchers refuse others, whoever calls.
HEAD_DIMS = (64, 128, 256, 512)


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def head_dim_unserved(q: Tensor) -> str | None:
    if q.shape[-1:] not in [(head_dim,) for head_dim in HEAD_DIMS]:
        return f"it is for head_dim {HEAD_DIMS}, got {list(q.shape)}"
    return None


def _prefill_unserved(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None) -> str | None:
    # Packed k and v of one step are copied where they do not fit; a cache would be at every step.
    return head_dim_unserved(q) or (None if block_table is None else cache_unserved(k=k, v=v))


def cache_unserved(**caches: Tensor) -> str | None:
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
    return new(q, *q.shape), new(q, q.shape[1], tokens, dtype=lse_dtype(q))


_attention_prefill_backward = Op(
    "attention_prefill_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v,"
    " Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float scale, bool causal, int window, int window_right, float softcap)"
    " -> (Tensor, Tensor, Tensor)",
    reference.attention_prefill_backward,
    outputs=lambda q, k, v: (new(q, *q.shape), new(k, *k.shape), new(v, *v.shape)),
    dtypes=HALF,
    unserved=head_dim_unserved,
    gradient=NoGradient("second derivatives are not offered"),
)


def _keep_packed(inputs: Args, output: tuple[Tensor, Tensor]) -> Args:
    q, k, v, *rest = inputs
    return q, k, v, *output, *rest


def _backward(
    kept: Args, wanted: tuple[bool, ...], grad_out: Tensor | None, grad_lse: Tensor | None
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
