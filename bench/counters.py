"""What the profiler counts in the main kernels: how busy each part of the card is.

    python bench/counters.py --out FILE

Runs Nsight Compute's ncu over one call at a time, after one to warm up. Lines of JSON, one a call,
with its kernels; a call that stands in FILE already is not profiled again. Kernels that touch local
memory fail, for none may spill.
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import op_cases
import torch
from ledger import Ledger

import gemma4_kernels
from gemma4.config import FULL

CALLS: dict[str, Callable[[], op_cases.Case]] = {
    "attention_prefill, head_dim 512": lambda: op_cases.attention_prefill("E4B", FULL, 8192),
    "attention_decode, head_dim 512": lambda: op_cases.attention_decode("E4B", FULL, 8, 32768),
    "moe_experts, few tokens": lambda: op_cases.moe_experts("26B-A4B", 8),
    "moe_experts, many tokens": lambda: op_cases.moe_experts("26B-A4B", 4096),
}
METRICS = {
    "ns": "gpu__time_duration.sum",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "local_load_sectors": "l1tex__t_sectors_pipe_lsu_mem_local_op_ld.sum",
    "local_store_sectors": "l1tex__t_sectors_pipe_lsu_mem_local_op_st.sum",
}


def call(name: str) -> None:
    """What ncu profiles: the second of two calls."""
    case, device = CALLS[name](), torch.device("cuda")
    torch.manual_seed(0)
    inputs, op = case.make(device), getattr(gemma4_kernels, case.op)
    op(**inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    op(**inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def kernels(report: str) -> list[dict[str, Any]]:
    """The kernels in ncu's raw page as CSV: names, units, then a line a kernel."""
    lines = [line for line in report.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        raise RuntimeError(f"ncu counted nothing: {report.strip()[-300:]}")
    names, _, *rows = csv.reader(lines)
    found = []
    for values in rows:
        row = dict(zip(names, values, strict=True))
        numbers = {key: number(row.get(metric, "")) for key, metric in METRICS.items()}
        found.append({"kernel": row["Kernel Name"], **numbers})
    return found


def number(text: str) -> float | None:
    """None for what this ncu does not count."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def command(name: str, metrics: list[str], log: Path) -> list[str]:
    output = ("--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log))
    # The clocks stay as they are: the card may be shared.
    what = ("--profile-from-start", "off", "--clock-control", "none", "--target-processes", "all")
    call = (sys.executable, __file__, "--call", name)
    return ["ncu", *output, *what, "--metrics", ",".join(metrics), *call]


def profile(name: str) -> list[dict[str, Any]]:
    """Runs ncu; of metrics that it does not know on this card there are no numbers."""
    metrics, unknown = list(METRICS.values()), [""]
    while unknown:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "ncu.csv"
            done = subprocess.run(command(name, metrics, log), capture_output=True, text=True)
            said = (log.read_text() if log.is_file() else "") + done.stdout + done.stderr
        names = set(re.findall(r"Failed to find metric (?:regex:\^)?(\w+)", said))
        unknown = [metric for metric in metrics if metric.partition(".")[0] in names]
        metrics = [metric for metric in metrics if metric not in unknown]
        if unknown:
            print(f"ncu does not know {', '.join(unknown)}", flush=True)
    if done.returncode != 0:
        raise RuntimeError(f"ncu ended with status {done.returncode}: {said.strip()[-300:]}")
    return kernels(said)


def spilling(found: list[dict[str, Any]]) -> list[str]:
    names = ("local_load_sectors", "local_store_sectors")
    ours = (row for row in found if "gemma4" in row["kernel"])
    return [row["kernel"] for row in ours if any(row[name] for name in names)]


def run(ledger: Ledger) -> None:
    for name in CALLS:
        if name in ledger.done():
            continue
        ledger.start(name)
        try:
            found = profile(name)
        except (OSError, RuntimeError) as error:
            ledger.end(name, "failed", why=str(error), kernels=[])
        else:
            wrong = spilling(found)
            why = f"local memory is used by {', '.join(wrong)}" if wrong else ""
            ledger.end(name, "failed" if wrong else "passed", why=why, kernels=found)
        print(name, *(f"{key}={x}" for key, x in ledger.rows()[-1].items()), flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="the file of JSON lines")
    what.add_argument("--call", choices=CALLS, help="make this call, for ncu to profile")
    return parser


def main() -> int:
    args = arguments().parse_args()
    if args.call:
        call(args.call)
        return 0
    ledger = Ledger(args.out)
    run(ledger)
    return int(any(row["outcome"] == "failed" for row in ledger.rows()))


if __name__ == "__main__":
    sys.exit(main())
