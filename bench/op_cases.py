"""The ops on Gemma 4's shapes: what each is given, and the bytes and FLOP it cannot do without."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import limits
import torch
from torch import Tensor

import gemma4_kernels
from gemma4.config import FULL, SLIDING

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One op on one shape; `make` draws its arguments."""

    op: str
    label: str
    make: Callable[[torch.device], dict[str, Any]]
    bytes: float
    flop: float = 0.0

    @property
    def item(self) -> str:
        return f"{self.op}, {self.label}"


@dataclass(frozen=True)
class Sizes:
    tokens: tuple[int, ...]
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    moe_tokens: tuple[int, ...]
    models: tuple[str, ...]


ALL = Sizes(
    tokens=(1, 64, 512, 8192, 32768),
    prompts=(512, 2048, 8192, 32768),
    batches=(1, 8, 64),
    contexts=(8192, 32768, 131072),
    moe_tokens=(1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096, 8192),
    models=limits.RELEASED,
)
# Both head sizes, dense and with experts, few tokens and many: minutes with all peers.
BRIEF = Sizes(
    tokens=(1, 8192),
    prompts=(2048, 8192),
    batches=(1, 32),
    contexts=(8192, 131072),
    moe_tokens=(1, 16, 128, 4096),
    models=("E4B", "26B-A4B"),
)
CPU = Sizes(
    tokens=(1, 64),
    prompts=(128, 512),
    batches=(1, 4),
    contexts=(512, 2048),
    moe_tokens=(1, 8, 64),
    models=("E2B", limits.FEW_EXPERTS),
)


def randn(device: torch.device, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def row_case(op: str, model: str, tokens: int, make: Callable[[torch.device], dict]) -> Case:
    return Case(op, f"{model}, {tokens} tokens", make, limits.row_bytes(model, op, tokens))


def rms_norm(model: str, n: int) -> Case:
    width = limits.MODELS[model].hidden_size
    return row_case(
        "rms_norm", model, n, lambda d: dict(x=randn(d, n, width), weight=randn(d, width))
    )


def add_rms_norm(model: str, n: int) -> Case:
    width = limits.MODELS[model].hidden_size
    shapes = dict(x=(n, width), residual=(n, width), post_weight=(width,), next_weight=(width,))
    shapes["scale"] = (1,)
    make = lambda d: {name: randn(d, *shape) for name, shape in shapes.items()}  # noqa: E731
    return row_case("add_rms_norm", model, n, make)


def moe_norm(model: str, n: int) -> Case:
    width = limits.MODELS[model].hidden_size
    shapes = dict(x=(n, width), weight=(width,), scale=(width,))
    make = lambda d: {name: randn(d, *shape) for name, shape in shapes.items()}  # noqa: E731
    return row_case("moe_norm", model, n, make)


def qkv_norm_rope(model: str, n: int) -> Case:
    c = limits.MODELS[model]
    heads, kv_heads, size = c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def make(d: torch.device) -> dict:
        q, k, v = randn(d, n, heads + 2 * kv_heads, size).split((heads, kv_heads, kv_heads), 1)
        weights = dict(q_weight=randn(d, size), k_weight=randn(d, size))
        inv_freq = torch.rand(size // 2, device=d)
        return dict(
            q=q, k=k, v=v, **weights, positions=torch.arange(n, device=d), inv_freq=inv_freq
        )

    return row_case("qkv_norm_rope", model, n, make)


def qkv_norm_rope_cache(model: str, n: int) -> Case:
    c, without = limits.MODELS[model], qkv_norm_rope(model, n)

    def make(d: torch.device) -> dict:
        shape = max(n, 1), c.num_key_value_heads, c.head_dim
        caches = {name: randn(d, *shape) for name in ("k_cache", "v_cache")}
        return without.make(d) | caches | dict(slots=torch.arange(n, device=d))

    return row_case("qkv_norm_rope_cache", model, n, make)


def geglu(model: str, n: int) -> Case:
    width = limits.MODELS[model].intermediate_size
    return row_case("geglu", model, n, lambda d: dict(gate_up=randn(d, n, 2 * width)))


def ple_embed(model: str, n: int) -> Case:
    c = limits.MODELS[model]
    width, rows = c.hidden_size_per_layer_input, 8192  # of the table, which is larger than L2
    packed = c.num_hidden_layers * width

    def make(d: torch.device) -> dict:
        table, projected = randn(d, rows, packed), randn(d, n, packed)
        ids = torch.randint(rows, (n,), device=d)
        return dict(ids=ids, table=table, projected=projected, weight=randn(d, width))

    return row_case("ple_embed", model, n, make)


def ple_gate(model: str, n: int) -> Case:
    c = limits.MODELS[model]
    width, layers = c.hidden_size_per_layer_input, c.num_hidden_layers
    make = lambda d: dict(gate=randn(d, n, width), ple=randn(d, n, layers, width), layer=1)  # noqa: E731
    return row_case("ple_gate", model, n, make)


def softcap(model: str, n: int) -> Case:
    return dataclasses.replace(
        softcap_argmax(model, n), op="softcap", bytes=limits.row_bytes(model, "softcap", n)
    )


def softcap_argmax(model: str, n: int) -> Case:
    width = limits.MODELS[model].vocab_size
    return row_case("softcap_argmax", model, n, lambda d: dict(logits=randn(d, n, width), cap=30.0))


def attention_prefill(model: str, kind: str, n: int) -> Case:
    c = limits.MODELS[model]
    heads, kv_heads, size = c.num_attention_heads, c.kv_heads(kind), c.head_size(kind)

    def make(d: torch.device) -> dict:
        q, k, v = (randn(d, n, h, size) for h in (heads, kv_heads, kv_heads))
        cu = torch.tensor([0, n], dtype=torch.int32, device=d)
        lengths = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=n, max_seqlen_k=n)
        return dict(q=q * size**-0.5, k=k, v=v, **lengths, window=c.window(kind)[0])

    counts = limits.attention_bytes(model, kind, n, n), limits.attention_flop(model, kind, n, n)
    return Case("attention_prefill", f"{model} {kind.split('_')[0]}, {n} tokens", make, *counts)


def attention_prefill_backward(model: str, kind: str, n: int) -> Case:
    """Seven matrix products, of which five are useful: two are made twice."""
    forward = attention_prefill(model, kind, n)

    def make(d: torch.device) -> dict:
        inputs = forward.make(d)
        out, lse = gemma4_kernels.attention_prefill(**inputs, return_lse=True)
        grads = dict(grad_out=torch.randn_like(out), grad_lse=torch.zeros_like(lse))
        options = dict(scale=1.0, causal=True, window_right=-1, softcap=0.0)
        return inputs | grads | options | dict(out=out, lse=lse)

    counts = 2 * forward.bytes, 2.5 * forward.flop
    return Case("attention_prefill_backward", forward.label, make, *counts)


def attention_decode(model: str, kind: str, batch: int, keys: int) -> Case:
    """Sliding layers read a ring of their window, full ones rows of the whole context."""
    c = limits.MODELS[model]
    heads, kv_heads, size = c.num_attention_heads, c.kv_heads(kind), c.head_size(kind)
    window = c.window(kind)[0]

    def make(d: torch.device) -> dict:
        k, v = (randn(d, batch, window or keys, kv_heads, size) for _ in "kv")
        lens = torch.full((batch,), keys, dtype=torch.int32, device=d)
        ring = dict(window=window, ring=bool(window), return_lse=False)
        q = randn(d, batch, 1, heads, size) * size**-0.5
        return dict(q=q, k_cache=k, v_cache=v, seq_lens=lens, **ring)

    label = f"{model} {kind.split('_')[0]}, batch {batch}, {keys} keys"
    counts = (
        f(model, kind, 1, keys, batch) for f in (limits.attention_bytes, limits.attention_flop)
    )
    return Case("attention_decode", label, make, *counts)


def moe_route(model: str, n: int) -> Case:
    c = limits.MODELS[model]
    experts, k = c.num_experts, c.top_k_experts
    make = lambda d: dict(  # noqa: E731
        logits=randn(d, n, experts), per_expert_scale=torch.rand(experts, device=d), k=k
    )
    return Case("moe_route", f"{model}, {n} tokens", make, n * (experts * 2 + k * 8))


def moe_experts(model: str, n: int) -> Case:
    """Uniform routing."""
    c = limits.MODELS[model]
    experts, width, hidden = c.num_experts, c.hidden_size, c.moe_intermediate_size

    def make(d: torch.device) -> dict:
        chosen = torch.rand(n, experts, device=d).argsort(-1)[:, : c.top_k_experts].int()
        return dict(
            x=randn(d, n, width),
            gate_up=randn(d, experts, 2 * hidden, width) * width**-0.5,
            down=randn(d, experts, width, hidden) * hidden**-0.5,
            experts=chosen,
            weights=torch.rand(n, c.top_k_experts, device=d),
        )

    counts = limits.moe_bytes(model, n), limits.moe_flop(model, n)
    return Case("moe_experts", f"{model}, {n} tokens", make, *counts)


def cases(sizes: Sizes) -> Iterator[Case]:
    kinds = (SLIDING, FULL)
    for model in sizes.models:
        for n in sizes.prompts:
            yield from (attention_prefill(model, kind, n) for kind in kinds)
            yield from (attention_prefill_backward(model, kind, n) for kind in kinds)
        for batch in sizes.batches:
            yield attention_decode(model, SLIDING, batch, sizes.contexts[0])
            yield from (attention_decode(model, FULL, batch, n) for n in sizes.contexts)
        if limits.MODELS[model].enable_moe_block:
            for n in sizes.moe_tokens:
                yield from (moe_norm(model, n), moe_route(model, n), moe_experts(model, n))
        for n in sizes.tokens:
            for op in (rms_norm, add_rms_norm, qkv_norm_rope, qkv_norm_rope_cache, geglu):
                yield op(model, n)
            if limits.MODELS[model].hidden_size_per_layer_input:
                yield from (ple_embed(model, n), ple_gate(model, n))
            if n <= 64:
                yield from (softcap(model, n), softcap_argmax(model, n))
