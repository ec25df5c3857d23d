"""What bench/gpu_check.py does around its stages: going on, giving up, skipping, and its page."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_page
import provenance
import pytest
import torch
from gpu_stages import STAGES, Stage
from ledger import Ledger
from test_gpu_stages import COMPUTE_SANITIZER, parse_pip

FACTS = {*gpu_check.KEY, "python", "commit"}
BENCH = Path(gpu_check.__file__).parent


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts a program on the PATH: a script of this interpreter."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(name, source):
        (folder / name).write_text(f"#!{sys.executable}\n{source}")
        (folder / name).chmod(0o755)

    put("nvidia-smi", "print('580.1')")
    return put


@pytest.fixture
def machine(programs, monkeypatch):
    """One with a card; the stages must be given."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card 80GB")
    monkeypatch.setattr(provenance, "sources_digest", lambda: "0123")
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0)


WORK = """
import os, sys, time
sys.path.insert(0, {bench!r})
from ledger import Ledger
ledger = Ledger(__import__("pathlib").Path(sys.argv[1]))
for item in "abcd":
    if item in ledger.done():
        continue
    print(item, flush=True)
    ledger.start(item)
    {body}
    ledger.end(item, "passed")
"""


@pytest.fixture
def stages(tmp_path, machine, monkeypatch):
    """Replaces the stages: each by the body of a loop over four items, or by a Stage."""

    def put(**bodies):
        made = {}
        for name, body in bodies.items():
            if isinstance(body, str):
                script = tmp_path / f"{name}.py"
                script.write_text(WORK.format(bench=str(BENCH), body=body))
                body = Stage(f"that {name} works", f"{{python}} {script} {{ledger}}")
            made[name] = body
        for module in (gpu_check, gpu_page):
            monkeypatch.setattr(module, "STAGES", made)
        return made

    return put


def results(out):
    (folder,) = (path.parent for path in out.glob("*/state.json"))
    return folder, json.loads((folder / "state.json").read_text())["stages"]


def test_outcomes(stages, tmp_path, capsys):
    """What failed is named, with the cases; the others run all the same."""
    stages(
        good="pass",
        wrong="if item == 'b': ledger.end(item, 'failed', why='off'); continue",
        bad=Stage("nothing", "{python} -c 'raise SystemExit(3)'"),
        idle=Stage("nothing", "{python} -c '' {ledger}"),
        absent=Stage("nothing", "no-such-tool", programs=("no-such-tool",), modules=("nomodule",)),
    )
    out = tmp_path / "a folder"
    assert gpu_check.main(["--out", str(out)]) == 1
    *lines, page = capsys.readouterr().out.splitlines()
    assert lines == [
        "good: passed",
        "wrong: failed: 1 failed: b",
        "bad: failed: ended with status 3; see bad.log",
        "idle: failed: no case was run; see idle.log",
        "absent: skipped: without no-such-tool, nomodule",
    ]
    folder, found = results(out)
    assert page == str(folder / "page.md")
    assert found["absent"]["outcome"] == "skipped" and found["good"]["seconds"] > 0
    assert (folder / "good.log").read_text().startswith("$ ")
    text = Path(page).read_text()
    assert "| absent | nothing | skipped: without no-such-tool, nomodule | - | 0 |" in text
    assert "| wrong | b | off |" in text

    # What is done is not done again; what was skipped is looked at again.
    assert gpu_check.main(["--out", str(out)]) == 1
    assert capsys.readouterr().out.startswith("absent: skipped")
    # What is named is, from its beginning.
    assert gpu_check.main(["good", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("good: passed")
    assert len(Ledger(folder / "good.jsonl").rows()) == 4


def test_a_call_ends_in_time_and_the_next_goes_on(stages, tmp_path, capsys):
    stages(slow="time.sleep(0.6)", last="pass")
    call = ["--out", str(tmp_path / "out"), "--minutes", str(1.5 / 60)]
    calls = 1
    while (status := gpu_check.main(call)) == gpu_check.MORE_TO_DO:
        calls += 1
        assert calls < 8
    assert status == 0 and calls > 1
    folder, found = results(tmp_path / "out")
    assert [row["outcome"] for row in found.values()] == ["passed", "passed"]
    # Each item was ended once, and the seconds of all calls count.
    assert [row["item"] for row in Ledger(folder / "slow.jsonl").rows()] == list("abcd")
    assert found["slow"]["seconds"] > 2.4
    assert "slow: unfinished: " in capsys.readouterr().out


def test_deaths_and_hangs(stages, tmp_path, capsys):
    """The item that a process dies or hangs at has failed; another process takes the others."""
    sleeper = tmp_path / "pid"
    hang = (
        f"item == 'c' and (open({str(sleeper)!r}, 'w').write(str(__import__('subprocess').Popen("
        "['sleep', '60']).pid)), time.sleep(60))"
    )
    made = stages(dies="item in 'bc' and os.kill(os.getpid(), 11)", hangs=hang)
    made["hangs"] = dataclasses.replace(made["hangs"], quiet_seconds=1)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out.splitlines()[:2] == [
        "dies: failed: 2 failed: b, c",
        "hangs: failed: 1 failed: c",
    ]
    folder, _ = results(tmp_path / "out")
    for name, why in (("dies", "its process ended with status -11"), ("hangs", "its process hung")):
        rows = Ledger(folder / f"{name}.jsonl").rows()
        assert [row["item"] for row in rows] == list("abcd")
        assert rows[2] == {"item": "c", "outcome": "failed", "why": why}
    assert "nothing was said for 1 s" in (folder / "hangs.log").read_text()
    assert not is_running(int(sleeper.read_text()))


def is_running(pid):
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


DRIVER = """
import signal, sys, types
sys.path[:0] = [{bench!r}]
cuda = types.SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "A Card 80GB")
sys.modules["torch"] = types.SimpleNamespace(__version__={torch!r}, cuda=cuda)
import gpu_check, gpu_page, gpu_stages, provenance
provenance.sources_digest = lambda: "0123"
stage = gpu_stages.Stage("that it works", "{{python}} {script} {{ledger}}")
gpu_check.STAGES = gpu_page.STAGES = {{"slow": stage}}
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
sys.exit(gpu_check.main(["--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killed(stages, tmp_path, how):
    """What it started ends where it can see to it; a later call goes on in either case."""
    stages(slow="ledger.note(pid=os.getpid()); item == 'b' and time.sleep(4)")
    driver, out = tmp_path / "driver.py", tmp_path / "out"
    driver.write_text(
        DRIVER.format(bench=str(BENCH), script=tmp_path / "slow.py", torch=str(torch.__version__))
    )
    process = subprocess.Popen([sys.executable, driver, out])
    while not (files := list(out.glob("*/slow.jsonl"))) or "b" not in Ledger(files[0]).started():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(how)
    process.wait()
    pid = Ledger(files[0]).rows()[-1]["pid"]
    if how == signal.SIGTERM:
        assert process.returncode == 143 and not is_running(pid)
    else:
        os.kill(pid, signal.SIGKILL)
    assert gpu_check.main(["--out", str(out)]) == 0
    items = [row["item"] for row in Ledger(files[0]).rows() if "item" in row]
    assert items == list("abcd")


def test_other_sources_and_other_cards_have_results_of_their_own(stages, tmp_path, monkeypatch):
    stages(good="pass")
    call = ["--out", str(tmp_path / "out")]
    assert gpu_check.main(call) == 0
    monkeypatch.setattr(provenance, "sources_digest", lambda: "4567")
    assert gpu_check.main(call) == 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another")
    assert gpu_check.main(call) == 0
    assert len(list((tmp_path / "out").glob("*/good.jsonl"))) == 3


def test_the_build(stages, tmp_path, monkeypatch, capsys):
    """It comes again where the library is not the one that was built, and nothing comes after one
    that fails."""
    root = tmp_path / "root"
    (root / "gemma4_kernels").mkdir(parents=True)
    script = tmp_path / "compile.py"
    script.write_text(
        f"from pathlib import Path; folder = Path({str(root)!r}) / 'gemma4_kernels'\n"
        "number = len(list(folder.iterdir()))\n"
        "(folder / '_C.abi3.so').write_text('')\n"
        '(folder / \'_build.json\').write_text(\'{"archs": ["sm_90a"], "n": %d}\' % number)\n'
    )
    stages(build=Stage("it compiles", f"{{python}} {script}"), good="pass")
    monkeypatch.setattr(gpu_check, "ROOT", root)
    noted = root / "gemma4_kernels" / "_build.json"
    monkeypatch.setattr(gpu_check, "check_build", lambda: (json.loads(noted.read_text()), ""))
    call = ["--out", str(tmp_path / "out")]
    assert gpu_check.main(call) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["build: passed", "good: passed"]
    assert gpu_check.main(call) == 0
    assert "build:" not in capsys.readouterr().out
    (root / "gemma4_kernels" / "_C.abi3.so").unlink()
    assert gpu_check.main(call) == 0
    assert capsys.readouterr().out.startswith("build: passed\n")

    (root / "gemma4_kernels" / "_C.abi3.so").unlink()
    monkeypatch.setattr(gpu_check, "check_build", lambda: (None, "no code for this card"))
    assert gpu_check.main([*call, "build", "good"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "build: failed: no code for this card" and len(out) == 2


def test_a_build_that_does_not_load():
    """This source tree's own, where there is no card."""
    made, why = gpu_check.check_build()
    assert made is None and why


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_sanitizer(stages, programs, tmp_path, capsys, tool):
    made = stages(work="time.sleep(0.3)")
    command = STAGES[tool].command.replace("bench/small_cases.py --out", str(tmp_path / "work.py"))
    made[tool] = dataclasses.replace(STAGES[tool], command=command)
    clean = f"print('========= {tool.upper()} SUMMARY: 0 hazards displayed (0 errors)')"
    programs("compute-sanitizer", COMPUTE_SANITIZER.format(said=clean, status="status"))
    call = [tool, "--out", str(tmp_path / "out")]
    assert gpu_check.main(call) == 0

    # It says what it found at once and its status in the end; the piece is cut between them.
    found = "print('========= Invalid __global__ read of size 4 bytes', flush=True)"
    says = COMPUTE_SANITIZER.replace("status = ", f"{found}\nstatus = ")
    programs("compute-sanitizer", says.format(said="", status="9"))
    capsys.readouterr()
    assert gpu_check.main([*call, "--minutes", str(0.7 / 60)]) == gpu_check.MORE_TO_DO
    programs("compute-sanitizer", COMPUTE_SANITIZER.format(said=clean, status="status"))
    capsys.readouterr()
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    first = [x for x in capsys.readouterr().out.splitlines() if x.startswith(tool)]
    assert first == [f"{tool}: failed: Invalid __global__ read of size 4 bytes; see {tool}.log"]


def test_a_sanitizer_without_a_gpu_to_watch(stages, programs, tmp_path, capsys):
    """Its status is 0 then."""
    made = stages(work="pass")
    command = STAGES["memcheck"].command.replace(
        "bench/small_cases.py --out", str(tmp_path / "work.py")
    )
    made["memcheck"] = dataclasses.replace(STAGES["memcheck"], command=command)
    said = "print('========= Target application terminated before first instrumented API call')"
    programs("compute-sanitizer", COMPUTE_SANITIZER.format(said=said, status="0"))
    assert gpu_check.main(["memcheck", "--out", str(tmp_path / "out")]) == 1
    assert "memcheck: failed: Target application terminated" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == "gpu_check needs a CUDA device, and torch finds none\n"
    assert not (tmp_path / "out").exists()


def test_stages_that_do_not_exist(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["nothing"])
    assert "got nothing" in capsys.readouterr().err


def test_list(capsys):
    assert gpu_check.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(STAGES)


def test_wheels(stages, tmp_path, monkeypatch, capsys):
    """They are installed without asking an index; else nothing is run."""
    stages(good="pass")
    wheels, asked = tmp_path / "wheels", []
    wheels.mkdir()
    (wheels / "some-1-py3-none-any.whl").touch()

    def install(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, returncode=len(asked) - 1)

    monkeypatch.setattr(gpu_check.compiled, "toolkit", lambda: None)  # which asks nvcc
    monkeypatch.setattr(gpu_check.subprocess, "run", install)
    monkeypatch.setattr(provenance, "facts", lambda: dict.fromkeys(FACTS, "a"))
    call = ["--out", str(tmp_path / "out"), "--wheels", str(wheels)]
    assert gpu_check.main(call) == 0
    assert "--no-index" in asked[0] and asked[0][-1] == wheels / "some-1-py3-none-any.whl"
    assert gpu_check.main(call) == 2
    monkeypatch.undo()
    parse_pip(list(map(str, asked[0][3:])))


def test_sources_digest(tmp_path, monkeypatch):
    """Of a copy too; not of what is made while running."""
    assert len(provenance.sources_digest()) == 16
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for file in ("setup.py", "bench/a.py", "csrc/norm/a.cuh"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    before = provenance.sources_digest()
    for file in ("bench/__pycache__/a.py", "gemma4_kernels/_build.json", "bench/results/a.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    assert provenance.sources_digest() == before
    (tmp_path / "csrc/norm/a.cuh").write_text("2")
    assert provenance.sources_digest() != before


def test_facts(machine):
    facts = provenance.facts()
    assert facts["card"] == "A Card 80GB" and facts["driver"] == "580.1"
    assert facts["torch"] == torch.__version__ and set(facts) == FACTS


def test_environment(tmp_path, monkeypatch):
    """The sources first, then what was there; a failed check is noted for the user alone."""
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    given = gpu_check.environment(STAGES["tests"], tmp_path)
    paths = given["PYTHONPATH"].split(os.pathsep)
    assert paths[1:] == [
        *(str(gpu_check.ROOT / x) for x in ("python", "bench", "tests")),
        "/elsewhere",
    ]
    assert given["GEMMA4_KERNELS_REQUIRE_CUDA"] == "1"
    assert given["XDG_CACHE_HOME"] == str(tmp_path / "cache")
    assert gpu_check.environment(STAGES["check"], tmp_path)["XDG_CACHE_HOME"] != str(
        tmp_path / "cache"
    )
