"""The page of a card says what its results' folder says; the profiler's counts are read right."""

import json
import os
import sys
from pathlib import Path

import counters
import gpu_page
import op_cases
import provenance
import pytest
import torch
from ledger import Ledger

import gemma4_kernels

KERNEL = (
    "void gemma4::attention_kernel<__nv_bfloat16, gemma4::AttentionTile<512, 64, 32, 2>, false>"
    "(gemma4::AttentionParams)"
)
OTHER = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>(int)"
VALUES = {
    "ns": "2,000,000",
    "sm_percent": "61.5",
    "dram_percent": "7.25",
    "l2_percent": "40",
    "tensor_percent": "55.1",
    "occupancy_percent": "12.5",
    "bank_conflicts": "1,000",
    "shared_wavefronts": "50,000",
    "local_load_sectors": "0",
    "local_store_sectors": "0",
}
# ncu as far as it is used here: it refuses options and metrics that it does not know, and writes
# its raw page as CSV where it is told to.
NCU = """
import argparse, csv, json, os, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("--page", "--print-units", "--profile-from-start", "--clock-control"):
    parser.add_argument(name, required=True)
for name in ("--target-processes", "--metrics", "--log-file"):
    parser.add_argument(name, required=True)
parser.add_argument("--csv", action="store_true", required=True)
parser.add_argument("command", nargs=argparse.REMAINDER)
args = parser.parse_args()
assert args.command[-2] == "--call" and args.page == "raw"
values, kernels, unknown = json.loads({given!r})
metrics = args.metrics.split(",")
with open(args.log_file, "w") as log:
    print("==PROF== Connected to process 1", file=log)
    for metric in metrics:
        if metric in unknown:
            name, _, suffix = metric.partition(".")
            sys.exit("==ERROR== Failed to find metric regex:^" + name + "(\\\\.(sum|avg))?$")
    out = csv.writer(log, quoting=csv.QUOTE_ALL)
    out.writerow(["ID", "Kernel Name", "Block Size", *metrics])
    out.writerow(["", "", "", *["unit"] * len(metrics)])
    for number, kernel in enumerate(kernels):
        out.writerow([number, kernel, "(256, 1, 1)", *(values[m] for m in metrics)])
sys.exit({status})
"""


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(status=0, kernels=(KERNEL, OTHER), unknown=(), **values):
        given = {metric: (VALUES | values)[key] for key, metric in counters.METRICS.items()}
        given = json.dumps([given, kernels, unknown])
        source = NCU.format(given=given, status=status)
        (folder / "ncu").write_text(f"#!{sys.executable}\n{source}")
        (folder / "ncu").chmod(0o755)

    return put


@pytest.fixture
def one_call(monkeypatch):
    monkeypatch.setattr(counters, "CALLS", {"attention": None})


def counted(tmp_path):
    ledger = Ledger(tmp_path / "counters.jsonl")
    counters.run(ledger)
    (row,) = ledger.rows()
    return row


def test_the_second_call_is_profiled(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    monkeypatch.setattr(gemma4_kernels, "softcap", lambda **inputs: seen.append(inputs))
    case = op_cases.Case("softcap", "small", lambda device: {"cap": 3.0}, bytes=1)
    monkeypatch.setattr(counters, "CALLS", {"a": lambda: case})
    counters.call("a")
    assert seen == [{"cap": 3.0}, "start", {"cap": 3.0}, "stop"]


@pytest.mark.parametrize("name", counters.CALLS)
def test_calls_are_of_public_functions(name):
    assert hasattr(gemma4_kernels, counters.CALLS[name]().op)


def test_counters(ncu, tmp_path):
    ncu()
    ledger = Ledger(tmp_path / "counters.jsonl")
    counters.run(ledger)
    assert [row["item"] for row in ledger.rows()] == list(counters.CALLS)
    row = ledger.rows()[0]
    assert row["outcome"] == "passed" and [k["kernel"] for k in row["kernels"]] == [KERNEL, OTHER]
    assert row["kernels"][0]["ns"] == 2e6 and row["kernels"][0]["sm_percent"] == 61.5
    before = ledger.file.read_text()
    counters.run(ledger)  # nothing is left
    assert ledger.file.read_text() == before


def test_metrics_that_a_profiler_does_not_know(ncu, one_call, tmp_path, capsys):
    ncu(unknown=[counters.METRICS["tensor_percent"], counters.METRICS["l2_percent"]])
    row = counted(tmp_path)
    assert row["outcome"] == "passed"
    assert row["kernels"][0]["tensor_percent"] is None and row["kernels"][0]["ns"] == 2e6
    assert "ncu does not know sm__pipe_tensor_cycles_active" in capsys.readouterr().out


def test_a_kernel_that_spills(ncu, one_call, tmp_path):
    ncu(local_store_sectors="32")
    row = counted(tmp_path)
    assert row["outcome"] == "failed" and row["why"] == f"local memory is used by {KERNEL}"


@pytest.mark.parametrize("status, kernels", [(1, [KERNEL]), (0, [])])
def test_a_profiler_that_fails(ncu, one_call, tmp_path, status, kernels):
    ncu(status=status, kernels=kernels)
    row = counted(tmp_path)
    assert row["outcome"] == "failed" and row["kernels"] == []
    assert row["why"].startswith("ncu ended with status 1" if status else "ncu counted nothing")


def test_without_a_profiler(one_call, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "No such file or directory: 'ncu'" in counted(tmp_path)["why"]


FACTS = {"card": "A Card, 80GB", "driver": "580.1", "toolkit": "13.0", "torch": "2.11.0"}
FACTS |= {"python": "3.12.3", "sources": "0123", "commit": None}
OP = {"kind": "op", "op": "attention_prefill", "case": "E4B full, 8192 tokens", "us": 2000.0}
OP |= {"floor_us": 700.0, "sdpa_takes": "math"}
PEERS = {
    "sdpa flash_attention": {"error": "RuntimeError: No available kernel."},
    "sdpa math": {"us": 9000.0},
    "flex_attention": {"us": 5000.0},
}
MACHINE = {"kind": "machine", "device": "A Card", "torch": "2.11.0", "version": "0.1"}
MACHINE |= {"commit": None, "copy_gb_s": 3000.0, "gemm_tflop_s": 700.0}
MODEL = {"model": "E4B", "dtype": "bfloat16", "vs_sdpa": [2, 3], "enabled_vs_sdpa": [1.5, 1.25]}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out" / "abc"
    folder.mkdir(parents=True)
    stages = {
        "build": {"outcome": "passed", "why": "slowly, without ninja", "seconds": 100.0},
        "check": {"outcome": "failed", "why": "ended with status 1; see check.log", "seconds": 9.5},
        "tests": {"outcome": "failed", "why": "1 failed: b", "seconds": 50.4},
        "racecheck": {"outcome": "skipped", "why": "without compute-sanitizer", "seconds": 0.0},
    }
    state = {"facts": FACTS, "build": {"archs": ["sm_90a"]}, "stages": stages}
    (folder / "state.json").write_text(json.dumps(state))
    checked = [{"name": "A Card", "kernels": {"geglu": None, "softcap": "off by | 3"}}]
    (folder / "check.log").write_text(f"$ gemma4 check\n{json.dumps(checked)}\n")
    (folder / "generate.json").write_text('{"decode": 1}\n{"decode": 2}\n')
    tests = Ledger(folder / "tests.jsonl")
    for item, outcome in (("a", "passed"), ("b", "failed"), ("c", "skipped"), ("d", "passed")):
        tests.start(item)
        tests.end(item, outcome, why="x > y" if outcome == "failed" else "")
    Ledger(folder / "prefill.jsonl").note(**MACHINE)
    Ledger(folder / "prefill.jsonl").end("p", "passed", **OP, peers=PEERS)
    Ledger(folder / "models.jsonl").end("E4B", "passed", **MODEL)
    numbers = {key: float(value.replace(",", "")) for key, value in VALUES.items()}
    kernels = [{"kernel": KERNEL, **numbers}, {"kernel": OTHER, **numbers, "ns": 10.0}]
    Ledger(folder / "counters.jsonl").end("attention", "passed", why="", kernels=kernels)
    return folder


def test_page(folder):
    file = gpu_page.write(folder)
    page, text = json.loads(file.with_suffix(".json").read_text()), file.read_text()
    assert gpu_page.markdown(page) == text
    assert page["items"]["tests"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert page["check"] == {"geglu": None, "softcap": "off by | 3"}
    assert page["generate"] == [{"decode": 2}]
    tile = "attention_kernel<bf16, AttentionTile<512, 64, 32, 2>, false>"
    for line in (
        "# A Card, 80GB",
        "sources 0123 of commit None, kernels for sm_90a.",
        "| build | the kernels compile for this card and load | passed: slowly, without ninja "
        "| - | 100 |",
        "| tests | the tests' cases for a GPU, against float64 | failed: 1 failed: b "
        "| 2 passed, 1 failed, 1 skipped | 50 |",
        "| racecheck | no race in shared memory | skipped: without compute-sanitizer | - | 0 |",
        "| memcheck | no access out of bounds or misaligned | not yet run | - | 0 |",
        "| all |  |  |  | 160 |",
        "| tests | b | x > y |",
        "`gemma4 check`: 1 of 2 kernels are right.",
        "- softcap: off by | 3",
        "| attention_prefill | E4B full, 8192 tokens | 2000.0 | 35% | 2.50 (flex_attention) "
        "| 4.50 (math) |",
        "| sdpa flash_attention | RuntimeError: No available kernel. | 1 |",
        f"| attention | `{tile}` | 2000.0 | 62% | 55% | 7% | 40% | 12% | 0.02 | 0 |",
        "| E4B | bfloat16 | 2.00 | 3.00 | 1.50 | 1.25 | - |",
    ):
        assert line in text.splitlines(), line
    assert "vectorized" not in text  # too short to matter


def test_page_of_a_folder_with_little(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"facts": FACTS, "build": None, "stages": {}}))
    text = gpu_page.write(tmp_path).read_text()
    assert "kernels for nothing" in text and text.count("not yet run") == len(gpu_page.STAGES)
    assert "## Each op" not in text and "## What failed" not in text


def test_committed(folder, tmp_path, monkeypatch, capsys):
    """The last results' page goes where it is committed; the commit is named if these are its
    sources."""
    monkeypatch.setattr(gpu_page, "RESULTS", tmp_path)
    monkeypatch.setattr(provenance, "sources_digest", lambda: "0123")
    monkeypatch.setattr(provenance, "commit", lambda: "deadbeef")
    older = folder.parent / "older"
    older.mkdir()
    (older / "state.json").write_text("{}")
    os.utime(older / "state.json", (1, 1))
    assert gpu_page.commit(folder.parent) == 0
    written = Path(capsys.readouterr().out.strip())
    assert (
        written == tmp_path / "gpu_a_card_80gb.md" and "of commit deadbeef" in written.read_text()
    )
    assert json.loads(written.with_suffix(".json").read_text())["facts"]["commit"] == "deadbeef"

    monkeypatch.setattr(provenance, "sources_digest", lambda: "4567")
    assert gpu_page.commit(folder.parent) == 0
    assert "of commit None" in written.read_text()
    assert gpu_page.commit(tmp_path / "nowhere") == 2
    assert "there are no results in" in capsys.readouterr().err
