"""What bench/gpu_check.py runs, in its order: what proves most for its time comes first."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZER = "compute-sanitizer"
# A sanitizer's first line and its sums, if they are of nothing.
HARMLESS = re.compile(r"COMPUTE-SANITIZER|\w+ SUMMARY: 0 |$")


@dataclass(frozen=True)
class Stage:
    """One command, whose exit status is 0 or 1 where it has come to its end.

    {python} is this interpreter, {name} the stage's, {ledger} the file that says what is done,
    {out} the folder of results; {parallel} stands for pytest-xdist's options where it is installed.
    """

    proves: str
    command: str
    environment: Mapping[str, str] = field(default_factory=dict)
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    faster_with: tuple[str, ...] = ()  # modules
    quiet_seconds: float = 150  # a command that says nothing for longer hangs

    def arguments(self, name: str, out: Path) -> list[str]:
        parallel = f"-n {min(8, os.cpu_count() or 1)}" if find_spec("xdist") else ""
        values = {"python": sys.executable, "ledger": out / f"{name}.jsonl", "name": name}
        words = shlex.split(self.command.replace("{parallel}", parallel))
        return [word.format(out=out, **values) for word in words]

    @property
    def has_items(self) -> bool:
        return "{ledger}" in self.command

    def slower(self) -> list[str]:
        return [name for name in self.faster_with if find_spec(name) is None]

    def found(self, log: Path) -> str:
        """What a sanitizer has found, also in a piece that was cut before it could say so."""
        if SANITIZER not in self.programs:
            return ""
        lines = re.findall(r"^========= (\S.*)", log.read_text(errors="replace"), re.MULTILINE)
        found = [line for line in lines if not HARMLESS.match(line)]
        return found[0] if found else ""


def gpu_tests() -> str:
    """The files whose tests or fixtures run on a GPU too: the others may need what is not there."""
    case = re.compile(r"^def \w+\([^)]*\b(backend|device_backend|on_card)\b", re.MULTILINE)
    files = sorted((ROOT / "tests").glob("*/test_*.py"))
    return " ".join(str(file.relative_to(ROOT)) for file in files if case.search(file.read_text()))


def sanitizer(proves: str) -> Stage:
    """torch's kernels are not checked, which would take hours. Without torch's cache each tensor is
    an allocation, whose bounds the tools know."""
    return Stage(
        proves,
        f"{SANITIZER} --tool {{name}} --error-exitcode 9 --launch-timeout 0"
        " --report-api-errors no --kernel-name kns=gemma4"
        " {python} bench/small_cases.py --out {ledger}",
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        programs=(SANITIZER,),
    )


def bench_ops(*ops: str) -> Stage:
    return Stage(
        "each op beside its floor and its peers",
        "{python} bench/bench_ops.py --brief --out {ledger} --only " + " ".join(ops),
    )


STAGES = {
    "build": Stage(
        "the kernels compile for this card and load",
        "{python} -m pip install --no-index --no-deps --no-build-isolation -v -e .",
        {"GEMMA4_KERNELS_BUILD": "cuda"},
        faster_with=("ninja",),
        quiet_seconds=400,
    ),
    "check": Stage(
        "each kernel is right on small awkward shapes",
        "{python} -m gemma4 check --json",
        # Kept where the user's programs find it.
        {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))},
    ),
    "tests": Stage(
        "the tests' cases for a GPU, against float64",
        f"{{python}} -m pytest -vv -p resumed_tests --ledger {{ledger}} {{parallel}} -k cuda"
        f" {gpu_tests()}",
        {"GEMMA4_KERNELS_REQUIRE_CUDA": "1"},
        modules=("pytest",),
        faster_with=("xdist",),
    ),
    "memcheck": sanitizer("no access out of bounds or misaligned"),
    "racecheck": sanitizer("no race in shared memory"),
    "prefill": bench_ops("attention_prefill"),
    "decode": bench_ops("attention_decode", "qkv_attention_decode"),
    "linears": bench_ops("linear_small", "linear_packed"),
    "experts": bench_ops("moe_experts", "moe_route", "moe_open", "moe_experts_small"),
    "rows": bench_ops(
        *("rms_norm", "add_rms_norm", "moe_norm", "qkv_norm_rope", "qkv_norm_rope_cache"),
        *("geglu", "ple_embed", "ple_gate", "softcap", "softcap_argmax", "sample"),
    ),
    "backward": bench_ops(
        *("attention_prefill_backward", "moe_experts_backward"),
        *("rms_norm_backward", "add_rms_norm_backward", "moe_norm_backward"),
        *("qkv_norm_rope_backward", "geglu_backward", "ple_gate_backward"),
        *("softcap_cross_entropy", "softcap_cross_entropy_backward"),
    ),
    "counters": Stage(
        "what the profiler counts in the main kernels; none spills",
        "{python} bench/counters.py --out {ledger}",
        programs=("ncu",),
    ),
    "synccheck": sanitizer("barriers are used as they must be"),
    "initcheck": sanitizer("no read of memory that nobody wrote"),
    "models": Stage(
        "whole models beside transformers",
        "{python} bench/bench_model.py --out {ledger}",
        modules=("transformers",),
    ),
    "generate": Stage(
        "the command line's rates", "{python} -m gemma4 bench --json {out}/generate.json"
    ),
}
