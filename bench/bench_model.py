"""Prefill and decode of the whole model beside transformers, same random weights, one process.

    python bench/bench_model.py --out FILE [--only NAME ...] [--device D] [--repeat N]

Lines of JSON; a model that stands in FILE already is not measured again. Small models on the CPU,
on a GPU released sizes of which two fit. Each decodes as its `generate` does: ours with its
`Decoder`, whose first step captures it and is not timed. Runs alternate, so that a noisy machine
disturbs both alike, and the numbers are medians. The ratio is transformers' time over ours: above 1
is faster. Before any timing the two models' logits are compared. "enabled" is transformers' own
model after `gemma4_kernels.integrations.transformers.enable`, "compiled" ours with
`Decoder(compile=True)`, which is for a CPU; both are set beside sdpa. Then tokens a second beside
the floor, a token's bytes over what copies move here, and on a GPU a token's launches.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import transformers
from ledger import Ledger
from torch import Tensor

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig
from gemma4.decode import Decoder
from gemma4.measure import copy_bandwidth, decode_bytes, key_bytes, launches_per_token, machine
from gemma4_kernels.integrations.transformers import enable

PREFILL_TOKENS, DECODE_TOKENS = 512, 64

SMALL = dict(
    vocab_size=8192,
    vocab_size_per_layer_input=8192,
    hidden_size=256,
    num_hidden_layers=8,
    layer_types=["sliding_attention"] * 3
    + ["full_attention"]
    + ["sliding_attention"] * 3
    + ["full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    global_head_dim=128,
    sliding_window=128,
    intermediate_size=1024,
    hidden_size_per_layer_input=0,
    final_logit_softcapping=30.0,
    max_position_embeddings=4096,
)
LARGE = dict(
    SMALL,
    vocab_size=32768,
    vocab_size_per_layer_input=32768,
    hidden_size=1024,
    num_hidden_layers=12,
    layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2,
    num_attention_heads=8,
    head_dim=128,
    global_head_dim=256,
    sliding_window=256,
    intermediate_size=4096,
)
MOE = dict(enable_moe_block=True, attention_k_eq_v=True, num_global_key_value_heads=1)


def options(config: Gemma4TextConfig) -> dict[str, object]:
    names = ("architectures", "model_type")
    return {name: x for name, x in config.to_dict().items() if name not in names and x is not None}


CONFIGS = {
    "a-E4B-like": dict(SMALL, hidden_size_per_layer_input=32, num_kv_shared_layers=4),
    "a-26B-like": dict(
        SMALL,
        **MOE,
        intermediate_size=512,
        num_experts=32,
        top_k_experts=4,
        moe_intermediate_size=64,
    ),
    "b-E4B-like": dict(LARGE, hidden_size_per_layer_input=64, num_kv_shared_layers=6),
    "b-26B-like": dict(
        LARGE,
        **MOE,
        intermediate_size=1024,
        num_experts=64,
        top_k_experts=8,
        moe_intermediate_size=256,
    ),
}
RELEASED = ("E2B", "E4B")
CONFIGS |= {name: options(Gemma4TextConfig.preset(name)) for name in RELEASED}


def build(
    config: dict[str, object],
    dtype: torch.dtype,
    device: torch.device,
    ways: tuple[str, ...] = ("eager", "sdpa", "enabled"),
) -> dict[str, torch.nn.Module]:
    """Ours, and transformers' with eager and sdpa attention and enabled, over the same weights."""
    torch.manual_seed(0)
    with device:
        model = Gemma4ForCausalLM(Gemma4TextConfig(**config))
    models = {"gemma4": model.to(dtype).eval()}
    for way in ways:
        theirs = transformers.Gemma4TextConfig(**config)
        theirs._attn_implementation = "eager" if way == "eager" else "sdpa"
        with device:
            model = transformers.Gemma4ForCausalLM(theirs)
        ours = models["gemma4"]
        state = {"lm_head.weight": ours.lm_head.weight, **ours.state_dict()}  # a tied one twice
        model.to(dtype).eval().load_state_dict(state, assign=True)
        models[way] = enable(model) if way == "enabled" else model
    return models


def prefill(model: torch.nn.Module, ids: Tensor) -> object:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def run(model: torch.nn.Module, ids: Tensor, compile: bool = False) -> tuple[float, float]:
    """Seconds of one prefill, and of the decode steps after it."""
    start = now(ids.device)
    output = prefill(model, ids)
    middle = now(ids.device)
    logits = output.logits[:, -1]
    cache = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
    if isinstance(model, Gemma4ForCausalLM):
        decoder = Decoder(model, output.cache, DECODE_TOKENS + 1, compile=compile)
    for i in range(DECODE_TOKENS + 1):
        if i == 1:
            second = now(ids.device)
        if isinstance(model, Gemma4ForCausalLM):
            logits = decoder(logits.argmax(-1))
        else:
            token = logits.argmax(-1, keepdim=True)
            given = {cache: output[cache], "use_cache": True, "logits_to_keep": 1}
            output = model(input_ids=token, **given)
            logits = output.logits[:, -1]
    return middle - start, now(ids.device) - second


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(models: dict[str, torch.nn.Module], ids: Tensor, repeat: int) -> dict[str, tuple]:
    ways = {name: (model, ids) for name, model in models.items()}
    if ids.device.type == "cpu":
        ways["compiled"] = models["gemma4"], ids, True
    for way in ways.values():
        run(*way)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeat):
        for name, way in ways.items():
            times[name].append(run(*way))
    return {
        name: tuple(statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        for name, pairs in times.items()
    }


def compare(models: dict[str, torch.nn.Module], ids: Tensor) -> float:
    """Largest difference of the last logits to transformers' eager ones."""
    logits = [prefill(models[name], ids).logits[:, -1].float() for name in ("gemma4", "eager")]
    return float((logits[0] - logits[1]).abs().max())


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of JSON lines")
    parser.add_argument("--only", nargs="*", choices=CONFIGS, help="default: those for the device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=5)
    return parser


def main() -> None:
    args = arguments().parse_args()
    device, ledger = torch.device(args.device), Ledger(args.out)
    small = [name for name in CONFIGS if name not in RELEASED]
    print(f"{'model':<12} {'dtype':<9} {'prefill ms':>10} {'decode ms':>10}"
          f" {'vs eager':>14} {'vs sdpa':>14} {'enabled':>14} {'compiled':>9} {'tok/s':>8}"
          f" {'floor':>8} {'launches':>8}   (prefill, decode)")  # fmt: skip
    for name in args.only or (RELEASED if device.type == "cuda" else small):
        for dtype in (torch.bfloat16,) if name in RELEASED else (torch.float32, torch.bfloat16):
            item = f"{name} {str(dtype).removeprefix('torch.')}"
            if item in ledger.done():
                continue
            ledger.start(item)
            models = build(CONFIGS[name], dtype, device)
            ids = torch.randint(3, CONFIGS[name]["vocab_size"], (1, PREFILL_TOKENS)).to(device)
            with torch.no_grad():
                difference = compare(models, ids)
                times = measure(models, ids, args.repeat)
            found = row(name, dtype, difference, times)
            found |= of_a_token(models["gemma4"], found) | machine(device)
            ledger.end(item, "passed", **found)
            print(line(found), flush=True)


def row(name: str, dtype: torch.dtype, difference: float, times: dict[str, tuple]) -> dict:
    ours = times["gemma4"]

    def ratio(other: str, mine: str = "gemma4") -> list[float]:
        return [round(a / b, 2) for a, b in zip(times[other], times[mine], strict=True)]

    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "prefill_ms": round(ours[0] * 1e3, 1),
        "decode_ms_per_token": round(ours[1] * 1e3 / DECODE_TOKENS, 2),
        "vs_eager": ratio("eager"),
        "vs_sdpa": ratio("sdpa"),
        "enabled_vs_sdpa": ratio("sdpa", "enabled"),
        "compiled_vs_sdpa": ratio("sdpa", "compiled")[1] if "compiled" in times else None,
        "max_logit_difference": difference,
        "transformers": transformers.__version__,
    }


def of_a_token(model: Gemma4ForCausalLM, found: dict) -> dict:
    """Its bytes and launches in the decode that was measured, and tokens a second beside what the
    bytes alone allow here."""
    middle = PREFILL_TOKENS + DECODE_TOKENS // 2
    read = decode_bytes(model) + key_bytes(model.config, middle, model.compute_dtype)
    return {
        "bytes_per_token": read,
        "launches_per_token": launches_per_token(model),
        "decode_tok_s": round(1e3 / found["decode_ms_per_token"], 1),
        "floor_tok_s": round(copy_bandwidth(model.device) / read, 1),
    }


def line(r: dict) -> str:
    keys = ("vs_eager", "vs_sdpa", "enabled_vs_sdpa")
    ratios = ["{:>6.2f}x {:>5.2f}x".format(*r[key]) for key in keys]

    def ratio(x: float | None) -> str:
        return "-" if x is None else f"{x:.2f}x"

    return (
        f"{r['model']:<12} {r['dtype']:<9} {r['prefill_ms']:>10} {r['decode_ms_per_token']:>10}"
        f" {ratios[0]:>14} {ratios[1]:>14} {ratios[2]:>14} {ratio(r['compiled_vs_sdpa']):>9}"
        f" {r['decode_tok_s']:>8} {r['floor_tok_s']:>8} {r['launches_per_token'] or '-':>8}"
    )


if __name__ == "__main__":
    main()
