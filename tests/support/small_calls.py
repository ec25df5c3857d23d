"""Small calls of each op: awkward widths, all dtypes, both head sizes and others."""

from collections.abc import Iterator
from typing import Any

import torch

from . import backward_cases, cases
from .backends import BF16, FP16, FP32, Backend, in_dtypes
from .cases import Arguments, under_autocast

Call = tuple[str, Arguments]

WEIGHTS = {"weight", "post_weight", "next_weight", "q_weight", "k_weight", "inv_freq", "scale"}
SMALL = WEIGHTS | {"positions", "slots", "ids"}
WIDTHS = (512, 1536, 3840, 5376, 77)
HEAD_DIMS = (64, 128, 256, 512, 24)
PLE_WIDTHS = (128, 256, 512, 77)


def launch_cases(b: Backend) -> Iterator[Call]:
    """Calls that together launch every instance of every kernel."""
    half = (BF16, FP16)
    for dtype in (*half, FP32):
        for width in WIDTHS:
            for op in ("rms_norm", "add_rms_norm", "moe_norm"):
                yield op, getattr(cases, op)(b, T, width, dtype=dtype)
        for width in (512, 5376):
            for op in ("rms_norm", "add_rms_norm", "moe_norm"):
                yield backward_of(b, op, getattr(cases, op)(b, T, width, dtype=dtype))
        for head_dim in HEAD_DIMS:
            yield "qkv_norm_rope", cases.qkv_norm_rope(b, T, 2, 1, head_dim, dtype=dtype)
        for head_dim in (256, 512):
            forward = cases.qkv_norm_rope(b, T, 2, 1, head_dim, dtype=dtype)
            yield backward_of(b, "qkv_norm_rope", forward)
        for width in PLE_WIDTHS:
            yield "ple_embed", cases.ple_embed(b, 4, 4, 2, width, dtype=dtype)
            yield "ple_gate", cases.ple_gate(b, 4, 2, width, 1, dtype=dtype)
            for op in ("geglu", "softcap", "softcap_argmax", "softcap_cross_entropy"):
                arguments = getattr(cases, op)(b, 4, width, dtype=dtype)
                yield op, arguments
                if op in ("geglu", "softcap_cross_entropy"):
                    yield backward_of(b, op, arguments)
            yield backward_of(b, "ple_gate", cases.ple_gate(b, 4, 2, width, 1, dtype=dtype))
        for vocab_size in (4104, 77):
            for options in ({}, dict(temperature=0.7), dict(temperature=0.7, top_k=5)):
                yield "sample", cases.sample(b, 2, vocab_size, dtype=dtype, **options)
        for experts in (128, 512):
            yield "moe_route", cases.moe_route(b, 4, experts, 8, dtype=dtype)
    for dtype in half:
        yield from mixed_cases(b, dtype)
        # Rows enough for tiles of 16 on the largest card, and few.
        for rows, *parts in ((6400,), (24,), (24, "gated")):
            for opens in ((), ("residual", "norm_weight")):
                arguments = cases.linear_small(b, 2, 72, rows, *parts, *opens, dtype=dtype)
                yield "linear_small", arguments
        for form in ({}, {"codes": torch.int8}):
            for rows, *parts in ((12_800,), (32,), (32, "gated")):
                for opens in ((), ("residual", "norm_weight")):
                    sizes = 2, 64, rows, *parts, *opens
                    yield "linear_small", cases.linear_small(b, *sizes, dtype=dtype, form=form)
            for tokens, rows in ((70, 144), (130, 400)):
                yield "linear_packed", cases.linear_packed(b, tokens, 64, rows, dtype=dtype, **form)
        for tokens, experts, k in ((1, 2, 1), (12, 2, 1), (20, 2, 1), (160, 16, 8)):
            arguments = cases.moe_experts(b, tokens, experts, k, 64, 64, dtype=dtype)
            yield "moe_experts", arguments
            yield "moe_experts", in_dtypes(arguments, gate_up=FP32, down=FP32)
        backward = backward_cases.moe_experts_backward(
            b, cases.moe_experts(b, 3, 2, 1, 64, 64, dtype=dtype)
        )
        for wide in ({}, {"gate_up": FP32, "down": FP32}):
            yield "moe_experts_backward", in_dtypes(backward, **wide)
        for form in ({}, {"codes": torch.int8}):
            for sizes in ((1, 2, 1), (12, 2, 1), (20, 2, 1)):
                arguments = cases.moe_experts(b, *sizes, 64, 64, dtype=dtype, form=form)
                yield "moe_experts", arguments
            yield "moe_open", cases.moe_open(b, 2, 64, 16, 8, dtype=dtype, form=form)
            for tokens in (2, 9):
                arguments = cases.moe_experts_small(
                    b, tokens, 4, 2, 64, 64, 64, dtype=dtype, form=form
                )
                yield "moe_experts_small", arguments
        yield "moe_open", cases.moe_open(b, 2, 72, 24, 8, dtype=dtype)
        for tokens in (2, 9):
            sizes = tokens, 8, 2, 64, 16, 72
            yield "moe_experts_small", cases.moe_experts_small(b, *sizes, dtype=dtype)
        for head_dim in HEAD_DIMS[:4]:
            for softcap in (0.0, 30.0):
                for n in (1, 17, 65):
                    arguments = prefill(b, n, 17, 1, head_dim, dtype)
                    yield "attention_prefill", arguments | {"softcap": softcap}
            yield "attention_decode", decode(b, 300, 1, head_dim, dtype)
            if head_dim >= 256:
                yield "attention_decode", cases.in_e4m3(b, decode(b, 70, 1, head_dim, dtype))
                arguments = cases.qkv_attention_decode(b, [70], 70, 2, 1, head_dim, dtype=dtype)
                yield "qkv_attention_decode", cases.in_e4m3(b, arguments)
            for softcap in (0.0, 30.0):
                arguments = cases.qkv_attention_decode(b, [300], 300, 2, 1, head_dim, dtype=dtype)
                yield "qkv_attention_decode", arguments | {"softcap": softcap}
            arguments = prefill(b, 17, 17, 1, head_dim, dtype)
            yield (
                "attention_prefill_backward",
                backward_cases.attention_prefill_backward(b, arguments),
            )


def mixed_cases(b: Backend, dtype: torch.dtype) -> Iterator[Call]:
    """`dtype` beside fp32 weights alone, and beside fp32 residuals and tables too."""

    def mixed(op: str, *sizes: int, also: str | None = None) -> Iterator[Call]:
        arguments = under_autocast(op, getattr(cases, op)(b, *sizes), dtype)
        yield op, arguments
        if also:
            yield op, in_dtypes(arguments, **{also: dtype})

    for width in WIDTHS:
        yield from mixed("rms_norm", T, width)
        yield from mixed("add_rms_norm", T, width, also="residual")
        yield from mixed("moe_norm", T, width, also="scale")
    for width in (512, 5376):
        for op in ("add_rms_norm", "moe_norm"):
            arguments = under_autocast(op, getattr(cases, op)(b, T, width), dtype)
            yield backward_of(b, op, arguments)
    for head_dim in HEAD_DIMS:
        yield from mixed("qkv_norm_rope", T, 2, 1, head_dim)
    for width in PLE_WIDTHS:
        yield from mixed("ple_embed", 4, 4, 1, width, also="table")
        yield from mixed("ple_gate", 4, 2, width, 1)
        arguments = under_autocast("ple_gate", cases.ple_gate(b, 4, 2, width, 1), dtype)
        yield backward_of(b, "ple_gate", arguments)


def backward_of(b: Backend, op: str, forward: Arguments) -> Call:
    return f"{op}_backward", getattr(backward_cases, f"{op}_backward")(b, forward)


def prefill(
    b: Backend, tokens: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype = BF16
) -> Arguments:
    """One sequence, whose query heads share one KV head."""
    return cases.attention_prefill(b, [tokens], [keys], heads, 1, head_dim, dtype=dtype)


def decode(
    b: Backend, keys: int, heads: int, head_dim: int, dtype: torch.dtype = BF16
) -> Arguments:
    arguments = cases.attention_decode(b, [keys], keys, heads, 1, head_dim, dtype=dtype)
    return arguments | {"return_lse": False}


T = 64  # tokens
SLOTS = range(1, 2 * T, 2)
# Of q, k and v apart, for the memory of views would be counted for all three.
HEADS: dict[str, Any] = dict(packed=False)
CASES: dict[str, tuple[str, tuple, dict[str, Any]]] = {  # op, sizes, options
    "rms_norm, E2B": ("rms_norm", (T, 1536), {}),
    "rms_norm, 12B": ("rms_norm", (T, 3840), {}),
    "add_rms_norm, E4B": ("add_rms_norm", (T, 2560), {}),
    "add_rms_norm, 26B": ("add_rms_norm", (T, 2816), {}),
    "moe_norm, 26B": ("moe_norm", (T, 2816), {}),
    "qkv_norm_rope, sliding": ("qkv_norm_rope", (T, 8, 2, 256), HEADS),
    "qkv_norm_rope, full": ("qkv_norm_rope", (T, 8, 2, 512), HEADS),
    "qkv_norm_rope, V from K": ("qkv_norm_rope", (T, 4, 4, 512), HEADS | dict(with_v=False)),
    "qkv_norm_rope_cache": (
        "qkv_norm_rope_cache",
        (SLOTS, [2 * T], 8, 2, 256),
        HEADS,
    ),
    "geglu": ("geglu", (T, 2048), {}),
    "ple_embed": ("ple_embed", (T, T, 5, 256), {}),
    "ple_gate": ("ple_gate", (T, 5, 256, 2), {}),
    # Under autocast: fp32 beside what is in 16 bits, here in fp32 where the dtype is.
    "rms_norm, fp32 weight": ("rms_norm", (T, 2816), {}),
    "add_rms_norm, fp32 residual": ("add_rms_norm", (T, 2560), {}),
    "qkv_norm_rope, fp32 weights": ("qkv_norm_rope", (T, 8, 2, 256), HEADS),
    "ple_embed, fp32 table": ("ple_embed", (T, T, 5, 256), {}),
    "ple_gate, fp32 ple": ("ple_gate", (T, 5, 256, 2), {}),
    "softcap": ("softcap", (T, 4096), {}),
    "softcap_argmax": ("softcap_argmax", (T, 8192), {}),
}


def case_of(b: Backend, label: str, dtype: torch.dtype) -> Call:
    """One of CASES."""
    op, sizes, options = CASES[label]
    mixed = "fp32" in label
    arguments = getattr(cases, op)(b, *sizes, dtype=FP32 if mixed else dtype, **options)
    return op, under_autocast(op, arguments, dtype) if mixed else arguments
