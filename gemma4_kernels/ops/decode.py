"""Attention of the last few tokens of each sequence over its cache."""

from torch import Tensor

from ..autocast import cast, product_dtype
from ..opset import HALF, NoGradient, Op, needs_grad, new
from ..reference import decode as reference
from .attention import cache_unserved, head_dim_unserved, lse_dtype

# Query heads that may share a KV head in `qkv_attention_decode`.
MOST_GROUP = 16


# Those that there are tiles for where the cache is in e4m3.
CODED_HEAD_DIMS = (256, 512)


def _decode_unserved(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, softcap: float
) -> str | None:
    served = not softcap and q.shape[-1:] in [(head_dim,) for head_dim in CODED_HEAD_DIMS]
    if k_scales is not None and not served:
        return (
            f"over e4m3 it is for head_dim {CODED_HEAD_DIMS} without a softcap, "
            f"got {list(q.shape)} and softcap {softcap}"
        )
    return head_dim_unserved(q) or cache_unserved(k_cache=k_cache, v_cache=v_cache)


def _rows_out(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    batch, num_new, heads, _ = q.shape
    lse_shape = (batch, heads, num_new if return_lse else 0)
    return new(q, *q.shape), new(q, *lse_shape, dtype=lse_dtype(q))


_attention_decode = Op(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scales, Tensor? v_scales,"
    " Tensor seq_lens, Tensor? block_table, float scale, int window, bool ring, float softcap,"
    " bool return_lse) -> (Tensor, Tensor)",
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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the last few tokens of each sequence over its cache.

    q [B, N, H, C]; k_cache, v_cache [B, S, G, C] (position p in slot p, or p mod S with ring), or
    pages [pages, page_size, G, C] with block_table [B, pages] integers; seq_lens [B] int32 counts
    the keys of each row, its N new ones included; 0 leaves a row out. scale, window and softcap as
    in `attention_prefill`; a ring needs a window, and S >= window + N - 1. Slots outside the
    visible range are never used.

    Returns out [B, N, H, C] and, unless return_lse is False, the log-sum-exp [B, H, N] in fp32.
    Dtypes as in `attention_prefill`. Has no backward.

    With k_scales and v_scales, fp32 of the caches' shape without C, the caches are float8_e4m3fn,
    all four contiguous: a head of a key is its codes times its scale, as `qkv_norm_rope_cache`
    makes them, and is never rounded to the dtype of q.

    The eager twin raises ValueError for a seq_lens outside 0..S (in a ring: below 0); a kernel
    takes the nearer of the two. That block_table names pages must hold on the device.
    """
    dtype = product_dtype(q)
    if dtype is not None:
        (q,) = cast(dtype, q)
        if k_scales is None:
            k_cache, v_cache = cast(dtype, k_cache, v_cache)
    cache = k_cache, v_cache, k_scales, v_scales, seq_lens, block_table
    out, lse = _attention_decode(q, *cache, scale, window, ring, softcap, return_lse)
    return out, lse if return_lse else None


def _qkv_unserved(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, softcap: float
) -> str | None:
    if q.ndim == 3 and k_cache.ndim == 4 and q.shape[1] > MOST_GROUP * k_cache.shape[2]:
        return f"at most {MOST_GROUP} query heads may share a KV head, got {list(q.shape)}"
    return _decode_unserved(q, k_cache, v_cache, k_scales, softcap)


_qkv_attention_decode = Op(
    "qkv_attention_decode(Tensor q, Tensor? k, Tensor? v, Tensor q_weight, Tensor? k_weight,"
    " Tensor positions, Tensor inv_freq, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor seq_lens, Tensor? block_table,"
    " Tensor(e!) counters, float eps, float scale, int window, bool ring,"
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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """One new token of each sequence: `qkv_norm_rope`, its key into the cache, `attention_decode`.

    q [B, H, C], k and v [B, G, C], q_weight, k_weight, positions [B], inv_freq and eps are those of
    `qkv_norm_rope`; without k the caches hold the new key already (a layer that borrows them).
    k_cache, v_cache, k_scales, v_scales, seq_lens [B], block_table, scale, window, ring and softcap
    are those of `attention_decode`; seq_lens counts the new token, whose place is that of key
    seq_lens - 1. A length of 0 leaves a row out: nothing is written. counters [B, G, 9] are int32
    zeros and are so again behind the call: one tensor serves all layers of a step.

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
    cache = k_cache, v_cache, k_scales, v_scales, seq_lens, block_table, counters
    options = eps, scale, window, ring, softcap
    args = (q, k, v, q_weight, k_weight, positions, inv_freq, *cache, *options)
    return _qkv_attention_decode(*args)
