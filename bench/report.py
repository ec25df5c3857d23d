"""Tables of the committed results in bench/results, and the numbers in README.md.

    python bench/report.py [--plots FOLDER]

All is drawn from files in bench/results, nothing is measured here; test_report.py holds the
committed tables to them. With --plots, pictures of each op in gpu_*.json, the pages of
gpu_check.py, and in ops_*.jsonl, what bench_ops.py has measured (see plots.py).
"""

import argparse
import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import compiled
import estimates
import plots
import token_cost
from ledger import Ledger
from tables import machines, model_table, ops_summary, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- numbers: made by bench/report.py -->\n", "<!-- end of numbers -->\n"
NO_GPU = "No result of a GPU is committed: no time below was measured on one."


def read_lines(files: Iterable[Path]) -> list[dict]:
    return [row for file in sorted(files) for row in Ledger(file).rows()]


def op_runs() -> dict[str, list[dict]]:
    """The rows of each committed measurement of the ops, by its file's name."""
    found = {file.stem: read_lines([file]) for file in RESULTS.glob("ops_*.jsonl")}
    for file in RESULTS.glob("gpu_*.json"):
        found[file.stem] = json.loads(file.read_text())["ops"]
    return dict(sorted(found.items()))


def compiled_table(rows: list[dict]) -> str:
    """One line a kernel; four numbers are those of compiled.ARCHS, one stands for four."""
    kernels: dict[str, dict[str, dict]] = {}
    for row in rows:
        kernels.setdefault(row["kernel"], {})[row["arch"]] = row

    def line(archs: dict[str, dict]) -> tuple[object, ...]:
        hopper, ampere = archs.get("sm_90a"), archs.get("sm_80")
        one = hopper or ampere  # of what is the same on all, and where there is no Hopper's
        assert one is not None

        def four(key: str) -> str:
            values = [archs[arch][key] if arch in archs else "-" for arch in compiled.ARCHS]
            return " ".join(map(str, values if len(set(values)) > 1 else values[:1]))

        def loop(row: dict | None) -> str:
            return "{} of {}".format(*row["loop"]) if row and row["tensor"] else "-"

        smem = (one["static_smem"] + one["smem"]) / 1024
        bits = [max(one[key], default="-") for key in ("load_bits", "store_bits")]
        name = f"`{one['kernel'].replace('_kernel<', '<').replace('AttentionTile', '')}`"
        numbers = one["threads"], f"{smem:.1f}", four("registers"), four("blocks")
        return (name, *numbers, "{}, {}".format(*bits), loop(ampere), loop(hopper))

    sizes = ("kernel", "threads", "KB", "registers", "blocks", "load, store bits")
    head = (*sizes, "tensor, sm_80", "tensor, sm_90a")
    return table(head, map(line, kernels.values()))


def counted_table(rows: list[dict]) -> str:
    keys = ("bytes_over_floor", "sectors_over_ideal", "wavefronts_over_ideal", "mma_over_useful")

    def line(row: dict) -> tuple[object, ...]:
        ratios = ["-" if row[key] is None else f"{row[key]:.2f}" for key in keys]
        return (row["case"], row["launches"], row["sectors_a_request"], *ratios)

    head = ("case", "kernels", "sectors a request", "bytes", "sectors", "bank wavefronts", "mma")
    return table(head, map(line, rows))


def over_floor(row: dict | None) -> float:
    return row["estimate_us"] / row["floor_us"] if row else 0.0


def longest_bound(row: dict) -> float:
    return row[f"{row['bound_by']}_us"]


def estimates_table(rows: list[dict]) -> str:
    def line(row: dict) -> tuple[object, ...]:
        times = row["floor_us"], longest_bound(row), row["estimate_us"]
        return (row["case"], *times, f"{over_floor(row):.2f}", row["bound_by"], row["moved_by"])

    times = ("floor µs", "bound µs", "estimate µs", "estimate / floor")
    return table(("case", *times, "bound by", "would move it"), map(line, rows))


def static_md(report: dict[str, list[dict]]) -> str:
    return f"""# The kernels, without a GPU

Made by `bench/static_report.py` and `bench/report.py`. Nothing in it was measured on a GPU.

## What the compiler made

Four numbers are those of {", ".join(compiled.ARCHS)}, a dash where no card is given the
kernel's tile; one stands for four. Threads and shared memory (KB) are a launcher's; blocks are what
one multiprocessor holds. Bits are the widest access of global memory, on sm_90a where it is there.
The last columns count tensor instructions among all that stand in the main loop; what an inner loop
repeats stands there once. A warp's share of an HGMMA.64xNx16 is N / 8 products of HMMA.16816.

{compiled_table(report["compiled"])}
## What the emulator counted

Ratios to what would do: bytes asked for of the large buffers, 32-byte sectors, wavefronts over the
banks of shared memory, matrix products. Small shapes, bf16.

{counted_table(report["counted"])}
## Estimates on an H100

{estimate_words()}

{textwrap.fill(estimates.assumptions(), 100)}

{estimates_table(report["estimates"])}
## One token at batch 1, in bf16

{token_words()}

{tokens_table(report["tokens"])}"""


def token_words() -> str:
    return textwrap.fill(
        f"Weights and keys at {token_cost.STREAMED:.0%} of what copies move, "
        f"{token_cost.LAUNCH * 1e6:.1f} µs a launch, and {token_cost.ITERATION * 1e6:.1f} µs an "
        "iteration of decode attention where that takes longer than its keys: arithmetic, with "
        "constants whose sources stand in `bench/estimates.py` and `bench/token_cost.py`. Behind "
        "an arrow, "
        f"{token_cost.DEPENDENT_LAUNCH * 1e6:.1f} µs a launch, as dependent launches allow from "
        "Hopper on. Then the floor, bytes over copies alone, and the last number's share of it. A "
        "dash: the weights and that many keys do not fit the card. Launches are counted on the "
        "emulated kernels.",
        100,
    )


def one_token_words(rows: list[dict]) -> str:
    """Of the first card and the shortest context."""
    card, keys = rows[0]["card"], rows[0]["keys"]
    told = "; ".join(
        f"{row['model']} {token_cell(row)}"
        for row in rows
        if (row["card"], row["keys"]) == (card, keys)
    )
    return textwrap.fill(
        f"So too one token at batch 1 on an {card}, in bf16 over {keys} keys, in tokens a second "
        f"of what its bytes alone allow (behind the arrow with dependent launches): {told} (other "
        "cards: `bench/results/static.md`).",
        100,
    )


def tokens_table(rows: list[dict]) -> str:
    """A line a model and context."""
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        sizes = tuple(row[key] for key in ("model", "keys", "launches", "weights_gb", "keys_gb"))
        lines.setdefault(sizes, []).append(token_cell(row))
    cards = dict.fromkeys(row["card"] for row in rows)
    head = ("model", "keys", "launches", "GB of weights", "of keys", *cards)
    return table(head, ((*sizes, *cells) for sizes, cells in lines.items()))


def token_cell(row: dict) -> str:
    """As in `241 → 261 of 323, 81%`: tokens a second."""
    plain, dependent, floor = (row[key] for key in ("tok_s", "dependent_tok_s", "floor_tok_s"))
    if floor is None:
        return "-"
    arrow = "" if dependent is None else f" → {dependent:.0f}"
    return f"{plain:.0f}{arrow} of {floor:.0f}, {(dependent or plain) / floor:.0%}"


def estimate_words() -> str:
    told = (
        "The bound is the largest of the times that bytes from DRAM, from L2 and through shared "
        "memory, tensor work and issued instructions would take alone. The estimate has beside it "
        "the launch, waves that do not fill the card, and, where a multiprocessor holds one block, "
        "its begin and end and the copies for which every iteration waits. All of it is "
        "arithmetic, not a measurement."
    )
    return textwrap.fill(told, 100)


def on_gpu(name: str, rows: list[dict]) -> str:
    """A line an op; the page, where there is one, has a line a case."""
    page = f"Case by case, with their peers: `bench/results/{name}.md`.\n" * name.startswith("gpu_")
    return machines(rows) + page + "\n" + ops_summary(rows)


def numbers() -> str:
    """The README's block."""
    report = json.loads((RESULTS / "static.json").read_text())
    runs = op_runs()
    overhead = [row for rows in runs.values() for row in rows if row["kind"] == "overhead"]
    models = read_lines([RESULTS / "model_cpu.jsonl"])
    measured = {
        name: rows for name, rows in runs.items() if any(row["kind"] == "op" for row in rows)
    }
    parts = [on_gpu(name, rows) for name, rows in measured.items()] or [NO_GPU]
    parts.append(estimate_words() + "\n" + worst_words(report["estimates"]))
    parts.append(one_token_words(report["tokens"]))
    if overhead:
        ratios = sorted(row["over_add"] for row in overhead)
        parts.append(
            "An op's call before any kernel starts (wrapper, dispatcher, checks, outputs) costs "
            f"{ratios[0]:.1f} to\n{ratios[-1]:.1f} times that of `torch.add` on empty tensors, on "
            "a CPU.\n"
        )
    parts.append(
        f"{models_words(models)}:\n{ratios_words(models, 'vs_sdpa')}; after `enable`,\n"
        f"{ratios_words(models, 'enabled_vs_sdpa')} (`bench/results/model_cpu.md`).\n"
    )
    return "\n".join(part.rstrip() + "\n" for part in parts)


def models_words(models: list[dict]) -> str:
    threads = models[0]["threads"]
    return f"Transformers' time with sdpa over ours, on a CPU (Xeon with AMX, threads: {threads})"


def ratios_words(models: list[dict], key: str) -> str:
    """The least and the largest ratio of the prefill, and of the decode."""
    prefill, decode = (sorted(ratios) for ratios in zip(*(row[key] for row in models), strict=True))
    return (
        f"{prefill[0]:.2f} to {prefill[-1]:.2f} in prefill, {decode[0]:.2f} to {decode[-1]:.2f} in "
        "decode"
    )


def model_md(models: list[dict]) -> str:
    return f"""# The model on a CPU

Made by `bench/bench_model.py` and `bench/report.py`:
{models_words(models)},
and over its own after `enable`.

{model_table(models)}"""


def worst_words(rows: list[dict]) -> str:
    """The estimate over the floor of each op with tensor work, in the case that stands worst; not
    of the kernels that are parts of one."""
    worst: dict[str, dict] = {}
    for row in rows:
        op = re.split(r"[ ,]+\d", row["case"])[0]
        of_all = row.get("tensor_us") and " of " not in op
        if of_all and over_floor(row) > over_floor(worst.get(op)):
            worst[op] = row
    said = (f"{op} {over_floor(row):.2f} ({row['bound_by']})" for op, row in worst.items())
    return textwrap.fill(f"Over the floors it is at worst, by op: {', '.join(said)}.", 100)


def with_numbers(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return before + BEGIN + numbers() + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plots", type=Path, help="also draw the ops' results into this folder")
    folder = parser.parse_args().plots
    report = json.loads((RESULTS / "static.json").read_text())
    (RESULTS / "static.md").write_text(static_md(report), encoding="utf-8")
    models = read_lines([RESULTS / "model_cpu.jsonl"])
    (RESULTS / "model_cpu.md").write_text(model_md(models), encoding="utf-8")
    README.write_text(with_numbers(README.read_text(encoding="utf-8")), encoding="utf-8")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in op_runs().items():
            if any(row["kind"] == "op" for row in rows):
                (folder / name).mkdir(exist_ok=True)
                plots.draw(rows, folder / name)


if __name__ == "__main__":
    main()
