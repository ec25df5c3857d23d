"""Everything that only a GPU can prove, in pieces, without network: the cheapest proof first.

    python bench/gpu_check.py [STAGE ...] [--minutes N] [--out gpu_results] [--wheels FOLDER]
    python bench/gpu_check.py page

What is done stands in a folder of gpu_results that is named by a digest of the sources, the card,
its driver, torch and the toolkit: a later call goes on where this one ended, and no result of other
sources or another card stands beside it. A stage that is named is run anew. --minutes ends a call
in time. A stage that lacks something is skipped, and the page says by name what it lacks; --wheels
installs what a folder brings along. Each call ends with the page, in Markdown and JSON; `page`
writes the last one into bench/results.

Exit status: 0 all passed, 1 a stage failed, 2 nothing can be run here, 3 more is to be done: the
minutes are over, call again.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import compiled
import gpu_page
import provenance
import torch
from gpu_stages import ROOT, STAGES, Stage
from ledger import Ledger

LEAST_SECONDS = 20  # to start a process in
MORE_TO_DO = 3
KEY = ("sources", "card", "driver", "torch", "toolkit")  # what results depend on


def environment(stage: Stage, out: Path) -> dict[str, str]:
    """The sources come before what is installed, the toolkit's programs are found, and no record of
    a failed check hides a kernel from the other stages."""
    paths = [str(ROOT / folder) for folder in ("", "python", "bench", "tests")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    toolkit = compiled.toolkit()
    given = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PATH": os.environ["PATH"] + (f"{os.pathsep}{toolkit / 'bin'}" if toolkit else ""),
        "XDG_CACHE_HOME": str(out / "cache"),
    }
    return os.environ | given | dict(stage.environment)


def lacking(stage: Stage, out: Path) -> list[str]:
    path = environment(stage, out)["PATH"]
    programs = [name for name in stage.programs if shutil.which(name, path=path) is None]
    return programs + [name for name in stage.modules if find_spec(name) is None]


def run_piece(stage: Stage, name: str, out: Path, end: float) -> tuple[str, int | None]:
    """Runs the stage's command into its log until it ends, the time is over, or it has said nothing
    for so long that it hangs. Returns ("ended", exit status), ("cut", None) or ("hung", None)."""
    with (out / f"{name}.log").open("a", encoding="utf-8") as log:
        command = stage.arguments(name, out)
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(stage, out), stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp,
        )  # fmt: skip
        size, heard = -1, time.monotonic()
        try:
            while True:
                try:
                    return "ended", process.wait(0.2)
                except subprocess.TimeoutExpired:
                    now = time.monotonic()
                if (grown := os.fstat(log.fileno()).st_size) != size:
                    size, heard = grown, now
                if now > end:
                    return "cut", None
                if now - heard > stage.quiet_seconds:
                    print(f"\nnothing was said for {stage.quiet_seconds} s", file=log)
                    return "hung", None
        finally:
            end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """Kills the process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_stage(name: str, out: Path, end: float) -> dict[str, str]:
    """Runs a stage on from what its ledger has, in as many processes as its faults make necessary;
    what became of it, and why."""
    stage, ledger = STAGES[name], Ledger(out / f"{name}.jsonl")
    while True:
        done = len(ledger.done())
        ledger.begin()
        ending, status = run_piece(stage, name, out, end)
        if ending == "cut":
            return {"outcome": "unfinished", "why": f"{len(ledger.done())} items are done"}
        if ending == "ended" and status in (0, 1) and not ledger.started():
            break
        why = "hung" if ending == "hung" else f"ended with status {status}"
        for item in ledger.started():
            ledger.end(item, "failed", why=f"its process {why}")
        if len(ledger.done()) == done:  # the next process would do no better
            return {"outcome": "failed", "why": f"{why}; see {name}.log"}
        if time.monotonic() > end - LEAST_SECONDS:
            return {"outcome": "unfinished", "why": f"a process {why}"}
    if stage.has_items and not ledger.done():
        return {"outcome": "failed", "why": f"no case was run; see {name}.log"}
    failed = [row["item"] for row in ledger.rows() if row.get("outcome") == "failed"]
    if failed:
        return {"outcome": "failed", "why": f"{len(failed)} failed: {', '.join(failed[:3])}"}
    if found := stage.found(out / f"{name}.log"):
        return {"outcome": "failed", "why": f"{found}; see {name}.log"}
    if status != 0:
        return {"outcome": "failed", "why": f"ended with status {status}; see {name}.log"}
    slower = stage.slower()
    return {"outcome": "passed", "why": f"slowly, without {', '.join(slower)}" if slower else ""}


def built(state: dict[str, Any]) -> bool:
    """Whether the library that this machine would load is the one that was built before."""
    note, library = ROOT / "gemma4_kernels" / "_build.json", ROOT / "gemma4_kernels" / "_C.abi3.so"
    if not (note.is_file() and library.is_file()):
        return False
    return state.get("build") == json.loads(note.read_text())


def check_build() -> tuple[dict[str, Any] | None, str]:
    """The facts of the library that was just built, and why it does not load."""
    ask = "import gemma4_kernels, json; print(json.dumps(gemma4_kernels.build_info()))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        return None, done.stderr.strip().rpartition("\n")[2]
    if reason := json.loads(done.stdout)["reason"]:
        return None, reason
    return json.loads((ROOT / "gemma4_kernels" / "_build.json").read_text()), ""


class Results:
    """The folder of one set of facts, and what is known of its stages."""

    def __init__(self, folder: Path, made: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps([made[name] for name in KEY]).encode()).hexdigest()[:12]
        self.folder, self.file = folder / key, folder / key / "state.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.state = {"stages": {}, "build": None} | before | {"facts": made}

    def write(self) -> None:
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps(self.state, indent=1) + "\n")
        beside.replace(self.file)

    def note(self, name: str, seconds: float, **row: str) -> None:
        before = self.state["stages"].get(name, {}).get("seconds", 0.0)
        self.state["stages"][name] = row | {"seconds": round(before + seconds, 1)}
        self.write()

    def forget(self, name: str) -> None:
        self.state["stages"].pop(name, None)
        for ending in ("log", "jsonl"):
            (self.folder / f"{name}.{ending}").unlink(missing_ok=True)

    def is_done(self, name: str) -> bool:
        if name == "build" and not built(self.state):
            return False
        return self.state["stages"].get(name, {}).get("outcome") in ("passed", "failed")

    def outcomes(self, names: list[str]) -> list[str | None]:
        return [self.state["stages"].get(name, {}).get("outcome") for name in names]


def run(results: Results, names: list[str], end: float) -> int:
    for name in names:
        if results.is_done(name):
            continue
        if time.monotonic() > end - LEAST_SECONDS:
            return MORE_TO_DO
        start, out = time.monotonic(), results.folder
        if missing := lacking(STAGES[name], out):
            outcome = {"outcome": "skipped", "why": f"without {', '.join(missing)}"}
        else:
            outcome = run_stage(name, out, end)
        if name == "build" and outcome["outcome"] == "passed":
            results.state["build"], why = check_build()
            if why:
                outcome = {"outcome": "failed", "why": why}
        results.note(name, time.monotonic() - start, **outcome)
        print(f"{name}: {': '.join(filter(None, outcome.values()))}", flush=True)
        if name == "build" and outcome["outcome"] == "failed":
            return 1  # nothing else would say anything of the kernels
    outcomes = results.outcomes(names)
    if "unfinished" in outcomes:
        return MORE_TO_DO
    return 1 if "failed" in outcomes else 0


def install(wheels: Path) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    return subprocess.run([*command, *sorted(wheels.glob("*.whl"))]).returncode == 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join([*STAGES, "page"]))
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="where results are")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this call")
    parser.add_argument("--wheels", type=Path, help="install the wheels in this folder first")
    parser.add_argument("--list", action="store_true", help="print the stages' commands")
    return parser


def main(argv: list[str] | None = None) -> int:
    start, parser = time.monotonic(), arguments()
    args = parser.parse_args(argv)
    names, out = args.stages or list(STAGES), args.out.resolve()
    if names == ["page"]:
        return gpu_page.commit(out)
    if unknown := set(names) - set(STAGES):
        parser.error(f"the stages are {', '.join(STAGES)}; got {', '.join(sorted(unknown))}")
    if args.list:
        for name in names:
            print(f"{name}: {shlex.join(STAGES[name].arguments(name, out))}")
        return 0
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    if args.wheels and not install(args.wheels):
        return 2
    results = Results(out, provenance.facts())
    for name in args.stages:
        if results.is_done(name):
            results.forget(name)
    results.write()
    status = run(results, names, start + 60 * args.minutes)
    print(gpu_page.write(results.folder))
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    sys.exit(main())
