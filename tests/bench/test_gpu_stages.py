"""The stages of bench/gpu_check.py are commands that their programs understand."""

import subprocess
import sys
from pathlib import Path

import bench_model
import bench_ops
import counters
import gpu_page
import gpu_stages
import pytest
import small_cases
from gpu_stages import STAGES
from support import emulated

from gemma4.cli import arguments as cli

# compute-sanitizer as far as it is used: it refuses other options, and runs the command.
COMPUTE_SANITIZER = """
import argparse, subprocess, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("--tool", "--error-exitcode", "--launch-timeout", "--report-api-errors"):
    parser.add_argument(name, required=True)
parser.add_argument("--kernel-name", required=True)
parser.add_argument("command", nargs=argparse.REMAINDER)
args = parser.parse_args()
assert args.tool in ("memcheck", "racecheck", "synccheck", "initcheck")
print("========= COMPUTE-SANITIZER", flush=True)
status = subprocess.run(args.command).returncode
{said}
sys.exit({status})
"""


def parse(words):
    """Has the program's own parser read a stage's command."""
    first, *rest = words
    if first == "compute-sanitizer":
        start = rest.index(sys.executable)
        text = COMPUTE_SANITIZER.partition("args =")[0]
        scope = {}
        exec(text, scope)
        scope["parser"].parse_args(rest[:start])
        return parse(rest[start:])
    assert first == sys.executable
    if rest[0] == "-m":
        return {"pip": parse_pip, "pytest": parse_pytest, "gemma4": cli.parse}[rest[1]](rest[2:])
    scripts = (bench_model, bench_ops, counters, small_cases)
    (script,) = (module for module in scripts if Path(module.__file__) == gpu_stages.ROOT / rest[0])
    return script.arguments().parse_args(rest[1:])


PIP = """
import sys
from pip._internal.commands import create_command
create_command(sys.argv[1]).parse_args(sys.argv[2:])
"""


def parse_pip(words):
    """In a process of its own, for pip puts a distutils of its own in place."""
    if subprocess.run([sys.executable, "-c", PIP, *words], capture_output=True).returncode:
        raise SystemExit(2)


def parse_pytest(words):
    from _pytest.config import _prepareconfig

    _prepareconfig(words)._ensure_unconfigure()


@pytest.mark.parametrize("name", STAGES)
def test_commands_are_understood(name, tmp_path):
    """By the programs' own parsers; what is misspelt is not."""
    words = STAGES[name].arguments(name, tmp_path)
    parse(words)
    option = next(i for i, word in reversed(list(enumerate(words))) if word.startswith("--"))
    words[option] = words[option][:-1] + "x"
    with pytest.raises((SystemExit, pytest.UsageError)):
        parse(words)


def test_bench_stages_name_ops():
    ops = set()
    for name in gpu_page.BENCHES:
        ops |= set(parse(STAGES[name].arguments(name, Path())).only)
    assert ops == {case.op for case in bench_ops.op_cases.all_cases(bench_ops.op_cases.BRIEF)}


def test_missing_modules_make_a_stage_slower(monkeypatch):
    monkeypatch.setattr(gpu_stages, "find_spec", lambda name: None)
    assert STAGES["tests"].slower() == ["xdist"]
    assert "-n" not in STAGES["tests"].arguments("tests", Path())


def test_files_with_cases_for_a_gpu():
    """And none that imports what a machine with a GPU may lack."""
    command = STAGES["tests"].arguments("tests", Path())
    chosen = {Path(word).stem for word in command if word.startswith("tests/")}
    ops = {op.removesuffix("_backward") for op in emulated.ops_with_kernels()}
    assert {f"test_{op}" for op in ops} <= chosen
    assert {"test_numerics", "test_attention_tiles", "test_flash_attn"} <= chosen
    assert not any(name.startswith(("test_plugin", "test_tools")) for name in chosen)
