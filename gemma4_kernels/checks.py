"""What each op demands of its tensors; run before the eager twins and by the fakes.

A check takes arguments by their names in the op's schema. It reads shapes, dtypes and devices only,
never a value, so that it costs no synchronisation and holds under `torch.compile`. What the tensors
must hold is looked at by the eager twins, which read it anyway; a kernel does with it what the op's
docstring says.
"""

import torch
from torch import Tensor


def _floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _integral(name: str, x: Tensor) -> None:
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, got {x.dtype}")


def _shape(name: str, x: Tensor, want: tuple[int, ...]) -> None:
    if x.shape != want:
        raise ValueError(f"{name} must have shape {list(want)}, got {list(x.shape)}")


def _like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    _same_device(name, x, other_name, other)


def _same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def _beside(name: str, x: Tensor, other_name: str, other: Tensor, want: tuple[int, ...]) -> None:
    """Of any floating dtype, on the device of the other, of this shape."""
    _floating(name, x)
    _same_device(name, x, other_name, other)
    _shape(name, x, want)


def rms_norm(x: Tensor, weight: Tensor | None, name: str = "weight") -> None:
    _floating("x", x)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if weight is not None:
        _beside(name, weight, "x", x, x.shape[-1:])


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    next_weight: Tensor | None,
    scale: Tensor | None,
) -> None:
    rms_norm(x, post_weight, "post_weight")
    _beside("residual", residual, "x", x, x.shape)
    if next_weight is not None:
        _beside("next_weight", next_weight, "x", x, x.shape[-1:])
    if scale is not None:
        _beside("scale", scale, "x", x, (1,))


def qkv_norm_rope(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
) -> None:
    _floating("q", q)
    if q.ndim != 3:
        raise ValueError(f"q must be [T, H, C], got {list(q.shape)}")
    num_tokens, _, head_dim = q.shape
    if head_dim % 2 != 0:
        raise ValueError(f"q must have an even head_dim, got {head_dim}")
    _beside("q_weight", q_weight, "q", q, (head_dim,))
    if (k is None) != (k_weight is None):
        raise ValueError("k and k_weight must come together or not")
    if v is not None and k is None:
        raise ValueError("v must not come without k")
    if k is not None:
        _like("k", k, "q", q)
        if k.ndim != 3 or k.shape[0] != num_tokens or k.shape[2] != head_dim:
            raise ValueError(f"k must be [{num_tokens}, G, {head_dim}], got {list(k.shape)}")
    if k_weight is not None:
        _beside("k_weight", k_weight, "q", q, (head_dim,))
    if v is not None and k is not None:
        _like("v", v, "q", q)
        _shape("v", v, k.shape)
    _integral("positions", positions)
    _same_device("positions", positions, "q", q)
    _shape("positions", positions, (num_tokens,))
    if inv_freq.dtype != torch.float32:
        raise TypeError(
            f"inv_freq must be torch.float32 whatever the dtype of q, got {inv_freq.dtype}"
        )
    _same_device("inv_freq", inv_freq, "q", q)
    _shape("inv_freq", inv_freq, (head_dim // 2,))


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
) -> None:
    qkv_norm_rope(q, k, v, q_weight, k_weight, positions, inv_freq)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _like(name, cache, "q", k)
        if cache.ndim < 3 or cache.shape[-2:] != k.shape[1:]:
            raise ValueError(
                f"{name} must end in [G, C] = {list(k.shape[1:])}, got {list(cache.shape)}"
            )
        if not cache.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    _shape("v_cache", v_cache, k_cache.shape)
    _integral("slots", slots)
    _same_device("slots", slots, "q", k)
    _shape("slots", slots, k.shape[:1])


def geglu(gate_up: Tensor) -> None:
    _floating("gate_up", gate_up)
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2 != 0:
        raise ValueError(
            f"gate_up must end in an even width, gate then up, got {list(gate_up.shape)}"
        )


def linear_small(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    factor: Tensor | None,
    gated: bool,
) -> None:
    _floating("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, D], got {list(x.shape)}")
    tokens, width = x.shape
    _like("weight", weight, "x", x)
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(f"weight must be [N, {width}], got {list(weight.shape)}")
    if gated and weight.shape[0] % 2:
        raise ValueError(f"a gated weight must have an even height, got {list(weight.shape)}")
    if (residual is None) != (post_weight is None):
        raise ValueError("residual and post_weight must come together or not")
    if scale is not None and residual is None:
        raise ValueError("scale must not come without a residual")
    if factor is not None and gated:
        raise ValueError("factor must not come with gated")
    if residual is not None:
        _beside("residual", residual, "x", x, (tokens, width))
    for name, row in (("post_weight", post_weight), ("norm_weight", norm_weight)):
        if row is not None:
            _beside(name, row, "x", x, (width,))
    if scale is not None:
        _beside("scale", scale, "x", x, (1,))
    if factor is not None:
        _like("factor", factor, "x", x)
        _shape("factor", factor, (tokens, weight.shape[0]))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    window: int,
    k_name: str = "k",
    v_name: str = "v",
) -> None:
    _floating("q", q)
    if block_table is not None and k.ndim != 4:
        raise ValueError(
            f"with a block_table {k_name} and {v_name} must be [pages, page_size, G, C], "
            f"got {list(k.shape)}"
        )
    for name, x in ((k_name, k), (v_name, v)):
        _like(name, x, "q", q)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name} must have the head_dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    _shape(v_name, v, k.shape)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads <= 0 or heads % kv_heads != 0:
        raise ValueError(
            f"the query heads must be a multiple of the KV heads, got {heads} and {kv_heads} "
            f"in q and {k_name}"
        )
    if window < 0:
        raise ValueError(f"window must be 0 (none) or a key count, got {window}")
    if block_table is not None:
        _integral("block_table", block_table)
        _same_device("block_table", block_table, "q", q)
        if block_table.ndim != 2:
            raise ValueError(f"block_table must be [B, pages], got {list(block_table.shape)}")


def attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    window: int,
    window_right: int,
    causal: bool,
    block_table: Tensor | None,
) -> None:
    if q.ndim != 3:
        raise ValueError(f"q must be [T, H, C], got {list(q.shape)}")
    if block_table is None and k.ndim != 3:
        raise ValueError(f"k must be [T, G, C], got {list(k.shape)}")
    _attention(q, k, v, block_table, window)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {cu.dtype}")
        _same_device(name, cu, "q", q)
        if cu.ndim != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name} must be [B + 1], got {list(cu.shape)}")
    _shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)
    tokens, batch = q.shape[0], cu_seqlens_q.shape[0] - 1
    # Not of the compiler's symbols: a guard for each length would be one.
    if type(max_seqlen_q) is int and type(tokens) is int and max_seqlen_q * batch < tokens:
        raise ValueError(
            f"max_seqlen_q must be the longest of {batch} sequences of {tokens} queries together, "
            f"got {max_seqlen_q}"
        )
    if block_table is not None and block_table.shape[0] != cu_seqlens_q.shape[0] - 1:
        raise ValueError(
            f"block_table must have one row per sequence, {cu_seqlens_q.shape[0] - 1}, "
            f"got {block_table.shape[0]}"
        )
    if window_right < -1 or (causal and window_right > 0):
        raise ValueError(
            f"window_right must be -1 (no bound) or a key count, and is for causal=False alone, "
            f"got {window_right}"
        )


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    window: int,
    ring: bool,
) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, N, H, C], got {list(q.shape)}")
    if k_cache.ndim != 4:
        raise ValueError(f"k_cache must be 4-d, got {list(k_cache.shape)}")
    _attention(q, k_cache, v_cache, block_table, window, "k_cache", "v_cache")
    if seq_lens.dtype != torch.int32:
        raise TypeError(f"seq_lens must be int32, got {seq_lens.dtype}")
    _same_device("seq_lens", seq_lens, "q", q)
    _shape("seq_lens", seq_lens, q.shape[:1])
    rows, rows_name = (k_cache, "k_cache") if block_table is None else (block_table, "block_table")
    if rows.shape[0] != q.shape[0]:
        raise ValueError(
            f"{rows_name} must have one row per sequence, {q.shape[0]}, got {rows.shape[0]}"
        )
    if ring:
        if block_table is not None:
            raise ValueError("a ring cache takes no block_table")
        need = window + q.shape[1] - 1
        if window <= 0 or need > k_cache.shape[1]:
            raise ValueError(
                f"a ring cache needs a window and window + new tokens - 1 slots, "
                f"got window {window} and {k_cache.shape[1]} slots for {q.shape[1]} new tokens"
            )


def moe_norm(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    rms_norm(x, weight)
    _beside("scale", scale, "x", x, x.shape[-1:])


def moe_route(logits: Tensor, per_expert_scale: Tensor, k: int) -> None:
    _floating("logits", logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [T, E], got {list(logits.shape)}")
    _beside("per_expert_scale", per_expert_scale, "logits", logits, logits.shape[1:])
    if not (1 <= k <= logits.shape[1]):
        raise ValueError(f"k must lie in 1..E = {logits.shape[1]}, got {k}")


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor) -> None:
    _floating("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, D], got {list(x.shape)}")
    if gate_up.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"gate_up must be torch.float32 or of the dtype of x, {x.dtype}, got {gate_up.dtype}"
        )
    _same_device("gate_up", gate_up, "x", x)
    _like("down", down, "gate_up", gate_up)
    if down.ndim != 3:
        raise ValueError(f"down must be [E, D, F], got {list(down.shape)}")
    num_experts, width, hidden = down.shape
    if width != x.shape[1]:
        raise ValueError(f"down must be [E, {x.shape[1]}, F], got [E, {width}, F]")
    _shape("gate_up", gate_up, (num_experts, 2 * hidden, width))
    _integral("experts", experts)
    _same_device("experts", experts, "x", x)
    if experts.ndim != 2 or experts.shape[0] != x.shape[0]:
        raise ValueError(f"experts must be [{x.shape[0]}, K], got {list(experts.shape)}")
    _beside("weights", weights, "x", x, experts.shape)


def ple_embed(ids: Tensor, table: Tensor, projected: Tensor, weight: Tensor) -> None:
    _integral("ids", ids)
    if ids.ndim != 1:
        raise ValueError(f"ids must be [T], got {list(ids.shape)}")
    _floating("table", table)
    _floating("projected", projected)
    shaped = table.ndim == 2 and weight.ndim == 1 and weight.shape[0] > 0
    if not shaped or table.shape[1] % weight.shape[0] != 0:
        raise ValueError(
            f"table must be [V, L * P] and weight [P], got {list(table.shape)} and "
            f"{list(weight.shape)}"
        )
    _floating("weight", weight)
    _same_device("weight", weight, "projected", projected)
    _same_device("ids", ids, "projected", projected)
    if not table.is_cpu:
        _same_device("table", table, "projected", projected)
    _shape("projected", projected, (ids.shape[0], table.shape[1]))


def ple_gate(gate: Tensor, ple: Tensor, layer: int) -> None:
    _floating("gate", gate)
    _floating("ple", ple)
    _same_device("ple", ple, "gate", gate)
    if gate.ndim != 2:
        raise ValueError(f"gate must be [T, P], got {list(gate.shape)}")
    if ple.ndim != 3 or ple.shape[0] != gate.shape[0] or ple.shape[2] != gate.shape[1]:
        raise ValueError(
            f"ple must be [{gate.shape[0]}, L, {gate.shape[1]}], got {list(ple.shape)}"
        )
    if not (0 <= layer < ple.shape[1]):
        raise ValueError(f"layer must lie in 0..L-1 = {ple.shape[1] - 1}, got {layer}")


def softcap(logits: Tensor, cap: float) -> None:
    _floating("logits", logits)
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")


def softcap_argmax(logits: Tensor, cap: float) -> None:
    softcap(logits, cap)
    if logits.ndim < 1 or logits.shape[-1] <= 0:
        raise ValueError(f"logits must end in a non-empty vocabulary, got {list(logits.shape)}")
