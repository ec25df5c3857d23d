"""Everything that needs a GPU, in stages: build, tests, compute-sanitizer, benchmarks.

    python bench/gpu_check.py [STAGE ...] [--out gpu_results]

Each stage stays below eight minutes and can be run alone; without a name all are run. Logs, JSON
and a summary land in one folder. A stage that fails is named, and the exit code is 1.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 480
PYTHON = shlex.quote(sys.executable)
BENCH_OPS = f"{PYTHON} bench/bench_ops.py --minutes 6.5 --out {{out}}/ops_{{stage}}.jsonl --only"
# torch's kernels are not checked, which would take hours. Without torch's cache each tensor is an
# allocation, whose bounds the tools know.
SANITIZER = (
    "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool {stage} --error-exitcode 9"
    " --kernel-regex kns=gemma4"
    f" {PYTHON} bench/small_cases.py"
)
STAGES = {
    "build": f"GEMMA4_KERNELS_BUILD=cuda {PYTHON} -m pip install --no-build-isolation -v -e .",
    "tests": "GEMMA4_KERNELS_REQUIRE_CUDA=1"
    f" {PYTHON} -m pytest -k cuda --junitxml={{out}}/tests.xml",
    "small-cases": f"{PYTHON} bench/small_cases.py",
    "memcheck": SANITIZER,
    "racecheck": SANITIZER,
    "synccheck": SANITIZER,
    "initcheck": SANITIZER,
    "prefill": f"{BENCH_OPS} attention_prefill",
    "backward": f"{BENCH_OPS} attention_prefill_backward",
    "decode": f"{BENCH_OPS} attention_decode",
    "experts": f"{BENCH_OPS} moe_experts moe_route",
    "norms": f"{BENCH_OPS} rms_norm add_rms_norm moe_norm qkv_norm_rope qkv_norm_rope_cache",
    "rest": f"{BENCH_OPS} geglu ple_embed ple_gate softcap softcap_argmax",
    "models": f"{PYTHON} bench/bench_model.py --out {{out}}/model.jsonl",
    "generate": f"{PYTHON} -m gemma4 bench --json {{out}}/generate.jsonl",
}


def run_stage(stage: str, out: Path) -> dict:
    """Runs one stage into its log; its exit status, 124 past the limit, as `timeout` has it."""
    command = STAGES[stage].format(out=shlex.quote(str(out)), stage=stage)
    start = time.monotonic()
    with (out / f"{stage}.log").open("w", encoding="utf-8") as log:
        print(f"$ {command}", file=log, flush=True)
        process = subprocess.Popen(
            command, shell=True, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it started
            process.wait()
            status = 124
            print(f"not done in {LIMIT_SECONDS} s", file=log)
    return {"stage": stage, "status": status, "seconds": round(time.monotonic() - start, 1)}


def run(stages: Iterable[str], out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for stage in stages:
        rows.append(run_stage(stage, out))
        print(f"{stage}: {rows[-1]['status'] or 'passed'}", flush=True)
    file = out / "summary.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | {row["stage"]: row for row in rows}, indent=1) + "\n")
    print(f"\n{'stage':12} {'seconds':>8}  in {out}")
    for row in rows:
        said = (
            "passed" if row["status"] == 0 else f"FAILED with {row['status']}: {row['stage']}.log"
        )
        print(f"{row['stage']:12} {row['seconds']:8}  {said}")
    failed = [row["stage"] for row in rows if row["status"] != 0]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, default=Path("gpu_results"))
    parser.add_argument("--list", action="store_true", help="print the stages' commands")
    args = parser.parse_args(argv)
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        parser.error(f"the stages are {', '.join(STAGES)}; got {', '.join(sorted(unknown))}")
    if args.list:
        for stage in args.stages or STAGES:
            print(f"{stage}: {STAGES[stage].format(out=args.out, stage=stage)}")
        return 0
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    return run(args.stages or STAGES, args.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
