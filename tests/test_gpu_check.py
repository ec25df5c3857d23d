"""What bench/gpu_check.py does around its stages, and its small cases under emulation."""

import json

import emulated
import gpu_check
import pytest
import small_cases
import static_report
import torch
from conftest import emulated_backend


@pytest.fixture
def stages(monkeypatch):
    commands = {
        "good": "echo said > {out}/made; echo in the log",
        "bad": "echo why >&2; exit 3",
        "slow": "sleep 60 & sleep 60",
    }
    monkeypatch.setattr(gpu_check, "STAGES", commands)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "LIMIT_SECONDS", 1)


def test_a_failing_stage_is_named(stages, tmp_path, capsys):
    out = tmp_path / "a folder"
    assert gpu_check.main(["--out", str(out)]) == 1
    *_, good, bad, slow, last = capsys.readouterr().out.splitlines()
    assert good.endswith("passed")
    assert bad.endswith("FAILED with 3: bad.log") and slow.endswith("FAILED with 124: slow.log")
    assert last == "failed: bad, slow"
    summary = json.loads((out / "summary.json").read_text())
    assert [row["status"] for row in summary.values()] == [0, 3, 124]
    assert (out / "made").read_text() == "said\n" and "in the log" in (out / "good.log").read_text()
    assert "why" in (out / "bad.log").read_text()
    assert (out / "slow.log").read_text().endswith("not done in 1 s\n")

    # One alone: the others' results stay.
    assert gpu_check.main(["good", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all passed"
    assert set(json.loads((out / "summary.json").read_text())) == {"good", "bad", "slow"}


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


def test_commands_exist(capsys):
    """Every file that a stage names is there, and its options are known."""
    assert gpu_check.main(["--list"]) == 0
    for line in capsys.readouterr().out.splitlines():
        for word in line.split():
            if word.endswith(".py"):
                assert (gpu_check.ROOT / word).is_file(), line


def test_small_cases():
    """Every twelfth, emulated; and a wrong result is named."""
    backend = emulated_backend()
    calls = list(static_report.launch_cases(backend))[::12]
    with emulated.one_schedule():
        assert list(small_cases.far(calls, backend.ops, "cpu")) == []

    class Wrong:
        rms_norm = staticmethod(lambda x, weight: x)

    norm = [call for call in calls if call[0] == "rms_norm"][:1]
    (line,) = small_cases.far(norm, Wrong, "cpu")
    assert line.startswith("rms_norm torch.bfloat16 [64, 512]: off by ")
