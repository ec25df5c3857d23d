"""How a call of each op is made from a few sizes, for tests and benches alike.

Each function returns the arguments that have no default, by the names of the op's schema, drawn by
a backend. What a test is about (a view, a NaN, another dtype) it puts in their place itself. All ops
stand in this file, a few lines each, since tests look for them by name.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gemma4_kernels
from gemma4_kernels import opset
from gemma4_kernels.ops.linear import parts_of
from gemma4_kernels.ops.logits import sample_counters
from gemma4_kernels.packed import CODES, PackedWeight
from gemma4_kernels.reference.decode import COUNTERS

from . import packed
from .backends import FP32, Backend, in_dtypes

Arguments = dict[str, Any]
# What autocast's linear layers made, beside fp32 weights, residuals and tables.
BRANCHES = {
    "rms_norm": ("x",),
    "add_rms_norm": ("x",),
    "moe_norm": ("x",),
    "qkv_norm_rope": ("q", "k", "v"),
    "qkv_norm_rope_cache": ("q", "k", "v", "k_cache", "v_cache"),
    "qkv_attention_decode": ("q", "k", "v", "k_cache", "v_cache"),
    "moe_route": ("logits",),
    "moe_experts": ("x",),
    "ple_embed": ("projected",),
    "ple_gate": ("gate",),
}


def under_autocast(op: str, arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """With the branches in `dtype`, and the rest as it is."""
    return in_dtypes(arguments, **dict.fromkeys(BRANCHES[op], dtype))


def complete(op: str, arguments: Arguments) -> Arguments:
    """All that the schema names, in its order; what is not given as the public function has it."""
    public = getattr(gemma4_kernels, op, None)  # a backward has none
    parameters = inspect.signature(public).parameters.values() if public else ()
    given = {p.name: p.default for p in parameters} | arguments
    for name in packable(op):
        if f"{name}_scales" not in arguments:
            given |= zip(_parts(name), parts_of(given[name]), strict=True)
    return {name: given[name] for name in opset.OPS[op].names}


def packable(op: str) -> list[str]:
    """The weights of an op that may be packed."""
    return [n for n in opset.OPS[op].names if f"{n}_row_scales" in opset.OPS[op].names]


def _parts(name: str) -> tuple[str, str, str]:
    return name, f"{name}_scales", f"{name}_row_scales"


def public(op: str, arguments: Arguments) -> Arguments:
    """All that the schema names as the public function takes it: a packed weight is one."""
    given = dict(arguments)
    for name in packable(op):
        codes, *scales = (given.pop(part) for part in _parts(name))
        is_packed = getattr(codes, "dtype", None) in CODES or scales != [None, None]
        given[name] = PackedWeight(codes, *scales) if is_packed else codes
    return given


def rms_norm(
    b: Backend, *shape: int, dtype: torch.dtype = FP32, std: float = 2.0, weighted: bool = True
) -> Arguments:
    weight = b.weight(shape[-1], dtype=dtype) if weighted else None
    return {"x": b.randn(*shape, dtype=dtype, std=std), "weight": weight}


def add_rms_norm(
    b: Backend,
    *shape: int,
    dtype: torch.dtype = FP32,
    next_weight: bool = True,
    scale: bool = True,
) -> Arguments:
    return {
        "x": b.randn(*shape, dtype=dtype, std=2.0),
        "residual": b.randn(*shape, dtype=dtype, std=3.0),
        "post_weight": b.weight(shape[-1], dtype=dtype),
        "next_weight": b.weight(shape[-1], dtype=dtype) if next_weight else None,
        # Layer scalars of the released models lie between 0.005 and 0.92.
        "scale": b.randn(1, dtype=dtype, mean=0.3, std=0.1) if scale else None,
    }


def moe_norm(b: Backend, *shape: int, dtype: torch.dtype = FP32) -> Arguments:
    scale = b.weight(shape[-1], dtype=dtype)
    return rms_norm(b, *shape, dtype=dtype) | {"scale": scale}


def frequencies(head_dim: int, live: int | None = None, theta: float = 10_000.0) -> Tensor:
    """Pairs past the live ones stand still, as on the full-attention layers."""
    live = head_dim // 2 if live is None else live
    inv_freq = torch.zeros(head_dim // 2, dtype=torch.float64)
    inv_freq[:live] = theta ** (-2 * torch.arange(live) / head_dim)
    return inv_freq.float()


def qkv_norm_rope(
    b: Backend,
    tokens: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    *,
    dtype: torch.dtype = FP32,
    with_v: bool = True,
    packed: bool = True,
    live: int | None = None,
    positions: Tensor | None = None,
) -> Arguments:
    """Of one projection's output, unless they are not packed; no KV heads: they are borrowed."""
    sizes = [heads, kv_heads or 0, kv_heads or 0]
    if packed:
        q, k, v = b.randn(tokens, sum(sizes), head_dim, dtype=dtype, std=2.0).split(sizes, 1)
    else:
        q, k, v = (b.randn(tokens, n, head_dim, dtype=dtype, std=2.0) for n in sizes)
    has_k = kv_heads is not None
    return {
        "q": q,
        "k": k if has_k else None,
        "v": v if has_k and with_v else None,
        "q_weight": b.weight(head_dim, dtype=dtype),
        "k_weight": b.weight(head_dim, dtype=dtype) if has_k else None,
        "positions": b.to(torch.arange(tokens) if positions is None else positions),
        "inv_freq": b.to(frequencies(head_dim, live)),
    }


def qkv_norm_rope_cache(
    b: Backend,
    slots: Sequence[int],
    cache: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = FP32,
    **options: Any,
) -> Arguments:
    """Into a cache of these leading dimensions, which holds NaN."""
    tokens = len(slots)
    arguments = qkv_norm_rope(b, tokens, heads, kv_heads, head_dim, dtype=dtype, **options)
    for name in ("k_cache", "v_cache"):
        arguments[name] = b.nan(*cache, kv_heads, head_dim, dtype=dtype)
    return arguments | {"slots": b.to(torch.tensor(slots, dtype=torch.int64))}


def geglu(b: Backend, *shape: int, dtype: torch.dtype = FP32) -> Arguments:
    """Of a width of the product, which is half of what goes in."""
    return {"gate_up": b.randn(*shape[:-1], 2 * shape[-1], dtype=dtype, std=2.0)}


def linear_packed(
    b: Backend, tokens: int, width: int, rows: int, *, dtype: torch.dtype = FP32, **form: Any
) -> Arguments:
    weight = packed.weight(rows, width, **form).to(b.device)
    return {"x": b.randn(tokens, width, dtype=dtype, std=2.0), "weight": weight}


def linear_small(
    b: Backend,
    tokens: int,
    width: int,
    rows: int,
    *parts: str,
    dtype: torch.dtype = FP32,
    form: dict[str, Any] | None = None,
) -> Arguments:
    """To so many rows of y, with the arguments that `parts` names; "gated" is one, and a residual
    brings its post_weight, another branch both weights. `form` is a packed weight's."""
    gated = "gated" in parts
    given = {"x", "weight", *parts} | ({"post_weight"} if "residual" in parts else set())
    given |= {"x_weight", "other_weight"} if "other" in parts else set()
    made = {
        "x": b.randn(tokens, width, dtype=dtype, std=2.0),
        "weight": b.randn(rows * (1 + gated), width, dtype=dtype, std=max(width, 1) ** -0.5),
        "residual": b.randn(tokens, width, dtype=dtype, std=3.0),
        "post_weight": b.weight(width, dtype=dtype),
        "scale": b.randn(1, dtype=dtype, mean=0.3, std=0.1),
        "norm_weight": b.weight(width, dtype=dtype),
        "factor": b.randn(tokens, rows, dtype=dtype),
        "x_weight": b.weight(width, dtype=dtype),
        "other": b.randn(tokens, width, dtype=dtype),
        "other_weight": b.weight(width, dtype=dtype),
    }
    if form is not None:
        made["weight"] = packed.weight(rows * (1 + gated), width, **form).to(b.device)
    return {n: x for n, x in made.items() if n in given} | {"gated": gated}


def attention_prefill(
    b: Backend,
    queries: Sequence[int],
    keys: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = FP32,
    **options: Any,
) -> Arguments:
    """Sequences of so many queries and keys; scores of about 1."""
    std = head_dim**-0.25
    cu_q, cu_k = (b.int32(*torch.tensor([0, *n]).cumsum(0).tolist()) for n in (queries, keys))
    return {
        "q": b.randn(sum(queries), heads, head_dim, dtype=dtype, std=std),
        "k": b.randn(sum(keys), kv_heads, head_dim, dtype=dtype, std=std),
        "v": b.randn(sum(keys), kv_heads, head_dim, dtype=dtype),
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(keys),
    } | options


def attention_decode(
    b: Backend,
    seq_lens: Sequence[int],
    slots: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    new: int = 1,
    dtype: torch.dtype = FP32,
    **options: Any,
) -> Arguments:
    """So many new tokens of each row of a cache; scores of about 1."""
    batch, std = len(seq_lens), head_dim**-0.25
    return {
        "q": b.randn(batch, new, heads, head_dim, dtype=dtype, std=std),
        "k_cache": b.randn(batch, slots, kv_heads, head_dim, dtype=dtype, std=std),
        "v_cache": b.randn(batch, slots, kv_heads, head_dim, dtype=dtype),
        "seq_lens": b.int32(*seq_lens),
    } | options


def qkv_attention_decode(
    b: Backend,
    seq_lens: Sequence[int],
    slots: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    borrowed: bool = False,
    with_v: bool = True,
    packed: bool = True,
    dtype: torch.dtype = FP32,
    **options: Any,
) -> Arguments:
    """One new token of each row of a cache, which is full of keys; borrowed: it holds the new one.

    Normed q and k make scores of about 10, of which the scale leaves 1.
    """
    positions = torch.tensor(seq_lens, dtype=torch.int64) - 1
    sizes = len(seq_lens), heads, None if borrowed else kv_heads, head_dim
    kinds = dict(with_v=with_v, packed=packed, positions=positions)
    rope = qkv_norm_rope(b, *sizes, dtype=dtype, **kinds)
    cache = attention_decode(b, seq_lens, slots, heads, kv_heads, head_dim, dtype=dtype)
    del cache["q"]
    counters = b.to(torch.zeros(len(seq_lens), kv_heads, COUNTERS, dtype=torch.int32))
    scale = dict(scale=head_dim**-0.5, counters=counters)
    return rope | cache | scale | options


def in_e4m3(b: Backend, arguments: Arguments) -> Arguments:
    """With the caches as codes, and scales of unlike keys beside them."""
    made = dict(arguments)
    for name in "kv":
        cache = arguments[f"{name}_cache"]
        made[f"{name}_cache"] = (cache.float() * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales = torch.rand(cache.shape[:-1]) * 0.5 + 0.75
        made[f"{name}_scales"] = b.to(scales / 64)
    return made


def moe_route(
    b: Backend, tokens: int, experts: int, k: int, *, dtype: torch.dtype = FP32
) -> Arguments:
    logits, scale = b.randn(tokens, experts, dtype=dtype), b.weight(experts, dtype=dtype)
    return {"logits": logits, "per_expert_scale": scale, "k": k}


# What packed.weight is told of a packed weight; None: dense.
Form = dict[str, Any] | None


def _weight(
    b: Backend, *shape: int, form: Form, dtype: torch.dtype, std: float | None = None
) -> Tensor | PackedWeight:
    """Of the deviation D^-½ unless given."""
    std = max(shape[-1], 1) ** -0.5 if std is None else std
    if form is None:
        return b.randn(*shape, dtype=dtype, std=std)
    return packed.weight(*shape, std=std, **form).to(b.device)


def moe_experts(
    b: Backend,
    tokens: int,
    experts: int,
    k: int,
    width: int,
    hidden: int,
    *,
    dtype: torch.dtype = FP32,
    form: Form = None,
    down_form: Form = None,
) -> Arguments:
    """Random experts of each token; the routing weights are no narrower than fp32. gate_up, and
    down unless it has its own, are packed in a form."""
    chosen = torch.rand(tokens, experts).argsort(-1)[:, :k].int()
    shape, std = (experts, 2 * hidden, width), 1.5 * width**-0.5
    gate_up = _weight(b, *shape, form=form, dtype=dtype, std=std)
    wide = torch.promote_types(dtype, FP32)
    return {
        "x": b.randn(tokens, width, dtype=dtype),
        "gate_up": gate_up,
        "down": _weight(b, experts, width, hidden, form=down_form or form, dtype=dtype),
        "experts": b.to(chosen),
        "weights": b.randn(tokens, k, dtype=wide, mean=0.7, std=0.2),
    }


def moe_open(
    b: Backend,
    tokens: int,
    width: int,
    rows: int,
    experts: int,
    *,
    dtype: torch.dtype = FP32,
    form: Form = None,
) -> Arguments:
    """To so many rows of hidden, whose weight may be packed."""
    return {
        "x": b.randn(tokens, width, dtype=dtype, std=2.0),
        "residual": b.randn(tokens, width, dtype=dtype, std=3.0),
        **{name: b.weight(width, dtype=dtype) for name in ("post_weight", "norm_weight")},
        "gate_up": _weight(b, 2 * rows, width, form=form, dtype=dtype),
        **{name: b.weight(width, dtype=dtype) for name in ("expert_weight", "router_scale")},
        "router": b.randn(experts, width, dtype=dtype),
    }


def moe_experts_small(
    b: Backend,
    tokens: int,
    experts: int,
    k: int,
    width: int,
    hidden: int,
    dense: int,
    *,
    dtype: torch.dtype = FP32,
    form: Form = None,
) -> Arguments:
    """The dense branch of this width; all weights are packed or none."""
    arguments = moe_experts(b, tokens, experts, k, width, hidden, dtype=dtype, form=form)
    return {name: arguments[name] for name in ("x", "gate_up", "down")} | {
        **moe_route(b, tokens, experts, k, dtype=dtype),
        "dense_x": b.randn(tokens, dense, dtype=dtype),
        "dense": _weight(b, width, dense, form=form, dtype=dtype),
    }


def ple_embed(
    b: Backend, tokens: int, rows: int, layers: int, width: int, *, dtype: torch.dtype = FP32
) -> Arguments:
    """No row of the table twice, where it has enough of them."""
    ids = torch.randperm(max(tokens, rows))[:tokens] % rows
    return {
        "ids": b.to(ids),
        "table": b.randn(rows, layers * width, dtype=dtype),
        "projected": b.randn(tokens, layers * width, dtype=dtype, std=3.0),
        "weight": b.weight(width, dtype=dtype),
    }


def ple_gate(
    b: Backend, tokens: int, layers: int, width: int, layer: int, *, dtype: torch.dtype = FP32
) -> Arguments:
    gate = b.randn(tokens, width, dtype=dtype, std=2.0)
    return {"gate": gate, "ple": b.randn(tokens, layers, width, dtype=dtype), "layer": layer}


def softcap(
    b: Backend, *shape: int, dtype: torch.dtype = FP32, std: float = 20.0, cap: float = 30.0
) -> Arguments:
    return {"logits": b.randn(*shape, dtype=dtype, std=std), "cap": cap}


softcap_argmax = softcap


def softcap_cross_entropy(
    b: Backend,
    tokens: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = FP32,
    std: float = 20.0,
    cap: float = 30.0,
) -> Arguments:
    """Of random targets, some of them ignored."""
    targets = torch.randint(vocab_size, (tokens,))
    targets[1::4] = -100
    logits = b.randn(tokens, vocab_size, dtype=dtype, std=std)
    return {"logits": logits, "targets": b.to(targets), "cap": cap}


def sample(
    b: Backend,
    rows: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = FP32,
    std: float = 3.0,
    **options: Any,
) -> Arguments:
    """Rows of seeds and positions far apart, none of which has ended or can."""
    logits = b.randn(rows, vocab_size, dtype=dtype, std=std)
    seeds = torch.tensor([-1, 0, 1 << 40, 7]).repeat(-(-rows // 4))[:rows]
    return {
        "logits": logits,
        "seeds": b.to(seeds),
        "positions": b.to(torch.arange(rows) * 1000),
        "ids": b.to(torch.full((rows,), -7)),
        "done": b.to(torch.zeros(rows, dtype=torch.int64)),
        "counters": sample_counters(logits),
        "eos": b.to(torch.tensor([vocab_size, vocab_size + 1])),
    } | options
