"""The public functions. Each is one op; its arithmetic is the eager twin's, in `reference.py`.

Shape letters: T tokens (all sequences, packed), B sequences, N new tokens of a sequence, S key
positions, D model width, H query heads, G key-value heads, C head channels, F feed-forward width,
E experts, K experts per token, P PLE width, L layers, V vocabulary.

Dtypes that meet, as fp32 weights and residuals meet 16-bit branches under `torch.autocast`, are
promoted as the same torch expression promotes them. While autocast is on, attention and the experts
take what they multiply in its dtype; the arithmetic of an op is always the one it states.

Errors, for all of them: TypeError for a dtype, ValueError for a shape, a device or a range; the
sentence names the argument, what it must be and what came.
"""

from typing import Any

import torch
from torch import Tensor

from . import library, reference
from .autocast import cast, product_dtype

_ops = getattr(torch.ops, library.NAMESPACE)


def _run(name: str, *args: Any, saves: tuple[Tensor | None, ...] = ()) -> Any:
    """Runs an op by the shortest way: the dispatcher is for the compiler and for gradients.

    Under the compiler the op is called, so that what depends on values (sequence lengths, expert
    counts) stays out of the graph. With gradients it is called where a kernel computes, and on the
    CPU if one is wanted of `saves`: then the registered gradient keeps less than autograd through
    the twin would.
    """
    x = library.main_tensor(name, args)
    by_op = torch.compiler.is_compiling() or x.is_meta
    if _on_cpu(x):
        by_op = by_op or _needs_grad(*saves)
    else:
        by_op = by_op or _needs_grad(*(a for a in args if isinstance(a, Tensor)))
    if by_op:
        return getattr(_ops, name)(*args)
    if not _on_cpu(x) and library.covers(name, args):
        return library.compiled(name, *args)
    return getattr(reference, name)(*args)


def _on_cpu(x: Tensor) -> bool:
    return x.is_cpu


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMS norm over the last dimension: x (mean x² + eps)^-½ weight, fp32 inside, one cast.

    x [..., D] and weight [D], each of a floating dtype; the weight multiplies as it is (no 1 + w)
    and may be absent. Returns [..., D] in the dtype of x.
    """
    return _run("rms_norm", x, weight, eps)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    next_weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """Closes one branch of a sandwich norm and opens the next.

    residual' = (residual + rms_norm(x, post_weight)) scale, y = rms_norm(residual', next_weight).

    x, residual [..., D]; post_weight, next_weight [D]; scale [1] (the layer scalar, 1 if absent),
    each of a floating dtype. Returns (residual', y), both in the dtype that x and residual promote
    to; y is None without a next_weight.
    """
    residual, y = _run("add_rms_norm", x, residual, post_weight, next_weight, scale, eps)
    return residual, None if next_weight is None else y


def qkv_norm_rope(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per-head RMS norms and rotary embedding of fresh projections.

    q = rope(rms_norm(q, q_weight)), k = rope(rms_norm(k, k_weight)), v = rms_norm(v); rope turns
    the pairs (i, i + C/2) by positions · inv_freq[i], angles in fp32.

    q [T, H, C]; k, v [T, G, C] of one floating dtype; weights [C] of any; positions [T] integers;
    inv_freq [C/2] fp32 (zeros leave a pair as it is). Without v, V is made from the raw k
    (attention_k_eq_v); without k too, only q is made (a layer that borrows keys). Inputs may be
    strided views of one projection.
    Returns contiguous (q, k, v) in the dtype of q, None for what is absent.
    """
    args = (q, k, v, q_weight, k_weight, positions, inv_freq, eps)
    q, new_k, new_v = _run("qkv_norm_rope", *args)
    return (q, None, None) if k is None else (q, new_k, new_v)


def qkv_norm_rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """`qkv_norm_rope` that writes k and v of token t into slot slots[t] of a cache.

    k_cache, v_cache [..., G, C], contiguous, written in place: pages [pages, page_size, G, C] or
    rows [B, S, G, C], whose leading dimensions count slots. slots [T] integers; a negative one
    drops its token, and so does, in a kernel, one past the cache (the eager twin raises). Returns
    q [T, H, C]. Has no backward.
    """
    if _needs_grad(q, k, v, q_weight, k_weight):
        raise RuntimeError(
            "qkv_norm_rope_cache has no backward; use qkv_norm_rope, or torch.no_grad()"
        )
    args = (q, k, v, q_weight, k_weight, positions, inv_freq, eps, k_cache, v_cache, slots)
    return _run("qkv_norm_rope_cache", *args)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate, approximate="tanh") · up, with gate and up the halves of the last dimension.

    gate_up [..., 2F], gate first. Returns [..., F].
    """
    return _run("geglu", gate_up)


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
    int32; H a multiple of G. Sequence b owns queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1
    and likewise its keys ([B + 1] int32, on the device); its queries are the tail of its keys.
    A query at key position i sees key j if j <= i (causal) or j <= i + window_right (not causal,
    -1: no bound), and i - window < j (window counts keys, the query's own included; 0: no bound).
    softcap > 0 replaces a score s by softcap · tanh(s / softcap).

    Returns out [T, H, C] and, with return_lse, the log-sum-exp of the scores [H, T] in fp32. A
    query that sees no key gives 0 and -inf. q, k and v have one dtype, and under autocast are cast
    to its dtype. Differentiable without a block_table.
    """
    dtype = product_dtype(q)
    if dtype is not None:
        q, k, v = cast(dtype, q, k, v)
    # The registered gradient, which needs the lse, recomputes the scores block by block; plain
    # autograd through the twin would keep all of them.
    training = _needs_grad(q, k, v)
    out, lse = _run(
        "attention_prefill",
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
        return_lse or training,
        saves=(q, k, v),
    )
    return out, lse if return_lse else None


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
    pages [pages, page_size, G, C] with block_table [B, pages]; seq_lens [B] int32 counts the keys
    of each row, its N new ones included; 0 leaves a row out. window as in `attention_prefill`; a
    ring needs one, and S >= window + N - 1. Slots outside the visible range are never used.

    Returns out [B, N, H, C] and, unless return_lse is False, the log-sum-exp [B, H, N] in fp32.
    Dtypes as in `attention_prefill`. Has no backward.
    """
    dtype = product_dtype(q)
    if dtype is not None:
        q, k_cache, v_cache = cast(dtype, q, k_cache, v_cache)
    args = (q, k_cache, v_cache, seq_lens, block_table, scale, window, ring, softcap, return_lse)
    out, lse = _run("attention_decode", *args, saves=(q, k_cache, v_cache))
    return out, lse if return_lse else None


def moe_norm(x: Tensor, weight: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """What the experts and what their router's projection read of the same x.

    y = rms_norm(x, weight); router_x = rms_norm(x) scale D^-½, rounded after each of its products.

    x [..., D]; weight, scale [D], each of a floating dtype. Returns (y, router_x), each [..., D]:
    y in the dtype of x, router_x in the one that x and scale promote to.
    """
    return _run("moe_norm", x, weight, scale, eps)


def moe_route(logits: Tensor, per_expert_scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of each token and their weights.

    p = softmax(logits) over all experts in fp32; the k largest (ties: the lower index) are divided
    by their sum and multiplied by per_expert_scale.

    logits [T, E], per_expert_scale [E]. Returns weights [T, K] fp32 and experts [T, K] int32.
    """
    return _run("moe_route", logits, per_expert_scale, k)


def moe_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """Σ_k weights[:, k] · down[e] geglu(gate_up[e] x) with e = experts[:, k].

    x [T, D]; gate_up [E, 2F, D], gate rows first; down [E, D, F]; experts [T, K] integers, each
    token's distinct, E meaning "skip" (an expert that lives elsewhere); weights [T, K]. gate_up and
    down have the dtype of x or are fp32, then rounded to it, each expert when it is multiplied.
    Under autocast x is multiplied in its dtype.
    Returns [T, D] in the dtype of x. Work is done for the experts that are chosen alone.
    """
    dtype, product = x.dtype, product_dtype(x)
    if product is not None:
        (x,) = cast(product, x)
        if gate_up.dtype != torch.float32:
            gate_up, down = cast(product, gate_up, down)
    # The registered gradient gives zeros where no expert is chosen, and keeps no activations.
    saves = (x, gate_up, down, weights)
    y = _run("moe_experts", x, gate_up, down, experts, weights, saves=saves)
    return y if product is None else y.to(dtype)


def ple_embed(
    ids: Tensor, table: Tensor, projected: Tensor, weight: Tensor, eps: float = 1e-6
) -> Tensor:
    """Per-layer embeddings: (rms_norm(projected, weight) + √P table[ids]) / √2.

    ids [T] integers; table [V, L P], projected [T, L P] and weight [P], each of a floating dtype.
    The table may stay in host memory (a kernel reads its rows in place if it is pinned, else the
    eager twin gathers them on the host). An id outside 0..V - 1 reads nothing and adds a zero row.
    Returns [T, L, P] in the dtype that table and projected promote to.
    """
    return _run("ple_embed", ids, table, projected, weight, eps)


def ple_gate(gate: Tensor, ple: Tensor, layer: int) -> Tensor:
    """gelu(gate, approximate="tanh") · ple[:, layer].

    gate [T, P]; ple [T, L, P], from `ple_embed`. Returns [T, P] in the dtype that both promote to.
    """
    return _run("ple_gate", gate, ple, layer)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap); logits of any shape, cap > 0."""
    # The registered gradient needs the output alone.
    return _run("softcap", logits, cap, saves=(logits,))


def softcap_argmax(logits: Tensor, cap: float) -> Tensor:
    """softcap(logits, cap).argmax(-1) without the capped logits being kept.

    logits [..., V]. Returns [...] int64: the lowest index among equals; NaN wins, as in torch.
    """
    return _run("softcap_argmax", logits, cap)
