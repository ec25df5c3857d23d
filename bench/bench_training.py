"""A training step of the whole model beside its peers: same random weights, one process.

    python bench/bench_training.py --out FILE [--only NAME ...] [--tokens N] [--lora]
        [--checkpointing] [--device D] [--repeat N]

Lines of JSON; a row that stands in FILE already is not measured again. A step is forward and
backward of 4 rows; the optimizer, which costs all the same, is left out. "gemma4" is ours, which
returns the loss alone (skip_logits), "sdpa" transformers' class with torch's attention and
grouped_mm for experts, "enabled" the same after `gemma4_kernels.integrations.transformers.enable`;
"liger" is "sdpa" under Liger's kernels, where they are installed and know the model: last, for they
stay in transformers. Else a line says why not. Numbers are medians of runs by turns, peaks beyond
the weights, bytes those of the ops that ran (step_bytes.py). Ratios are "sdpa" over the other:
above 1 is faster, or less. Before any timing the losses are compared. --lora trains PEFT's adapters
alone.
"""

import argparse
import statistics
from pathlib import Path

import bench_model
import torch
import transformers
from ledger import Ledger
from step_bytes import RANK, TARGETS, Moved
from torch import Tensor, nn

from gemma4 import Gemma4TextConfig
from gemma4.measure import machine, peak_memory
from gemma4.presets import RELEASED

ROWS = 4
WAYS = ("sdpa", "enabled")
SMALL = ("a-E4B-like", "a-26B-like")
CONFIGS = {name: bench_model.CONFIGS[name] for name in SMALL}
CONFIGS |= {name: bench_model.options(Gemma4TextConfig.preset(name)) for name in RELEASED}


def trainable(model: nn.Module, *, lora: bool, checkpointing: bool) -> nn.Module:
    dtype = next(model.parameters()).dtype
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        import peft

        torch.manual_seed(1)
        config = peft.LoraConfig(r=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).to(dtype)
    return model.train()


def under_liger(model: nn.Module) -> str | None:
    """Puts Liger's kernels into transformers' model; or why that cannot be."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as PATCHES
    except ImportError:
        return "liger is not installed"
    patch = PATCHES.get(model.config.model_type)
    if patch is None:
        return f"liger has no kernels for {model.config.model_type}"
    patch(model=model)
    return None


def step(model: nn.Module, ids: Tensor) -> float:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def counted(model: nn.Module, ids: Tensor) -> int:
    with Moved().watching() as moved:
        step(model, ids)
    return moved.bytes.total()


def seconds(models: dict[str, nn.Module], ids: Tensor, repeat: int) -> dict[str, float]:
    times: dict[str, list[float]] = {way: [] for way in models}
    for _ in range(repeat):
        for way, model in models.items():
            start = bench_model.now(ids.device)
            step(model, ids)
            times[way].append(bench_model.now(ids.device) - start)
    return {way: statistics.median(found) for way, found in times.items()}


def measure(models: dict[str, nn.Module], ids: Tensor, repeat: int) -> dict[str, dict]:
    """By way: the loss, tokens a second, peak memory and bytes. The first steps warm up."""
    found = {
        way: {
            "loss": step(model, ids),
            "bytes": counted(model, ids),
            "peak": peak_memory(lambda model=model: step(model, ids), ids.device),
        }
        for way, model in models.items()
    }
    for way, took in seconds(models, ids, repeat).items():
        found[way]["tok_s"] = round(ids.numel() / took, 1)
    return found


def run(name: str, args: argparse.Namespace) -> dict:
    device = torch.device(args.device)
    dtype = torch.bfloat16 if name in RELEASED else torch.float32
    models = bench_model.build(CONFIGS[name], dtype, device, (*WAYS, "liger"))
    models["gemma4"].skip_logits = True
    options = dict(lora=args.lora, checkpointing=args.checkpointing)
    ids = torch.randint(3, CONFIGS[name]["vocab_size"], (ROWS, args.tokens // ROWS), device=device)
    liger = models.pop("liger")
    found = measure({w: trainable(m, **options) for w, m in models.items()}, ids, args.repeat)
    why_no_liger = under_liger(liger)
    if why_no_liger is None:
        found |= measure({"liger": trainable(liger, **options)}, ids, args.repeat)
    return row(name, args, found) | {"liger": why_no_liger or "measured"} | machine(device)


def row(name: str, args: argparse.Namespace, found: dict[str, dict]) -> dict:
    plain = found["sdpa"]
    return {
        "model": name,
        "trained": "LoRA" if args.lora else "all",
        "checkpointing": args.checkpointing,
        "tokens": args.tokens,
        "ways": found,
        "vs_sdpa": {
            way: {
                "speed": round(it["tok_s"] / plain["tok_s"], 2),
                "peak": round(plain["peak"] / it["peak"], 2),
                "bytes": round(plain["bytes"] / it["bytes"], 2),
            }
            for way, it in found.items()
            if way != "sdpa"
        },
        "max_loss_difference": max(abs(it["loss"] - plain["loss"]) for it in found.values()),
        "transformers": transformers.__version__,
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of JSON lines")
    parser.add_argument("--only", nargs="*", choices=CONFIGS, help="default: E4B, small on a CPU")
    parser.add_argument("--tokens", type=int, help="default: 8192, on a CPU 256")
    parser.add_argument("--lora", action="store_true", help=f"rank {RANK}, on {len(TARGETS)} kinds")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=5)
    return parser


def lines(r: dict) -> str:
    """One a way: what it reaches, and beside sdpa."""
    head = f"{r['model']:<12} {r['trained']:<5}"
    said = []
    for way, it in r["ways"].items():
        numbers = f"{it['tok_s']:>10} {it['peak'] / 1e9:>9.3f} {it['bytes'] / 1e9:>10.2f}"
        ratios = r["vs_sdpa"].get(way, {}).values()
        said.append(f"{head} {way:<8} {numbers} " + " ".join(f"{ratio:>6.2f}x" for ratio in ratios))
    if r["liger"] != "measured":
        said.append(f"{head} {r['liger']}")
    return "\n".join(said)


def main() -> None:
    args = arguments().parse_args()
    on_gpu, ledger = torch.device(args.device).type == "cuda", Ledger(args.out)
    args.tokens = args.tokens or (8192 if on_gpu else 256)
    print(f"{'model':<12} {'train':<5} {'way':<8} {'tok/s':>10} {'peak GB':>9} {'moved GB':>10}"
          f"  vs sdpa: speed, peak, bytes")  # fmt: skip
    for name in args.only or (("E4B",) if on_gpu else SMALL):
        options = [name, f"{args.tokens} tokens", "LoRA" if args.lora else "all"]
        item = ", ".join([*options, *(["checkpointing"] if args.checkpointing else [])])
        if item in ledger.done():
            continue
        ledger.start(item)
        found = run(name, args)
        ledger.end(item, "passed", **found)
        print(lines(found), flush=True)


if __name__ == "__main__":
    main()
