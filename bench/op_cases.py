"""The ops on Gemma 4's shapes: what each is given, and the bytes and FLOP it cannot do without."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import limits
import paths  # noqa: F401
import torch
from support import backward_cases, cases
from support.backends import EAGER, Backend
from support.cases import Arguments
from torch import Tensor

from gemma4.config import FULL, SLIDING
from gemma4.presets import RELEASED

DTYPE = torch.bfloat16
Make = Callable[[torch.device], Arguments]


@dataclass(frozen=True)
class Case:
    """One op on one shape; `make` draws its arguments."""

    op: str
    label: str
    make: Make
    bytes: float
    flop: float = 0.0
    codes: bool = False  # which no other library takes as they are here

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
    models=tuple(RELEASED),
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


@dataclass(frozen=True)
class OnDevice(Backend):
    """Draws there: tensors of gigabytes."""

    def randn(
        self, *shape: int, dtype: torch.dtype = DTYPE, mean: float = 0.0, std: float = 1.0
    ) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype).mul_(std).add_(mean)


def maker(op: str, *sizes: Any, **options: Any) -> Make:
    make = getattr(cases, op)
    return lambda device: make(OnDevice("bench", device), *sizes, dtype=DTYPE, **options)


def row(op: str, model: str, n: int) -> Case:
    """An op on rows, of n tokens."""
    c = limits.MODELS[model]
    heads = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    ple = c.num_hidden_layers, c.hidden_size_per_layer_input
    sizes: dict[str, tuple] = {
        "qkv_norm_rope": (n, *heads),
        "qkv_norm_rope_cache": (range(n), [max(n, 1)], *heads),
        "geglu": (n, c.intermediate_size),
        "ple_embed": (n, 8192, *ple),  # a table larger than L2
        "ple_gate": (n, *ple, 1),
        "softcap": (n, c.vocab_size),
        "softcap_argmax": (n, c.vocab_size),
        "softcap_cross_entropy": (n, c.vocab_size),
        "sample": (n, c.vocab_size),
    }
    options = dict(cap=30.0, temperature=1.0, top_k=64, top_p=0.95) if op == "sample" else {}
    make = maker(op, *sizes.get(op, (n, c.hidden_size)), **options)
    return Case(op, f"{model}, {n} tokens", make, limits.row_bytes(model, op, n))


def row_backward(op: str, model: str, n: int) -> Case:
    """Of such an op, with all gradients wanted."""
    forward, name = row(op, model, n), f"{op}_backward"

    def make(device: torch.device) -> Arguments:
        return getattr(cases, name)(EAGER, forward.make(device))

    return Case(name, forward.label, make, limits.row_bytes(model, name, n))


def attention_prefill(model: str, kind: str, n: int) -> Case:
    c = limits.MODELS[model]
    heads, kv_heads, size = c.num_attention_heads, c.kv_heads(kind), c.head_size(kind)
    window = c.window(kind)[0]
    make = maker("attention_prefill", [n], [n], heads, kv_heads, size, window=window)
    counts = limits.attention_bytes(model, kind, n, n), limits.attention_flop(model, kind, n, n)
    return Case("attention_prefill", f"{model} {kind.split('_')[0]}, {n} tokens", make, *counts)


def attention_prefill_backward(model: str, kind: str, n: int) -> Case:
    """Seven matrix products, of which five are useful: two are made twice."""
    forward = attention_prefill(model, kind, n)

    def make(device: torch.device) -> Arguments:
        inputs = backward_cases.attention_prefill_backward(EAGER, forward.make(device))
        return inputs | {"grad_lse": torch.zeros_like(inputs["lse"])}  # as peers have it

    counts = (
        f(model, kind, n) for f in (limits.attention_backward_bytes, limits.attention_backward_flop)
    )
    return Case("attention_prefill_backward", forward.label, make, *counts)


def attention_decode(model: str, kind: str, batch: int, keys: int) -> Case:
    """Sliding layers read a ring of their window, full ones rows of the whole context."""
    c = limits.MODELS[model]
    heads, kv_heads, size = c.num_attention_heads, c.kv_heads(kind), c.head_size(kind)
    window = c.window(kind)[0]

    sizes = [keys] * batch, window or keys, heads, kv_heads, size
    options = dict(window=window, ring=bool(window), return_lse=False)
    make = maker("attention_decode", *sizes, **options)
    label = f"{model} {kind.split('_')[0]}, batch {batch}, {keys} keys"
    counts = (
        f(model, kind, 1, keys, batch) for f in (limits.attention_bytes, limits.attention_flop)
    )
    return Case("attention_decode", label, make, *counts)


def coded_attention_decode(model: str, kind: str, batch: int, keys: int) -> Case:
    """The same over keys in e4m3."""
    plain = attention_decode(model, kind, batch, keys)

    def make(device: torch.device) -> Arguments:
        return cases.in_e4m3(OnDevice("bench", device), plain.make(device))

    dram = limits.attention_bytes(model, kind, 1, keys, batch, coded=True)
    return Case("attention_decode", f"{plain.label} in e4m3", make, dram, plain.flop, codes=True)


def qkv_attention_decode(model: str, kind: str, batch: int, keys: int) -> Case:
    """As `attention_decode`, of a layer that has keys of its own."""
    c, decode = limits.MODELS[model], attention_decode(model, kind, batch, keys)
    heads, kv_heads, size = c.num_attention_heads, c.kv_heads(kind), c.head_size(kind)
    window = c.window(kind)[0]
    sizes = [keys] * batch, window or keys, heads, kv_heads, size
    make = maker("qkv_attention_decode", *sizes, window=window, ring=bool(window))
    return Case("qkv_attention_decode", decode.label, make, decode.bytes, decode.flop)


def linear_small(model: str, part: str, n: int) -> Case:
    """With what stands before and behind that product in a layer."""
    rows, width = limits.linear_shapes(model)[part]
    beside = {
        "q, k, v": ("residual", "norm_weight", "scale"),
        "gate and up": ("residual", "norm_weight", "gated"),
        "PLE gate": ("residual", "factor"),
    }.get(part, ())
    make = maker("linear_small", n, width, rows // 2 if "gated" in beside else rows, *beside)
    counts = limits.linear_bytes(model, part, n), 2 * n * rows * width
    return Case("linear_small", f"{model} {part}, {n} tokens", make, *counts)


def linear_packed(model: str, part: str, n: int) -> Case:
    """Four bits, a scale of 16 for 32 columns."""
    rows, width = limits.linear_shapes(model)[part]
    counts = limits.packed_bytes(model, part, n), 2 * n * rows * width
    make = maker("linear_packed", n, width, rows)
    return Case("linear_packed", f"{model} {part}, {n} tokens", make, *counts)


def moe_route(model: str, n: int) -> Case:
    c = limits.MODELS[model]
    experts, k = c.num_experts, c.top_k_experts
    make = maker("moe_route", n, experts, k)
    return Case("moe_route", f"{model}, {n} tokens", make, n * (experts * 2 + k * 8))


def moe_experts(model: str, n: int) -> Case:
    """Uniform routing."""
    c = limits.MODELS[model]
    sizes = n, c.num_experts, c.top_k_experts, c.hidden_size, c.moe_intermediate_size
    make = maker("moe_experts", *sizes)
    counts = limits.moe_bytes(model, n), limits.moe_flop(model, n)
    return Case("moe_experts", f"{model}, {n} tokens", make, *counts)


def packed_moe_experts(model: str, n: int) -> Case:
    """Four bits, a scale of 16 for 32 columns."""
    c = limits.MODELS[model]
    sizes = n, c.num_experts, c.top_k_experts, c.hidden_size, c.moe_intermediate_size
    make = maker("moe_experts", *sizes, form={})
    counts = limits.moe_bytes(model, n, packed=True), limits.moe_flop(model, n)
    return Case("moe_experts", f"{model} in 4 bits, {n} tokens", make, *counts, codes=True)


def moe_experts_backward(model: str, n: int) -> Case:
    """All gradients: of eight matrix products six are useful, and two make gate and up again."""
    forward = moe_experts(model, n)

    def make(device: torch.device) -> Arguments:
        return backward_cases.moe_experts_backward(EAGER, forward.make(device))

    counts = limits.moe_backward_bytes(model, n), 2 * forward.flop
    return Case("moe_experts_backward", forward.label, make, *counts)


def moe_open(model: str, n: int) -> Case:
    c = limits.MODELS[model]
    rows, experts, width = c.intermediate_size, c.num_experts, c.hidden_size
    make = maker("moe_open", n, width, rows, experts)
    flop = 2 * n * width * (2 * rows + experts)
    return Case("moe_open", f"{model}, {n} tokens", make, limits.moe_open_bytes(model, n), flop)


def moe_experts_small(model: str, n: int) -> Case:
    """Uniform routing."""
    c = limits.MODELS[model]
    sizes = n, c.num_experts, c.top_k_experts, c.hidden_size, c.moe_intermediate_size
    make = maker("moe_experts_small", *sizes, c.intermediate_size)
    dense = limits.linear_bytes(model, "down", n), 2 * n * c.hidden_size * c.intermediate_size
    counts = limits.moe_bytes(model, n) + dense[0], limits.moe_flop(model, n) + dense[1]
    return Case("moe_experts_small", f"{model}, {n} tokens", make, *counts)


def all_cases(sizes: Sizes) -> Iterator[Case]:
    kinds = (SLIDING, FULL)
    for model in sizes.models:
        for n in sizes.prompts:
            yield from (attention_prefill(model, kind, n) for kind in kinds)
            yield from (attention_prefill_backward(model, kind, n) for kind in kinds)
        for batch in sizes.batches:
            yield attention_decode(model, SLIDING, batch, sizes.contexts[0])
            yield qkv_attention_decode(model, SLIDING, batch, sizes.contexts[0])
            yield coded_attention_decode(model, FULL, batch, sizes.contexts[0])
            for n in sizes.contexts:
                yield attention_decode(model, FULL, batch, n)
                yield qkv_attention_decode(model, FULL, batch, n)
        for part in limits.linear_shapes(model):
            yield from (linear_small(model, part, n) for n in (1, 4))
            yield from (linear_packed(model, part, n) for n in sizes.tokens[:2])
        if limits.MODELS[model].enable_moe_block:
            for n in sizes.moe_tokens:
                yield from (row("moe_norm", model, n), row_backward("moe_norm", model, n))
                yield from (moe_route(model, n), moe_experts(model, n))
                if n >= 64:
                    yield moe_experts_backward(model, n)
                if n <= 8:
                    yield from (moe_open(model, n), moe_experts_small(model, n))
                if n in (1, 64):
                    yield packed_moe_experts(model, n)
        for n in sizes.tokens:
            ops = ["rms_norm", "add_rms_norm", "qkv_norm_rope", "qkv_norm_rope_cache", "geglu"]
            ops += ["ple_embed", "ple_gate"] * bool(
                limits.MODELS[model].hidden_size_per_layer_input
            )
            ops += ["softcap", "softcap_argmax", "sample"] * (n <= 64)
            yield from (row(op, model, n) for op in ops)
            gated = [op for op in ops if op in ("geglu", "ple_gate")]
            yield from (row_backward(op, model, n) for op in ops[:3] + gated)
        chunk = min(sizes.tokens[-1], 2048)  # of a loss
        yield row("softcap_cross_entropy", model, chunk)
        yield row_backward("softcap_cross_entropy", model, chunk)
