"""Rows of keys and values in eight bits: x = code · scale, a scale for each head of each key.

scale = max |x| / 448, of float32, and 1 for a row of zeros; code is the number of e4m3 nearest to
x / scale. What is not finite leaves a scale that is not.
"""

import torch
from torch import Tensor

from .reference.common import check_same_device, check_shape

E4M3 = torch.float8_e4m3fn
MOST = torch.finfo(E4M3).max


def to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] as codes [..., C] and scales [...]."""
    x = x.float()
    scales = x.abs().amax(-1) / MOST
    scales = scales.masked_fill_(scales == 0, 1.0)
    return (x / scales[..., None]).clamp_(-MOST, MOST).to(E4M3), scales


def from_e4m3(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., C] of codes [..., C] and scales [...], rounded once."""
    return codes.to(dtype).mul_(scales[..., None])


def write_slots(cache: Tensor, scales: Tensor | None, slots_T: Tensor, x_TGC: Tensor) -> None:
    """x into slots of a cache [..., G, C], in e4m3 if it has scales [..., G]."""
    if scales is not None:
        x_TGC, scales_TG = to_e4m3(x_TGC)
        scales.flatten(0, -2).index_copy_(0, slots_T, scales_TG)
        cache, x_TGC = cache.view(torch.uint8), x_TGC.view(torch.uint8)  # which index_copy_ knows
    cache.flatten(0, -3).index_copy_(0, slots_T, x_TGC)


def check_scales(
    k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
) -> bool:
    """Whether a cache is in e4m3; TypeError or ValueError where it is half of that."""
    if (k_scales is None) != (v_scales is None):
        raise ValueError("k_scales and v_scales must come together or not")
    if k_scales is None or v_scales is None:
        return False
    for name, cache, scales in (("k", k_cache, k_scales), ("v", v_cache, v_scales)):
        if cache.dtype != E4M3:
            raise TypeError(f"{name}_cache must be {E4M3} where it has scales, got {cache.dtype}")
        if scales.dtype != torch.float32:
            raise TypeError(f"{name}_scales must be float32, got {scales.dtype}")
        check_same_device(f"{name}_scales", scales, f"{name}_cache", cache)
        check_shape(f"{name}_scales", scales, tuple(cache.shape[:-1]))
        if not (cache.is_contiguous() and scales.is_contiguous()):
            raise ValueError(f"{name}_cache and {name}_scales must be contiguous")
    return True
