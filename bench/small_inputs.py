"""Small inputs of each op: awkward widths, all dtypes, both head sizes and others."""

from collections.abc import Iterator
from typing import Any

import torch
from support.backends import BF16, FP16, FP32, Backend, in_dtypes

Inputs = dict[str, Any]
Call = tuple[str, Inputs]  # an op and its arguments

T = 64  # tokens
WEIGHTS = {"weight", "post_weight", "next_weight", "q_weight", "k_weight", "inv_freq", "scale"}
SMALL = WEIGHTS | {"positions", "slots", "ids"}


def norm_inputs(b: Backend, width: int, dtype: torch.dtype) -> Inputs:
    return {
        "x": b.randn(T, width, dtype=dtype),
        "weight": b.weight(width, dtype=dtype),
    }


def add_norm_inputs(b: Backend, width: int, dtype: torch.dtype) -> Inputs:
    return {
        "x": b.randn(T, width, dtype=dtype),
        "residual": b.randn(T, width, dtype=dtype),
        "post_weight": b.weight(width, dtype=dtype),
        "next_weight": b.weight(width, dtype=dtype),
        "scale": b.weight(1, dtype=dtype),
    }


def moe_norm_inputs(b: Backend, width: int, dtype: torch.dtype) -> Inputs:
    return norm_inputs(b, width, dtype) | {"scale": b.weight(width, dtype=dtype)}


def qkv_inputs(
    b: Backend, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, with_v: bool = True
) -> Inputs:
    """Apart and not views of one projection, whose memory would be counted for all three."""
    return {
        "q": b.randn(T, heads, head_dim, dtype=dtype),
        "k": b.randn(T, kv_heads, head_dim, dtype=dtype),
        "v": b.randn(T, kv_heads, head_dim, dtype=dtype) if with_v else None,
        "q_weight": b.weight(head_dim, dtype=dtype),
        "k_weight": b.weight(head_dim, dtype=dtype),
        "positions": torch.arange(T),
        "inv_freq": torch.rand(head_dim // 2),
    }


def qkv_cache_inputs(b: Backend, dtype: torch.dtype) -> Inputs:
    caches = {name: b.nan(2 * T, 2, 256, dtype=dtype) for name in ("k_cache", "v_cache")}
    slots = torch.randperm(2 * T)[:T]
    return qkv_inputs(b, 8, 2, 256, dtype) | caches | {"slots": slots}


def ple_embed_inputs(b: Backend, dtype: torch.dtype) -> Inputs:
    return {
        "ids": torch.randperm(T),
        "table": b.randn(T, 5 * 256, dtype=dtype),
        "projected": b.randn(T, 5 * 256, dtype=dtype),
        "weight": b.weight(256, dtype=dtype),
    }


def ple_gate_inputs(b: Backend, dtype: torch.dtype) -> Inputs:
    ple = b.randn(T, 5, 256, dtype=dtype)
    return {"gate": b.randn(T, 256, dtype=dtype), "ple": ple, "layer": 2}


def prefill_inputs(
    b: Backend, tokens: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype
) -> Inputs:
    q, k, v = (
        b.randn(n, h, head_dim, dtype=dtype, std=0.3)
        for n, h in ((tokens, heads), (keys, 1), (keys, 1))
    )
    cu_q, cu_k = b.int32(0, tokens), b.int32(0, keys)
    return dict(
        q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=tokens, max_seqlen_k=keys
    )


def backward_inputs(
    b: Backend, tokens: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype
) -> Inputs:
    inputs = prefill_inputs(b, tokens, keys, heads, head_dim, dtype)
    out, lse = b.ops.attention_prefill(**inputs, return_lse=True)
    grads = {"grad_out": b.randn(*out.shape, dtype=dtype), "grad_lse": torch.zeros_like(lse)}
    options = dict(scale=1.0, causal=True, window=0, window_right=-1, softcap=0.0)
    return inputs | grads | options | {"out": out, "lse": lse}


def decode_inputs(b: Backend, keys: int, heads: int, head_dim: int, dtype: torch.dtype) -> Inputs:
    k, v = (b.randn(1, keys, 1, head_dim, dtype=dtype, std=0.3) for _ in "kv")
    q = b.randn(1, 1, heads, head_dim, dtype=dtype, std=0.3)
    return dict(q=q, k_cache=k, v_cache=v, seq_lens=b.int32(keys), return_lse=False)


def moe_inputs(
    b: Backend,
    tokens: int,
    experts: int,
    k: int,
    width: int,
    hidden: int,
    dtype: torch.dtype = BF16,
) -> Inputs:
    chosen = torch.rand(tokens, experts).argsort(-1)[:, :k].int()
    return {
        "x": b.randn(tokens, width, dtype=dtype),
        "gate_up": b.randn(experts, 2 * hidden, width, dtype=dtype),
        "down": b.randn(experts, width, hidden, dtype=dtype),
        "experts": chosen,
        "weights": torch.rand(tokens, k),
    }


def launch_cases(b: Backend) -> Iterator[Call]:
    """Calls that together launch every instance of every kernel."""
    half = (BF16, FP16)
    for dtype in (*half, FP32):
        for width in (512, 1536, 3840, 5376, 77):
            yield "rms_norm", norm_inputs(b, width, dtype)
            yield "add_rms_norm", add_norm_inputs(b, width, dtype)
            yield "moe_norm", moe_norm_inputs(b, width, dtype)
        for head_dim in (64, 128, 256, 512, 24):
            yield "qkv_norm_rope", qkv_inputs(b, 2, 1, head_dim, dtype)
        for width in (128, 256, 512, 77):
            table, projected = (b.randn(4, 2 * width, dtype=dtype) for _ in range(2))
            weight, ids = b.weight(width, dtype=dtype), torch.arange(4)
            yield "ple_embed", dict(ids=ids, table=table, projected=projected, weight=weight)
            gate, ple = b.randn(4, width, dtype=dtype), b.randn(4, 2, width, dtype=dtype)
            yield "ple_gate", dict(gate=gate, ple=ple, layer=1)
            yield "geglu", dict(gate_up=b.randn(4, 2 * width, dtype=dtype))
            for op in ("softcap", "softcap_argmax"):
                yield op, dict(logits=b.randn(4, width, dtype=dtype), cap=30.0)
        for experts in (128, 512):
            logits, scale = b.randn(4, experts, dtype=dtype), torch.rand(experts)
            yield "moe_route", dict(logits=logits, per_expert_scale=scale, k=8)
    for dtype in half:
        yield from mixed_cases(b, dtype)
        for tokens, experts, k in ((1, 2, 1), (12, 2, 1), (20, 2, 1), (160, 16, 8)):
            inputs = moe_inputs(b, tokens, experts, k, 64, 64, dtype)
            yield "moe_experts", inputs
            yield "moe_experts", in_dtypes(inputs, gate_up=FP32, down=FP32)
        for head_dim in (64, 128, 256, 512):
            for softcap in (0.0, 30.0):
                for tokens in (1, 17, 65):
                    yield (
                        "attention_prefill",
                        dict(prefill_inputs(b, tokens, 17, 1, head_dim, dtype), softcap=softcap),
                    )
            yield "attention_decode", decode_inputs(b, 300, 1, head_dim, dtype)
            yield "attention_prefill_backward", backward_inputs(b, 17, 17, 1, head_dim, dtype)


def mixed_cases(b: Backend, dtype: torch.dtype) -> Iterator[Call]:
    """`dtype` beside fp32 weights alone, and beside fp32 residuals and tables too."""
    for width in (512, 1536, 3840, 5376, 77):
        yield "rms_norm", in_dtypes(norm_inputs(b, width, FP32), x=dtype)
        inputs = add_norm_inputs(b, width, FP32)
        yield "add_rms_norm", in_dtypes(inputs, x=dtype, residual=dtype)
        yield "add_rms_norm", in_dtypes(inputs, x=dtype)
        inputs = moe_norm_inputs(b, width, FP32)
        yield "moe_norm", in_dtypes(inputs, x=dtype, scale=dtype)
        yield "moe_norm", in_dtypes(inputs, x=dtype)
    for head_dim in (64, 128, 256, 512, 24):
        inputs = qkv_inputs(b, 2, 1, head_dim, FP32)
        yield "qkv_norm_rope", in_dtypes(inputs, q=dtype, k=dtype, v=dtype)
    for width in (128, 256, 512, 77):
        table, projected, weight = b.randn(4, width), b.randn(4, width), b.weight(width)
        inputs = dict(ids=torch.arange(4), table=table, projected=projected, weight=weight)
        yield "ple_embed", in_dtypes(inputs, projected=dtype, table=dtype)
        yield "ple_embed", in_dtypes(inputs, projected=dtype)
        inputs = dict(gate=b.randn(4, width), ple=b.randn(4, 2, width), layer=1)
        yield "ple_gate", in_dtypes(inputs, gate=dtype)


CASES = {  # op, its arguments
    "rms_norm, E2B": ("rms_norm", lambda b, d: norm_inputs(b, 1536, d)),
    "rms_norm, 12B": ("rms_norm", lambda b, d: norm_inputs(b, 3840, d)),
    "add_rms_norm, E4B": ("add_rms_norm", lambda b, d: add_norm_inputs(b, 2560, d)),
    "add_rms_norm, 26B": ("add_rms_norm", lambda b, d: add_norm_inputs(b, 2816, d)),
    "moe_norm, 26B": ("moe_norm", lambda b, d: moe_norm_inputs(b, 2816, d)),
    "qkv_norm_rope, sliding": ("qkv_norm_rope", lambda b, d: qkv_inputs(b, 8, 2, 256, d)),
    "qkv_norm_rope, full": ("qkv_norm_rope", lambda b, d: qkv_inputs(b, 8, 2, 512, d)),
    "qkv_norm_rope, V from K": ("qkv_norm_rope", lambda b, d: qkv_inputs(b, 4, 4, 512, d, False)),
    "qkv_norm_rope_cache": ("qkv_norm_rope_cache", qkv_cache_inputs),
    "geglu": ("geglu", lambda b, d: {"gate_up": b.randn(T, 2 * 2048, dtype=d)}),
    "ple_embed": ("ple_embed", ple_embed_inputs),
    "ple_gate": ("ple_gate", ple_gate_inputs),
    # Under autocast: fp32 beside what is in 16 bits, here in fp32 where the dtype is.
    "rms_norm, fp32 weight": ("rms_norm", lambda b, d: in_dtypes(norm_inputs(b, 2816, FP32), x=d)),
    "add_rms_norm, fp32 residual": (
        "add_rms_norm",
        lambda b, d: in_dtypes(add_norm_inputs(b, 2560, FP32), x=d),
    ),
    "qkv_norm_rope, fp32 weights": (
        "qkv_norm_rope",
        lambda b, d: in_dtypes(qkv_inputs(b, 8, 2, 256, FP32), q=d, k=d, v=d),
    ),
    "ple_embed, fp32 table": (
        "ple_embed",
        lambda b, d: in_dtypes(ple_embed_inputs(b, FP32), projected=d),
    ),
    "ple_gate, fp32 ple": ("ple_gate", lambda b, d: in_dtypes(ple_gate_inputs(b, FP32), gate=d)),
    "softcap": ("softcap", lambda b, d: {"logits": b.randn(T, 4096, dtype=d), "cap": 30.0}),
    "softcap_argmax": (
        "softcap_argmax",
        lambda b, d: {"logits": b.randn(T, 8192, dtype=d), "cap": 30.0},
    ),
}
