"""Ops of Google's Gemma 4 text models for PyTorch, usable alone from any program."""

from . import extension, opset
from .check import record
from .flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .info import build_info
from .ops import (
    add_rms_norm,
    attention_decode,
    attention_prefill,
    geglu,
    linear_small,
    moe_experts,
    moe_norm,
    moe_route,
    ple_embed,
    ple_gate,
    qkv_norm_rope,
    qkv_norm_rope_cache,
    rms_norm,
    softcap,
    softcap_argmax,
)

__version__ = "0.1.0"

opset.kernels = opset.Kernels("gemma4_kernels_compiled", "CUDA", extension.covers, record.failed)

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "build_info",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "geglu",
    "linear_small",
    "moe_experts",
    "moe_norm",
    "moe_route",
    "ple_embed",
    "ple_gate",
    "qkv_norm_rope",
    "qkv_norm_rope_cache",
    "rms_norm",
    "softcap",
    "softcap_argmax",
]
