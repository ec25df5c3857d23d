"""Ops of Google's Gemma 4 text models for PyTorch, usable alone from any program."""

from .extension import build_info
from .ops import (
    add_rms_norm,
    attention_decode,
    attention_prefill,
    geglu,
    moe_experts,
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

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "build_info",
    "geglu",
    "moe_experts",
    "moe_route",
    "ple_embed",
    "ple_gate",
    "qkv_norm_rope",
    "qkv_norm_rope_cache",
    "rms_norm",
    "softcap",
    "softcap_argmax",
]
