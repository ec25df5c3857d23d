"""What long runs note of their items, so that a later process goes on behind them."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import small_cases
from ledger import Ledger
from support import emulated
from support.marks import emulated_backend
from support.small_calls import launch_cases

from gemma4_kernels import opset

BENCH = Path(small_cases.__file__).parent


def test_items(tmp_path):
    ledger = Ledger(tmp_path / "made" / "rows.jsonl")
    assert ledger.rows() == [] and ledger.done() == set() and ledger.started() == []
    ledger.note(kind="machine")
    for item in ("a", "b", "c"):
        ledger.start(item)
    ledger.end("b", "failed", why="wrong")
    assert ledger.done() == {"b"} and ledger.started() == ["a", "c"]
    assert ledger.rows() == [
        {"kind": "machine"},
        {"item": "b", "outcome": "failed", "why": "wrong"},
    ]
    ledger.begin()
    ledger.start("c")
    assert ledger.started() == ["c"]  # a's process was another one


def test_half_a_line(tmp_path):
    """What a process that was killed leaves does not harm the line after it."""
    ledger = Ledger(tmp_path / "rows.jsonl")
    ledger.end("a", "passed")
    with ledger.file.open("a") as file:
        file.write('{"item": "b", "outc')
    ledger = Ledger(ledger.file)
    ledger.end("c", "passed")
    assert ledger.done() == {"a", "c"}


TESTS = """
import os, pytest

@pytest.mark.parametrize("i", range(4))
def test_of(i):
    if i == 1:
        assert False, "no one"
    if i == 2:
        os._exit(3)

def test_skipped():
    pytest.skip("not here")
"""


def run_tests(folder, *options):
    (folder / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "resumed_tests", "--ledger", "rows.jsonl"]
    env = os.environ | {"PYTHONPATH": str(BENCH)}
    env.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run([*command, *options], cwd=folder, env=env, capture_output=True, text=True)
    return done, Ledger(folder / "rows.jsonl")


def outcomes(ledger):
    return {row["item"].partition("::")[2]: row["outcome"] for row in ledger.rows()}


ALL = {
    "test_of[0]": "passed",
    "test_of[1]": "failed",
    "test_of[2]": "failed",
    "test_of[3]": "passed",
    "test_skipped": "skipped",
}


def test_tests_are_resumed(tmp_path):
    done, ledger = run_tests(tmp_path)
    assert done.returncode == 3
    assert outcomes(ledger) == {"test_of[0]": "passed", "test_of[1]": "failed"}
    assert ledger.rows()[1]["why"].startswith("AssertionError: no one")
    (died,) = ledger.started()
    assert died == "test_it.py::test_of[2]"
    ledger.end(died, "failed", why="its process ended with status 3")
    done, ledger = run_tests(tmp_path)
    assert done.returncode == 0 and outcomes(ledger) == ALL and "3 deselected" in done.stdout
    before = ledger.file.read_text()
    done, ledger = run_tests(tmp_path)
    assert done.returncode == 0 and ledger.file.read_text() == before


def test_tests_in_several_processes(tmp_path):
    """xdist puts another in the place of a worker that died, and names the test."""
    pytest.importorskip("xdist")
    done, ledger = run_tests(tmp_path, "-n", "1")
    assert done.returncode == 1 and outcomes(ledger) == ALL and ledger.started() == []
    assert "crashed while running" in next(r["why"] for r in ledger.rows() if "[2]" in r["item"])


def test_a_lost_gpu_ends_the_process(tmp_path):
    """The tests after it would all fail."""
    (tmp_path / "conftest.py").write_text("import resumed_tests as r; r.gpu_is_lost = lambda: True")
    done, ledger = run_tests(tmp_path)
    assert done.returncode == 75 and "has lost the GPU" in done.stdout
    assert outcomes(ledger) == {"test_of[0]": "passed", "test_of[1]": "failed"}
    assert ledger.started() == []


def test_small_cases(tmp_path):
    """Every twelfth, emulated."""
    calls = list(launch_cases(emulated_backend()))[::12]
    ledger = Ledger(tmp_path / "rows.jsonl")
    with emulated.one_schedule():
        small_cases.run(calls, ledger, "cpu")
    assert {row["outcome"] for row in ledger.rows()} == {"passed"}
    assert len(ledger.done()) == len(calls)


def test_a_wrong_small_case_is_named(tmp_path, monkeypatch, capsys):
    class Wrong:
        def serve(self, op, args):
            return True

        def call(self, op, args):
            if op.name == "geglu":
                raise RuntimeError("a trap")
            return args[0]

    emulated_backend()
    calls = {call[0]: call for call in islice(launch_cases(small_cases.EAGER), 100)}
    chosen = [calls[op] for op in ("geglu", "rms_norm", "softcap_argmax")]
    monkeypatch.setattr(opset, "kernels", Wrong())
    ledger = Ledger(tmp_path / "rows.jsonl")
    ledger.end("2: softcap_argmax, logits bfloat16 4x77", "passed")  # before
    small_cases.run(chosen, ledger, "cpu")
    trap, norm = ledger.rows()[1:]
    assert trap["outcome"] == "failed" and trap["why"] == "RuntimeError: a trap"
    assert norm["item"].startswith("1: rms_norm, x ") and "off by" in norm["why"]
    assert "FAILED: RuntimeError: a trap" in capsys.readouterr().out
