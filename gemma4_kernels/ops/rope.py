"""Norms of fresh projections and their rotation, kept or written into a cache."""

from torch import Tensor

from ..opset import HALF, Args, Gradient, NoGradient, Op, needs_grad, new
from ..reference import rope as reference
from .attention import HEAD_DIMS
from .norm import grad_of

# Gemma 4's own, for which there are kernels of gradients.
TRAINED_HEAD_DIMS = (256, 512)


def _qkv(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    kv_shape = (0,) if k is None else k.shape
    return new(q, *q.shape), new(q, *kv_shape), new(q, *kv_shape)


def _qkv_grads(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    wants_q_weight: bool,
    wants_k_weight: bool,
) -> tuple[Tensor, ...]:
    return (
        *(grad_of(q, x, True) for x in (q, k, v)),
        grad_of(q, q_weight, wants_q_weight),
        grad_of(q, k_weight, wants_k_weight),
    )


def _backward_unserved(q: Tensor) -> str | None:
    if q.shape[-1] in TRAINED_HEAD_DIMS:
        return None
    return f"it is for head_dim {TRAINED_HEAD_DIMS}, got {list(q.shape)}"


_qkv_norm_rope_backward = Op(
    "qkv_norm_rope_backward(Tensor? grad_q, Tensor? grad_k, Tensor? grad_v, Tensor q, Tensor? k,"
    " Tensor? v, Tensor q_weight, Tensor? k_weight, Tensor positions, Tensor inv_freq, float eps,"
    " bool wants_q_weight, bool wants_k_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.qkv_norm_rope_backward,
    outputs=_qkv_grads,
    main="q",
    beside=("q_weight", "k_weight"),
    unserved=_backward_unserved,
    gradient=NoGradient("second derivatives are not offered"),
)


def _through_qkv_norm_rope(
    kept: Args, wanted: tuple[bool, ...], *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """q, k and v come from one input, and their gradients are made together or for nothing."""
    if wanted[6]:  # frequencies that somebody trains
        return _qkv_norm_rope.differentiate_twin(kept, wanted, grads)
    # Without a k its outputs are empty, as are their gradients.
    given = grads if kept[1] is not None else (grads[0], None, None)
    found = _qkv_norm_rope_backward.registered(*given, *kept, *wanted[3:5])
    return *(grad if want else None for grad, want in zip(found, wanted, strict=False)), *[None] * 3


_qkv_norm_rope = Op(
    "qkv_norm_rope(Tensor q, Tensor? k, Tensor? v, Tensor q_weight, Tensor? k_weight,"
    " Tensor positions, Tensor inv_freq, float eps) -> (Tensor, Tensor, Tensor)",
    reference.qkv_norm_rope,
    check=reference.check_qkv_norm_rope,
    outputs=_qkv,
    beside=("q_weight", "k_weight"),
    gradient=Gradient(lambda inputs, output: inputs, _through_qkv_norm_rope, in_eager=False),
)


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
    inv_freq [C/2] fp32 (zeros leave a pair as it is); eps as in `rms_norm`. Without v, V is made
    from the raw k (attention_k_eq_v); without k too, only q is made (a layer that borrows keys).
    Inputs may be strided views of one projection.
    Returns contiguous (q, k, v) in the dtype of q, None for what is absent.
    """
    args = (q, k, v, q_weight, k_weight, positions, inv_freq, eps)
    q, new_k, new_v = _qkv_norm_rope(*args)
    return (q, None, None) if k is None else (q, new_k, new_v)


def _cache_unserved(q: Tensor, k_scales: Tensor | None) -> str | None:
    if k_scales is None or (q.dtype in HALF and q.shape[-1:] in [(c,) for c in HEAD_DIMS]):
        return None
    return (
        f"into e4m3 it is for {', '.join(map(str, HALF))} and head_dim {HEAD_DIMS}, "
        f"got {q.dtype} and {list(q.shape)}"
    )


_qkv_norm_rope_cache = Op(
    "qkv_norm_rope_cache(Tensor q, Tensor k, Tensor? v, Tensor q_weight, Tensor k_weight,"
    " Tensor positions, Tensor inv_freq, float eps, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor slots) -> Tensor",
    reference.qkv_norm_rope_cache,
    check=reference.check_qkv_norm_rope_cache,
    outputs=lambda q: new(q, *q.shape),
    beside=("q_weight", "k_weight"),
    unserved=_cache_unserved,
)


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
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`qkv_norm_rope` that writes k and v of token t into slot slots[t] of a cache.

    q, k, v, q_weight, k_weight, positions, inv_freq and eps are those of `qkv_norm_rope`, with a k.
    k_cache, v_cache [..., G, C], contiguous, written in place: pages [pages, page_size, G, C] or
    rows [B, S, G, C], whose leading dimensions count slots. slots [T] integers; a negative one
    drops its token, and so does, in a kernel, one past the cache (the eager twin raises
    ValueError). Returns q [T, H, C]. Has no backward.

    With k_scales, v_scales [..., G] fp32, contiguous, the caches are float8_e4m3fn: of each head of
    k and v, as it comes in the dtype of q, the scale is max |x| / 448 (1 of zeros), and x / scale
    is rounded to the nearest code.
    """
    # Not in the backward: keys that went into the cache would lose their gradient without a word.
    if needs_grad(q, k, v, q_weight, k_weight):
        raise RuntimeError(
            "qkv_norm_rope_cache has no backward; use qkv_norm_rope, or torch.no_grad()"
        )
    cache = k_cache, v_cache, k_scales, v_scales, slots
    args = (q, k, v, q_weight, k_weight, positions, inv_freq, eps, *cache)
    return _qkv_norm_rope_cache(*args)
