"""What is committed as a table is what the committed results say."""

import json

import report

STATIC = json.loads((report.RESULTS / "static.json").read_text())


def test_static_md():
    assert (report.RESULTS / "static.md").read_text(encoding="utf-8") == report.static_md(STATIC)


def test_readme_numbers():
    readme = report.README.read_text(encoding="utf-8")
    assert readme == report.with_numbers(readme), "run python bench/report.py"


def test_no_gpu_is_said_while_it_holds(tmp_path, monkeypatch):
    for file in ("static.json", "model_cpu.jsonl"):
        (tmp_path / file).write_text((report.RESULTS / file).read_text())
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.NO_GPU in report.numbers()
    peers = {"sdpa": {"us": 50.0}, "flash_attn": {"error": "head_dim 512"}}
    row = {"kind": "op", "op": "attention_prefill", "case": "E4B", "device": "A GPU"}
    row |= {"us": 20.0, "floor_us": 15.0, "peers": peers}
    machine = {"kind": "machine", "device": "A GPU", "torch": "2.13", "version": "0.1"}
    machine |= {"commit": "abc", "copy_gb_s": 3000.0, "gemm_tflop_s": 700.0}
    (tmp_path / "ops_gpu.jsonl").write_text(json.dumps(machine) + "\n" + json.dumps(row) + "\n")
    numbers = report.numbers()
    assert report.NO_GPU not in numbers
    assert "A GPU, torch 2.13, 0.1 at abc: copies move 3000.0 GB/s" in numbers
    assert "| attention_prefill | E4B | 20.0 | 75% | 2.50 (sdpa) |" in numbers
