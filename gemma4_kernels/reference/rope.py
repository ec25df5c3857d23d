"""Twins and checks of `ops/rope.py`."""

import torch
from torch import Tensor

from ..e4m3 import check_scales, write_slots
from .common import (
    check_beside,
    check_floating,
    check_integral,
    check_like,
    check_same_device,
    check_shape,
    extremes,
)
from .norm import rms_norm, sum_of_rows, through_norm, widest

__all__ = ["qkv_norm_rope", "qkv_norm_rope_backward", "qkv_norm_rope_cache"]


def check_qkv_norm_rope(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
) -> None:
    check_floating("q", q)
    if q.ndim != 3:
        raise ValueError(f"q must be [T, H, C], got {list(q.shape)}")
    num_tokens, _, head_dim = q.shape
    if head_dim % 2 != 0:
        raise ValueError(f"q must have an even head_dim, got {head_dim}")
    check_beside("q_weight", q_weight, "q", q, (head_dim,))
    if (k is None) != (k_weight is None):
        raise ValueError("k and k_weight must come together or not")
    if v is not None and k is None:
        raise ValueError("v must not come without k")
    if k is not None:
        check_like("k", k, "q", q)
        if k.ndim != 3 or k.shape[0] != num_tokens or k.shape[2] != head_dim:
            raise ValueError(f"k must be [{num_tokens}, G, {head_dim}], got {list(k.shape)}")
    if k_weight is not None:
        check_beside("k_weight", k_weight, "q", q, (head_dim,))
    if v is not None and k is not None:
        check_like("v", v, "q", q)
        check_shape("v", v, k.shape)
    check_integral("positions", positions)
    check_same_device("positions", positions, "q", q)
    check_shape("positions", positions, (num_tokens,))
    if inv_freq.dtype != torch.float32:
        raise TypeError(
            f"inv_freq must be torch.float32 whatever the dtype of q, got {inv_freq.dtype}"
        )
    check_same_device("inv_freq", inv_freq, "q", q)
    check_shape("inv_freq", inv_freq, (head_dim // 2,))


def qkv_norm_rope(
    q_THC: Tensor,
    k_TGC: Tensor | None,
    v_TGC: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    positions_T: Tensor,
    inv_freq: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q_THC.dtype
    inner = torch.promote_types(dtype, q_weight.dtype)
    if k_weight is not None:
        inner = torch.promote_types(inner, k_weight.dtype)
    if inner != dtype:  # weights wider than q leave one rounding, at the end
        wide_k = None if k_TGC is None else k_TGC.to(inner)
        wide_v = None if v_TGC is None else v_TGC.to(inner)
        args = (q_THC.to(inner), wide_k, wide_v, q_weight, k_weight, positions_T, inv_freq, eps)
        q, k, v = qkv_norm_rope(*args)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    angle = positions_T[:, None, None, None] * inv_freq
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    sin = torch.cat([-sin, sin], 2)

    def norm_and_rotate(x: Tensor, weight: Tensor | None) -> Tensor:
        # Pairs are (i, i + C/2): the two halves of a head, swapped by the flip.
        halves = rms_norm(x, weight, eps).unflatten(-1, (2, -1))
        return (halves * cos + halves.flip(2) * sin).flatten(2)

    q = norm_and_rotate(q_THC, q_weight)
    if k_TGC is None:
        return q, q.new_empty(0), q.new_empty(0)
    # V is made from the raw k (k_eq_v): it sees neither k's weight nor the rotation.
    v = rms_norm(k_TGC if v_TGC is None else v_TGC, None, eps)
    return q, norm_and_rotate(k_TGC, k_weight), v


def qkv_norm_rope_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    q_THC: Tensor,
    k_TGC: Tensor | None,
    v_TGC: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    positions_T: Tensor,
    inv_freq: Tensor,
    eps: float,
    wants_q_weight: bool,
    wants_k_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = widest(q_THC, q_weight, k_weight)
    angle = positions_T[:, None, None] * inv_freq
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)

    def wide_of(grad: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=wide) if grad is None else grad.to(wide)

    def through(
        grad: Tensor | None, x: Tensor, weight: Tensor, raw_grad: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of a head that was normed and turned, and that is a head of V as it is too."""
        a, b = wide_of(grad, x).chunk(2, -1)
        back = torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
        grad_x, weight_rows = through_norm(back, x.to(wide), weight.to(wide), eps)
        if raw_grad is not None:
            grad_x = grad_x + through_norm(raw_grad.to(wide), x.to(wide), None, eps)[0]
        return grad_x.to(x.dtype), weight_rows

    def none() -> Tensor:
        return q_THC.new_empty(0)

    dq, q_rows = through(grad_q, q_THC, q_weight)
    d_q_weight = sum_of_rows(q_THC, q_rows, q_weight, wants_q_weight)
    if k_TGC is None or k_weight is None:
        return dq, none(), none(), d_q_weight, none()
    dk, k_rows = through(grad_k, k_TGC, k_weight, grad_v if v_TGC is None else None)
    d_k_weight = sum_of_rows(q_THC, k_rows, k_weight, wants_k_weight)
    if v_TGC is None:
        return dq, dk, none(), d_q_weight, d_k_weight
    dv, _ = through_norm(wide_of(grad_v, v_TGC), v_TGC.to(wide), None, eps)
    return dq, dk, dv.to(v_TGC.dtype), d_q_weight, d_k_weight


def check_qkv_norm_rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    slots: Tensor,
) -> None:
    check_qkv_norm_rope(q, k, v, q_weight, k_weight, positions, inv_freq)
    coded = check_scales(k_cache, v_cache, k_scales, v_scales)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        (check_same_device if coded else check_like)(name, cache, "q", k)
        if cache.ndim < 3 or cache.shape[-2:] != k.shape[1:]:
            raise ValueError(
                f"{name} must end in [G, C] = {list(k.shape[1:])}, got {list(cache.shape)}"
            )
        if not cache.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    check_shape("v_cache", v_cache, k_cache.shape)
    check_integral("slots", slots)
    check_same_device("slots", slots, "q", k)
    check_shape("slots", slots, k.shape[:1])


def qkv_norm_rope_cache(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    positions_T: Tensor,
    inv_freq: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    slots_T: Tensor,
) -> Tensor:
    q, k, v = qkv_norm_rope(q_THC, k_TGC, v_TGC, q_weight, k_weight, positions_T, inv_freq, eps)
    slots_T = slots_T.long()
    lowest, highest = extremes(slots_T)
    if highest >= k_cache.shape[:-2].numel():
        raise ValueError(
            f"slots must lie below the cache's {k_cache.shape[:-2].numel()} slots, or be negative "
            f"for none, got {highest}"
        )
    if lowest < 0:
        keep = slots_T >= 0
        slots_T, k, v = slots_T[keep], k[keep], v[keep]
    write_slots(k_cache, k_scales, slots_T, k)
    write_slots(v_cache, v_scales, slots_T, v)
    return q
