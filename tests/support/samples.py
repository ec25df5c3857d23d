"""Small arguments of every op, for what holds for all ops alike.

`samples` are several cases of an op, most of them too small for a kernel; `served` is one call that
a kernel takes, with every optional argument given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cases
from .backends import BF16, EAGER, FP32, Backend
from .cases import Arguments, complete, public

Cases = dict[str, Arguments]


@dataclass(frozen=True)
class Leaves(Backend):
    """Draws everything in one dtype, and asks for gradients."""

    drawn: torch.dtype = FP32
    grad: bool = False

    def randn(self, *shape: int, dtype: torch.dtype = FP32, **options: float) -> Tensor:
        return super().randn(*shape, dtype=self.drawn, **options).requires_grad_(self.grad)

    # Views of leaves, as a packed projection gives them.
    def columns(self, rows: int, width: int) -> Tensor:
        return self.randn(rows, 3 * width)[:, width : 2 * width]

    def turned(self, *shape: int) -> Tensor:
        return self.randn(*shape[::-1]).permute(*range(len(shape))[::-1])


def samples(op: str, dtype: torch.dtype = FP32, grad: bool = False) -> Cases:
    """Complete arguments by the name of the case: usual, optional, strided, odd, empty."""
    b = Leaves("eager", "cpu", drawn=dtype, grad=grad)
    made = SAMPLES[op](b) if op in SAMPLES else of_rows(b, op)
    without = grad and op in NOT_DIFFERENTIABLE
    return {
        name: complete(op, detached(arguments) if without else arguments)
        for name, arguments in made.items()
    }


NOT_DIFFERENTIABLE = (
    *("qkv_norm_rope_cache", "attention_decode", "qkv_attention_decode", "softcap_argmax"),
    *("moe_experts_small", "sample"),
)


def detached(arguments: Arguments) -> Arguments:
    return {n: x.detach() if isinstance(x, Tensor) else x for n, x in arguments.items()}


def of_rows(b: Leaves, op: str) -> Cases:
    """Of an op on rows, whose memory may be any for its first arguments."""
    make: Callable[..., Arguments] = getattr(cases, op)
    views = [name for name in ("x", "residual", "gate_up", "logits") if name in make(b, 3, 8)]
    return {
        "usual": make(b, 3, 8),
        "odd": make(b, 2, 3, 7),
        "columns": make(b, 3, 8) | {name: b.columns(3, 8) for name in views},
        "transposed": make(b, 4, 8) | {name: b.turned(4, 8) for name in views},
        "empty": make(b, 0, 8),
    }


def rms_norm(b: Leaves) -> Cases:
    return of_rows(b, "rms_norm") | {"no weight": cases.rms_norm(b, 3, 8, weighted=False)}


def add_rms_norm(b: Leaves) -> Cases:
    neither = cases.add_rms_norm(b, 3, 8, next_weight=False, scale=False)
    return of_rows(b, "add_rms_norm") | {"neither": neither}


POSITIONS = torch.tensor([3, 0, 70])


def qkv_norm_rope(b: Leaves) -> Cases:
    def make(tokens: int = 3, head_dim: int = 8, kv_heads: int | None = 2, **options) -> Arguments:
        options |= dict(positions=POSITIONS[:tokens])
        return cases.qkv_norm_rope(b, tokens, 4, kv_heads, head_dim, **options)

    return {
        "usual": make(packed=False),
        "no v": make(packed=False, with_v=False),
        "no k": make(packed=False, kv_heads=None),
        "odd half": make(packed=False, head_dim=6),
        "packed": make(),
        "empty": make(tokens=0, packed=False),
    }


def qkv_norm_rope_cache(b: Leaves) -> Cases:
    def make(*slots: int, **options) -> Arguments:
        options |= dict(positions=POSITIONS[: len(slots)])
        arguments = cases.qkv_norm_rope_cache(b, slots, (2, 4), 4, 2, 8, dtype=b.drawn, **options)
        with torch.no_grad():
            caches = {name: b.randn(2, 4, 2, 8) for name in ("k_cache", "v_cache")}
        return arguments | caches

    return {
        "usual": make(1, -1, 5, packed=False),
        "no v": make(1, 2, 5, packed=False, with_v=False),
        "packed": make(1, 2, 5),
        "e4m3": cases.in_e4m3(b, make(1, -1, 5)),
        "empty": make(packed=False),
    }


def attention_prefill(b: Leaves) -> Cases:
    def make(queries=(3, 4), keys=(3, 4), return_lse=True, **options) -> Arguments:
        options |= dict(scale=0.5, return_lse=return_lse)
        return cases.attention_prefill(b, queries, keys, 4, 2, 8, **options)

    q, k, v = b.randn(7, 8, 8).split([4, 2, 2], 1)
    outermost = {n: b.randn(h, 7, 8).transpose(0, 1) for n, h in zip("qkv", (4, 2, 2), strict=True)}
    return {
        "usual": make(),
        "no lse": detached(make(return_lse=False)),
        "tail, window, cap": make((2, 3), window=2, softcap=3.0),
        "both sides": make(causal=False, window=3, window_right=1),
        "packed": make(window=2) | dict(q=q, k=k, v=v),
        "heads outermost": make() | outermost,
        "empty sequences": make((2, 0, 3), (0, 2, 2)),
        "no tokens": make((0,), (0,)),
    }


def attention_decode(b: Leaves) -> Cases:
    def make(lengths=(3, 7), new: int = 1, return_lse: bool = True, **options) -> Arguments:
        options |= dict(scale=0.5, return_lse=return_lse)
        return cases.attention_decode(b, lengths, 9, 4, 2, 8, new=new, **options)

    pages = {name: b.randn(5, 4, 2, 8) for name in ("k_cache", "v_cache")}
    pages["block_table"] = torch.tensor([[3, 1, 0], [2, 4, 0]], dtype=torch.int32)
    k_cache, v_cache = b.randn(2, 9, 2, 2, 8).unbind(2)
    strided = dict(q=b.randn(2, 8, 3, 8).transpose(1, 2)[:, :, :4], k_cache=k_cache)
    return {
        "usual": make(),
        "no lse": make(return_lse=False),
        "ring": make((3, 70), 2, window=4, ring=True, softcap=3.0),
        "pages": make((5, 7), 2, window=3) | pages,
        "strided": make((3, 0)) | strided | dict(v_cache=v_cache),
        "e4m3": cases.in_e4m3(b, make((3, 0), 2)),
        "no rows": make(()),
    }


def qkv_attention_decode(b: Leaves) -> Cases:
    def make(lengths=(3, 7), **options) -> Arguments:
        with torch.no_grad():
            made = cases.qkv_attention_decode(b, lengths, 9, 4, 2, 64, **options)
        return {n: x.detach() if "cache" in n else x for n, x in made.items()}

    with torch.no_grad():
        pages = {name: b.randn(5, 4, 2, 64) for name in ("k_cache", "v_cache")}
    pages["block_table"] = torch.tensor([[3, 1, 0], [2, 4, 0]], dtype=torch.int32)
    return {
        "usual": make(),
        "no v": make((1, 9), with_v=False, packed=False),
        "borrowed": make(borrowed=True, softcap=3.0),
        "ring": make((3, 70), window=4, ring=True),
        "pages": make((5, 7), window=3) | pages,
        "left out": make((0, 2)),
        "e4m3": cases.in_e4m3(b, make()),
        "no rows": make((), packed=False),
    }


OPEN = ("residual", "post_weight", "scale", "norm_weight")


def linear_packed(b: Leaves) -> Cases:
    eight = {"codes": torch.int8, "scales": None}
    return {
        "usual": cases.linear_packed(b, 3, 64, 32),
        "eight bits": cases.linear_packed(b, 2, 128, 16, **eight),
        "transposed": cases.linear_packed(b, 3, 64, 16) | {"x": b.turned(3, 64)},
        "empty": cases.linear_packed(b, 0, 64, 16),
    }


def linear_small(b: Leaves) -> Cases:
    turned = {"x": b.turned(3, 8), "weight": b.turned(6, 8), "residual": b.turned(3, 8)}
    return {
        "usual": cases.linear_small(b, 3, 8, 6, *OPEN, "factor"),
        "alone": cases.linear_small(b, 3, 8, 6),
        "gated": cases.linear_small(b, 3, 8, 6, "norm_weight", "gated"),
        "two branches": cases.linear_small(b, 3, 8, 6, *OPEN, "other"),
        "odd": cases.linear_small(b, 2, 7, 5, *OPEN),
        "packed": cases.linear_small(b, 2, 64, 32, "norm_weight", "gated", form={}),
        "transposed": cases.linear_small(b, 3, 8, 6, *OPEN) | turned,
        "empty": cases.linear_small(b, 0, 8, 6, *OPEN),
    }


def moe_route(b: Leaves) -> Cases:
    return {
        "usual": cases.moe_route(b, 3, 6, 2),
        "odd": cases.moe_route(b, 3, 7, 7),
        "transposed": cases.moe_route(b, 4, 6, 2) | {"logits": b.turned(4, 6)},
        "empty": cases.moe_route(b, 0, 6, 2),
    }


def moe_experts(b: Leaves) -> Cases:
    def make(tokens: int = 3) -> Arguments:
        """Of four experts, and one that lives elsewhere."""
        chosen = torch.tensor([[0, 1], [1, 4], [3, 1]])[:tokens]
        return cases.moe_experts(b, tokens, 4, 2, 8, 3, dtype=b.drawn) | {"experts": chosen}

    usual, transposed = make(), make()
    for name, x in transposed.items():
        turned = x.T.contiguous().T if name == "experts" else b.turned(*x.shape)
        transposed[name] = turned
    int32, eight = make(), {"codes": torch.int8}
    return {
        "usual": usual,
        "int32": int32 | {"experts": int32["experts"].int()},
        "packed": cases.moe_experts(b, 2, 3, 2, 64, 64, dtype=b.drawn, form={}, down_form=eight),
        "down packed": cases.moe_experts(b, 2, 3, 2, 64, 64, dtype=b.drawn, down_form=eight),
        "transposed": transposed,
        "empty": make(0),
    }


def moe_open(b: Leaves) -> Cases:
    turned = {"x": b.turned(3, 8), "gate_up": b.turned(6, 8), "router": b.turned(4, 8)}
    return {
        "usual": cases.moe_open(b, 3, 8, 3, 4),
        "odd": cases.moe_open(b, 2, 7, 3, 5),
        "packed": cases.moe_open(b, 2, 64, 16, 5, form={}),
        "transposed": cases.moe_open(b, 3, 8, 3, 4) | turned,
        "empty": cases.moe_open(b, 0, 8, 3, 4),
    }


def moe_experts_small(b: Leaves) -> Cases:
    turned = {"x": b.turned(3, 8), "dense_x": b.turned(3, 5), "dense": b.turned(8, 5)}
    usual = cases.moe_experts_small(b, 3, 4, 2, 8, 3, 5, dtype=b.drawn)
    return {
        "usual": usual,
        "packed": cases.moe_experts_small(b, 2, 3, 2, 64, 64, 64, dtype=b.drawn, form={}),
        "transposed": usual | turned,
        "empty": cases.moe_experts_small(b, 0, 4, 2, 8, 3, 5, dtype=b.drawn),
    }


def ple_embed(b: Leaves) -> Cases:
    def make(*ids: int, width: int = 4) -> Arguments:
        arguments = cases.ple_embed(b, len(ids), 5, 3, width)
        return arguments | {"ids": torch.tensor(ids, dtype=torch.int64)}

    columns = {"table": b.columns(5, 12), "projected": b.columns(3, 12)}
    turned = {"table": b.turned(5, 12), "projected": b.turned(3, 12)}
    return {
        "usual": make(1, 9, 0),
        "odd": make(1, -1, 0, width=3),
        "strided": make(1, 1, 0) | columns,
        "transposed": make(1, 1, 0) | turned,
        "empty": make(),
    }


def softcap_cross_entropy(b: Leaves) -> Cases:
    def make(tokens: int = 3, vocab_size: int = 8, **options) -> Arguments:
        return cases.softcap_cross_entropy(b, tokens, vocab_size, **options)

    return {
        "usual": make(),
        "odd": make(2, 7, cap=0.0, std=3.0),
        "transposed": make(4) | {"logits": b.turned(4, 8)},
        "int32": (usual := make()) | {"targets": usual["targets"].int()},
        "empty": make(0),
    }


def sample(b: Leaves) -> Cases:
    draws = dict(temperature=0.7, top_k=3, top_p=0.9)
    return {
        "usual": cases.sample(b, 3, 8, **draws),
        "best": cases.sample(b, 3, 7, cap=30.0),
        "all": cases.sample(b, 2, 8, temperature=1.0, min_p=0.1),
        "transposed": cases.sample(b, 4, 8, **draws) | {"logits": b.turned(4, 8)},
        "no rows": cases.sample(b, 0, 8),
    }


def ple_gate(b: Leaves) -> Cases:
    turned = {"gate": b.turned(3, 4), "ple": b.turned(3, 5, 4)}
    return {
        "usual": cases.ple_gate(b, 3, 5, 4, 2),
        "odd": cases.ple_gate(b, 3, 1, 7, 0),
        "transposed": cases.ple_gate(b, 3, 5, 4, 4) | turned,
        "empty": cases.ple_gate(b, 0, 5, 4, 2),
    }


SAMPLES: dict[str, Callable[[Leaves], Cases]] = {
    function.__name__: function
    for function in (
        *(rms_norm, add_rms_norm, qkv_norm_rope, qkv_norm_rope_cache, linear_packed, linear_small),
        *(attention_prefill, attention_decode, qkv_attention_decode, moe_route, moe_experts),
        *(moe_open, moe_experts_small, ple_embed, ple_gate, sample, softcap_cross_entropy),
    )
}


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# With scales of both kinds.
PACKED = {"row_scales": True}


def served(op: str) -> Arguments:
    b, score = EAGER, dict(dtype=BF16, scale=0.125, window=4, softcap=30.0, return_lse=True)

    if op.startswith("qkv_norm_rope"):
        rope = dict(dtype=BF16, packed=False, positions=ints(0, 1, 7))
        if op == "qkv_norm_rope":
            return complete(op, cases.qkv_norm_rope(b, 3, 4, 2, 64, **rope))
        arguments = cases.qkv_norm_rope_cache(b, (0, 1, 9), (2, 8), 4, 2, 64, **rope)
        caches = {name: b.randn(2, 8, 2, 64, dtype=BF16) for name in ("k_cache", "v_cache")}
        return complete(op, arguments | caches | {"slots": ints(0, 1, 9)})
    if op == "attention_prefill":
        options = dict(causal=False, window_right=1, block_table=ints([1], [0]))
        arguments = cases.attention_prefill(b, (2, 3), (2, 3), 4, 2, 64, **score, **options)
        pages = {name: b.randn(2, 4, 2, 64, dtype=BF16) for name in ("k", "v")}
        return complete(op, arguments | pages)
    if op == "attention_decode":
        arguments = cases.attention_decode(b, (3, 8), 8, 4, 2, 64, **score)
        return complete(op, arguments | {"block_table": ints([0], [1])})
    if op == "qkv_attention_decode":
        options = dict(dtype=BF16, window=4, softcap=30.0, block_table=ints([0], [1]))
        return complete(op, cases.qkv_attention_decode(b, (3, 8), 8, 4, 2, 64, **options))
    if op == "linear_packed":
        return complete(op, cases.linear_packed(b, 3, 64, 16, **PACKED, dtype=BF16))
    if op == "linear_small":
        parts = *OPEN, "other", "factor"
        return complete(op, cases.linear_small(b, 3, 64, 16, *parts, form=PACKED, dtype=BF16))
    if op == "moe_route":
        return complete(op, cases.moe_route(b, 3, 8, 2, dtype=BF16))
    if op == "moe_experts":
        arguments = cases.moe_experts(b, 3, 4, 2, 64, 64, dtype=BF16, form=PACKED)
        return complete(op, arguments | {"experts": ints([0, 3], [1, 2], [2, 0])})
    if op == "moe_open":
        return complete(op, cases.moe_open(b, 3, 64, 16, 8, dtype=BF16, form=PACKED))
    if op == "moe_experts_small":
        sizes = 3, 4, 2, 64, 64, 128
        return complete(op, cases.moe_experts_small(b, *sizes, dtype=BF16, form=PACKED))
    if op == "ple_embed":
        arguments = cases.ple_embed(b, 3, 5, 2, 16, dtype=BF16)
        return complete(op, arguments | {"ids": ints(0, 4, 1)})
    if op == "sample":
        options = dict(cap=30.0, temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, pad=3)
        return complete(op, cases.sample(b, 3, 64, dtype=BF16, **options))
    if op == "ple_gate":
        return complete(op, cases.ple_gate(b, 3, 2, 16, 1, dtype=BF16))
    return complete(op, getattr(cases, op)(b, 3, 64, dtype=BF16))


def run(backend: Backend, op: str, arguments: Arguments) -> list[Tensor]:
    """What the op returns and writes, from copies of the arguments."""
    copies = {
        n: backend.to(x).clone() if isinstance(x, Tensor) else x for n, x in arguments.items()
    }
    result = getattr(backend.ops, op)(**public(op, copies))
    caches = op in ("qkv_norm_rope_cache", "qkv_attention_decode")
    written = [copies[n] for n in ("k_cache", "v_cache") if caches]
    written += [copies[n] for n in ("ids", "done", "counters") if op == "sample"]
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    return [*results, *written]
