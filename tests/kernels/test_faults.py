"""Every fault is put into a copy of the kernels, and a test of the kernel must catch it.

A fault that survives is a missing test. That these tests pass where there is no fault, the other
runs of them say.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import FAULTS
from support import emulated
from support.marks import needs_compiler

CASES = [
    (op, test, n)
    for op, tests in FAULTS.items()
    for test, faults in tests.items()
    for n in range(len(faults))
]


def run_test(case, folder):
    """The case's test over a library with the case's fault in it."""
    op, test, n = case
    path, old, new = FAULTS[op][test][n]
    csrc = folder / "csrc"
    shutil.copytree(emulated.CSRC, csrc)
    (csrc / path).write_text((csrc / path).read_text().replace(old, new))
    return run_tests(emulated.rebuild(op, csrc, folder), [node(op, test)], folder)


def node(op, test):
    """The test's file, in its room, and its name there."""
    file, _, name = test.rpartition("::")
    (path,) = (emulated.ROOT / "tests").glob(f"*/{file or f'test_{op}.py'}")
    return f"{path}::{name}"


own = threading.local()


def run_tests(library, tests, folder):
    """pytest's exit status and output, slow tests too, from forks of this thread's process."""
    if not hasattr(own, "forks"):
        command = [sys.executable, emulated.ROOT / "tests" / "support" / "pytest_forks.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        own.forks = subprocess.Popen(command, env=environment, **pipes)
    output = folder / "output"
    line = [output, "-m", "", f"--emulated-library={library}", *tests]
    print(json.dumps([str(word) for word in line]), file=own.forks.stdin, flush=True)
    status = int(own.forks.stdout.readline())
    return status, output.read_text()


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory):
    """Under way, as many at once as there are processors, for the faults that this run asks for."""
    emulated.build()
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [call.params["case"] for call in chosen if call and "case" in call.params]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            case: pool.submit(run_test, case, tmp_path_factory.mktemp("fault"))
            for case in CASES
            if case in cases
        }
        pool.shutdown(cancel_futures=True)


def test_every_fault_has_one_place():
    """A stale snippet changes nothing, one that stands twice changes what its test does not run."""
    texts = {path: (emulated.CSRC / path).read_text() for path in emulated.CSRC.rglob("*.*")}
    wrong = [
        f"{op}: {path} has {old!r} {texts[emulated.CSRC / path].count(old)} times"
        for op, tests in FAULTS.items()
        for faults in tests.values()
        for path, old, new in faults
        if texts[emulated.CSRC / path].count(old) != 1 or old == new
    ]
    assert not wrong, "\n".join(wrong)


def test_every_fault_has_a_test():
    """A name that no test has would be an error of pytest's for each of its faults, much later."""
    named = {node(op, test).partition("[")[0] for op, tests in FAULTS.items() for test in tests}
    for path, _, function in (name.partition("::") for name in sorted(named)):
        assert f"def {function}(" in Path(path).read_text(), f"{path} has no {function}"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_fault_is_caught(runs, case):
    op, test, n = case
    path, old, new = FAULTS[op][test][n]
    status, output = runs[case].result()
    assert status == 1, f"survives: {path}: {old!r} -> {new!r}\n{output[-2000:]}"
    assert "1 failed" in output, output[-2000:]
