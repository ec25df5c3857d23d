"""The emulator itself: what it must let pass, and what it must name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import emulated
from support.marks import needs_compiler

LINE = r"emulation_checks.cpp:\d+"
UNORDERED = (
    rf"race between blocks: read of 'output', offset \d+, at {LINE}, is not ordered after the "
    rf"write by block number \d at {LINE}"
)
STALE = rf"ld.global.nc of 'output', .*, at {LINE}, which the same launch writes, at {LINE}"
CHECKS = {  # name in emulation_checks.cpp: the finding, "clean" for a kernel that is right
    "exchange": "clean",
    "exchange without barrier": r"race: (read|write) by thread \d+ .*emulation_checks.cpp:\d+ .*",
    "reuse": "clean",
    "reuse without barrier": "race: write by .* is not ordered after the (read|write)",
    "warp exchange": "clean",
    "a shuffle orders no memory": "race",
    "named barriers": "clean",
    "barrier counts differ": "barrier 1 is used with (96 and 64|64 and 96) threads",
    "neighbouring bytes": "clean",
    "poisoned shared memory": "clean",
    "poisoned at every block": "clean",
    "shared memory out of bounds": r"shared access out of bounds: offset 16\d{3}, .* of 16384",
    "more shared memory than launched with": "uses 32768 bytes .* its launcher passed 16384",
    "barrier under a branch": r"deadlock: warps 0 in __syncthreads at emulation_checks.cpp:\d+",
    "two barriers for one": r"one __syncthreads is reached from .*:\d+ and from .*:\d+",
    "endless loop without calls": "time limit reached: warps 0 1 in running",
    "waiting for a later block": "time limit reached",
    "endless spinning": "time limit reached",
    "shuffles": "clean",
    "shuffle under a branch": "deadlock: warps 0 in __syncthreads .*warps 0 in shuffle",
    "shuffle with exited lanes": "(names lanes that have exited|exits while other lanes wait)",
    "shuffle outside its mask": "shuffle by a lane outside its own mask",
    "mma bf16": "clean",
    "mma fp16": "clean",
    "matrix loads and stores": "clean",
    "global store to shared memory": "an instruction for global memory meets shared memory",
    "global load of shared memory": "an instruction for global memory meets shared memory",
    "misaligned matrix row": "a matrix row's address is not a multiple of 16",
    "copy": "clean",
    "copy with zero fill": "clean",
    "copy of nothing": "clean",
    "copy not waited for": "with an asynchronous copy in flight",
    "copy without barrier": "(race|with an asynchronous copy in flight)",
    "copy never waited for": "exits with 1 cp.async never waited for",
    "misaligned copy": "cp.async of 16 bytes from or to a misaligned address",
    "global memory out of bounds": "global read of 4 bytes out of bounds: nearest is 'input'",
    "copy out of bounds": r"global read of 16 bytes out of bounds: .*'input' \(4096 bytes\)",
    "write to an input": "out of bounds: 'input' is read-only",
    "memory of an earlier call": "out of bounds, at",
    "misaligned global load": "misaligned global access of 16 bytes",
    "blocks write apart": "clean",
    "blocks write the same": "race between blocks: write of 'output'",
    "a block reads what another writes": "race between blocks",
    "blocks add atomically": "clean",
    "the last block gathers": "clean",
    "the last block gathers between fences": "clean",
    "the last block gathers without fence": UNORDERED,
    "the last block gathers without a second fence": UNORDERED,
    "the last block gathers without barrier": UNORDERED,
    "the last block counts elsewhere": UNORDERED,
    "the last block's threads are not told": UNORDERED,
    "the last block reads what may be stale": STALE,
    "the last block resets nothing": "wrong: the counter was not left at zero",
    "a chain of blocks": "clean",
    "threads of a block exchange": "clean",
    "threads of a block exchange without barrier": rf"race: \w+ of 'output', .*{LINE}.*{LINE}",
    "a block overwrites what it read as constant": STALE,
    "dependent": "clean",
    "dependent reads early": rf"read of 'input', at {LINE} by thread .* before it has waited",
    "dependent writes early": rf"write of 'output', at {LINE} by thread .* before it has waited",
    "dependent copies early": rf"read of 'input', at {LINE} by thread .* before it has waited",
    "dependent reads as constant": rf"ld.global.nc of 'input', at {LINE}, which the kernel before",
    "dependent never waits": "no thread has waited for the kernel before this one",
    "wgmma bf16": "clean",
    "wgmma fp16": "clean",
    "wgmma of registers bf16": "clean",
    "wgmma of registers fp16": "clean",
    "wgmma of transposed tiles": "clean",
    "wgmma without fence": r"wgmma without a wgmma.fence before it, at emulation_checks.cpp:\d+",
    "wgmma without proxy fence": "wgmma reads .*, written by .* without a fence.proxy.async since",
    "wgmma not waited for": "exits with wgmmas never waited for",
    "wgmma waited for too little": "exits with wgmmas never waited for",
    "wgmma not committed": "exits with wgmmas never waited for",
    "operand overwritten under a wgmma": "(race|without a fence.proxy.async)",
    "wgmma in another mode": "wgmma of a tile that is not in the 128-byte mode",
    "banks: stride 1": "clean",
    "banks: stride 2": "clean",
    "banks: stride 32": "clean",
    "banks: stride 31": "clean",
    "sectors: stride 1": "clean",
    "sectors: stride 2": "clean",
    "sectors: stride 8": "clean",
    "trap": r"trap at emulation_checks.cpp:\d+",
    "too many threads": "a block has 1 to 1024 threads, got 1025",
    "empty grid": "the grid is empty or too large",
    "too many blocks in y": "the grid is empty or too large",
    "too many blocks in z": "the grid is empty or too large",
    "more shared memory than a card has": "needs 232449 bytes of shared .*limit is 232448",
}


@pytest.fixture(scope="session")
def program():
    return emulated.build_checks()


@needs_compiler
@pytest.mark.parametrize("policy", [0, 1, 2], ids=["fair", "run ahead", "adversarial"])
@pytest.mark.parametrize("name", CHECKS)
def test_check(program, name, policy):
    run = subprocess.run([program, name, str(policy)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    finding = run.stdout.strip()
    expected = CHECKS[name]
    assert finding == "clean" if expected == "clean" else re.search(expected, finding), finding


@needs_compiler
@pytest.mark.slow
def test_address_sanitizer_on_the_emulator():
    """Fibers confuse the sanitizer unless every switch is announced."""
    program = emulated.build_checks("address")
    for name, expected in CHECKS.items():
        if expected == "clean" and not name.startswith(("banks", "sectors")):
            run = subprocess.run([program, name, "2"], capture_output=True, text=True, timeout=60)
            assert run.stdout.strip() == "clean", (name, run.stdout, run.stderr)


@pytest.fixture(scope="module")
def instrumented():
    """The folder of a library that guards every local array of a kernel and counts the lines that
    run, and the op tests' run over it, once more. Neither hangs on the order of threads."""
    folder = emulated.BUILD / "emulation_address"
    for old in folder.glob("*.gcda"):
        old.unlink()
    library = emulated.build(folder=folder, instrument="address")
    # The sanitizer must be there before Python, and what throws exceptions before the sanitizer's
    # first look for it.
    runtime = [
        subprocess.check_output(["c++", f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libstdc++")
    ]
    tests = emulated.ROOT / "tests" / "ops"
    others = ("attention_tiles", "attention_lengths", "e4m3_cache", "moe_packed")
    own = {tests / f"test_{name}.py" for name in (*emulated.ops_with_kernels(), *others)}
    # A backward without a file of its own is tested with its op.
    files = sorted(file for file in own if file.exists())
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "loadfile"]
    command += ["-k", "emulated or tiles or hopper or KB"]
    command += [f"--emulated-library={library}", "--one-schedule", *files]
    environment = {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return folder, run


@needs_compiler
@pytest.mark.slow
def test_address_sanitizer_on_the_kernels(instrumented):
    _, run = instrumented
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def lines_of_refusals(source):
    """Python refuses first, or takes the twin; test_traffic_attention.py has the planner's own."""
    return {
        source.count("\n", 0, place) + 1
        for refusal in re.finditer(r"throw [^;]*;|default:", source)
        for place in range(*refusal.span())
    }


@needs_compiler
@pytest.mark.slow
def test_every_line_of_the_kernels_runs(instrumented):
    """What the op tests never execute, they do not test."""
    folder, run = instrumented
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    counts, around = {}, ("emulation", "binding")
    for data in folder.glob("*.gcda"):
        text = subprocess.check_output(["gcov", "--json-format", "--stdout", data], cwd=folder)
        for file in json.loads(text)["files"]:
            path = Path(folder, file["file"]).resolve()
            if path.is_relative_to(emulated.CSRC) and path.parent.name not in around:
                for line in file["lines"]:
                    key = path.relative_to(emulated.CSRC), line["line_number"]
                    counts[key] = counts.get(key, 0) + line["count"]
    assert len(counts) > 400
    sources = {path: (emulated.CSRC / path).read_text() for path, _ in counts}
    refused = {path: lines_of_refusals(source) for path, source in sources.items()}
    idle = [
        f"{path}:{line}: {sources[path].splitlines()[line - 1]}"
        for (path, line), count in sorted(counts.items())
        if not count and line not in refused[path]
    ]
    assert not idle, "\n".join(idle)
