"""Ops of Google's Gemma 4 text models for PyTorch, usable alone from any program."""

from . import extension, library
from .extension import build_info
from .flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .ops import (
    add_rms_norm,
    attention_decode,
    attention_prefill,
    geglu,
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

library.use_compiled(extension.ops_in(library.COMPILED))

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "build_info",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "geglu",
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
