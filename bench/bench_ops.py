"""Each op on Gemma 4's shapes, beside its floor and its peers, all in one process.

    python bench/bench_ops.py --out FILE [--only OP ...] [--minutes N] [--cpu]
    python bench/bench_ops.py --out FILE --overhead

Lines of JSON: first what the machine is and what its copies and GEMMs reach, then a line a case.
Inputs rotate beyond L2, calls are captured in a CUDA graph where they can be, times are medians
with p20 and p80. A floor is bytes at the copy's rate or useful FLOP (what a mask hides excluded) at
the GEMM's, whichever is longer. Peers that are not installed or refuse a case say so in their
place. --cpu takes shapes that two cores can do. --overhead times calls without tokens through the
emulated library: the public function, the dispatcher, the checks and the outputs, and no kernel.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import limits
import peers
import torch
from torch import Tensor

import gemma4_kernels
from gemma4 import measure
from gemma4.config import FULL, SLIDING

ROOT = Path(__file__).parents[1]
OPS = torch.ops.gemma4_kernels
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One op on one shape; `make` draws its arguments."""

    op: str
    label: str
    make: Callable[[torch.device], dict[str, Any]]
    bytes: float
    flop: float = 0.0


@dataclass(frozen=True)
class Sizes:
    tokens: tuple[int, ...]
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    moe_tokens: tuple[int, ...]
    models: tuple[str, ...]


GPU = Sizes(
    tokens=(1, 64, 512, 8192, 32768),
    prompts=(512, 2048, 8192, 32768),
    batches=(1, 8, 64),
    contexts=(8192, 32768, 131072),
    moe_tokens=(1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096, 8192),
    models=tuple(limits.MODELS),
)
FEW_EXPERTS = "26B-A4B of 16 experts"
limits.MODELS[FEW_EXPERTS] = dataclasses.replace(limits.MODELS["26B-A4B"], num_experts=16)
CPU = Sizes((1, 64), (128, 512), (1, 4), (512, 2048), (1, 8, 64), ("E2B", FEW_EXPERTS))
MOST_BYTES = 16e9  # of one case's inputs


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


def rotations(case: Case, device: torch.device) -> int:
    """Sets of inputs that are more than twice what L2 holds."""
    cached = 64 << 20
    if device.type == "cuda":
        cached = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return int(min(64, 1 + cached // max(case.bytes, 1)))


def positional(op: str, inputs: dict[str, Any]) -> list[Any]:
    """The arguments of a public function as its op and its eager twin take them."""
    schema = getattr(OPS, op).default._schema
    defaults = dict(eps=1e-6, scale=None if op == "add_rms_norm" else 1.0, causal=True, window=0)
    defaults |= dict(window_right=-1, softcap=0.0, block_table=None, return_lse=False, ring=False)
    return [inputs[a.name] if a.name in inputs else defaults[a.name] for a in schema.arguments]


def timing_row(timing: measure.Timing) -> dict[str, Any]:
    us = {f"{n}us": round(getattr(timing, f) * 1e6, 3)
          for n, f in (("", "median"), ("p20_", "p20"), ("p80_", "p80"))}  # fmt: skip
    return us | {"taken": timing.taken}


def measure_case(case: Case, device: torch.device, copy: float, gemm: float) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()  # past a number of shapes the compiler would quietly run eager torch
    if device.type == "cuda":
        torch.cuda.empty_cache()
    sets = [case.make(device) for _ in range(rotations(case, device))]
    ours = getattr(gemma4_kernels, case.op, None) or getattr(OPS, case.op)
    expected = ours(**sets[0])
    timing = measure.time_calls(lambda i: ours(**sets[i]), device, len(sets))
    floor = max(case.bytes / copy, case.flop / gemm)
    row = {
        "kind": "op",
        "op": case.op,
        "case": case.label,
        **timing_row(timing),
        "floor_us": round(floor * 1e6, 3),
        "gb_s": round(case.bytes / timing.median / 1e9, 1),
        "tflop_s": round(case.flop / timing.median / 1e12, 3),
        "peers": {},
    }
    for name, prepare in peers.of(case.op, device):
        try:
            calls = [prepare(positional(case.op, s), s) for s in sets]
            found = {"difference": peers.difference(expected, calls[0]())}
            found |= timing_row(measure.time_calls(lambda i, c=calls: c[i](), device, len(sets)))
        except Exception as error:  # whatever a peer raises is its answer
            said = str(error).strip().partition("\n")[0]
            found = {"error": f"{type(error).__name__}: {said}"[:200]}
        row["peers"][name] = found
    return row


def run(sizes: Sizes, device: torch.device, only: list[str], minutes: float) -> Iterator[dict]:
    copy, gemm = measure.copy_bandwidth(device), measure.gemm_rate(device)
    rates = {"copy_gb_s": round(copy / 1e9, 1), "gemm_tflop_s": round(gemm / 1e12, 3)}
    facts = measure.machine(device)
    yield {"kind": "machine", **facts, **rates, "build": gemma4_kernels.build_info()}
    end = time.monotonic() + 60 * minutes
    for case in cases(sizes):
        if only and case.op not in only:
            continue
        row = {"kind": "skipped", "op": case.op, "case": case.label}
        if case.bytes > MOST_BYTES:
            row["why"] = f"{case.bytes / 1e9:.0f} GB of inputs"
        elif time.monotonic() > end:
            row["why"] = f"the {minutes:g} minutes are over"
        else:
            try:
                row = measure_case(case, device, copy, gemm)
            except Exception as error:
                row |= {"kind": "failed", "why": f"{type(error).__name__}: {error}"}
        yield row | {"device": facts["device"]}


def overhead() -> Iterator[dict]:
    """Calls without tokens on the emulated library, beside torch.add of two empty tensors."""
    sys.path.append(str(ROOT / "tests"))
    import emulated

    device, ops = torch.device("cpu"), emulated.ops()
    kernels = emulated.kernels()
    kernels.call = super(emulated.EmulatedKernels, kernels).call  # once, and not on each schedule
    direct = kernels.ops
    empty = torch.empty(0, 2560, dtype=DTYPE)
    add = measure.time_calls(lambda i: torch.add(empty, empty), device).median
    yield {"kind": "machine", **measure.machine(device), "add_us": round(add * 1e6, 2)}
    made = [op("E4B", 0) for op in (rms_norm, add_rms_norm, qkv_norm_rope, geglu, ple_gate)]
    made += [attention_prefill("E4B", FULL, 0), attention_decode("E4B", FULL, 0, 512)]
    made += [moe_norm("26B-A4B", 0), moe_route("26B-A4B", 0), moe_experts(FEW_EXPERTS, 0)]
    for case in made:
        inputs = case.make(device)
        args, public = positional(case.op, inputs), getattr(ops, case.op)
        compiled = getattr(direct, case.op)
        by_op = measure.time_calls(lambda i, f=compiled, a=args: f(*a), device).median
        by_name = measure.time_calls(lambda i, f=public, a=inputs: f(**a), device).median
        yield {
            "kind": "overhead",
            "op": case.op,
            "device": "cpu",
            "over_add": round(by_name / add, 1),
            "dispatcher_and_binding_over_add": round(by_op / add, 1),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of JSON lines")
    parser.add_argument("--only", nargs="*", default=[], help="these ops alone")
    parser.add_argument("--minutes", type=float, default=60, help="start no case after these")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    args = parser.parse_args()
    if not (args.cpu or args.overhead or torch.cuda.is_available()):
        parser.error("torch finds no CUDA device; --cpu takes small shapes on the CPU")
    device = torch.device("cpu" if args.cpu or args.overhead else "cuda")
    failed, shown = 0, ("kind", "op", "case", "us", "floor_us", "over_add", "why")
    rows = overhead() if args.overhead else run(
        CPU if args.cpu else GPU, device, args.only, args.minutes
    )  # fmt: skip
    with args.out.open("w", encoding="utf-8") as file, torch.no_grad():
        for row in rows:
            print(json.dumps(row), file=file, flush=True)
            failed += row["kind"] == "failed"
            print(*(row[key] for key in shown if key in row), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
