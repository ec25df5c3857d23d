"""What is committed as a table is what the committed results say."""

import json

import gpu_page
import report
import tables

ROW = {"kind": "op", "op": "attention_prefill", "device": "A GPU", "us": 20.0}
PEERS = {"sdpa math": {"us": 50.0}, "flash-attn": {"error": "ValueError: head_dim 512"}}
ROWS = [
    {
        "kind": "machine",
        "device": "A GPU",
        "torch": "2.13",
        "version": "0.1",
        "commit": "abc",
        "copy_gb_s": 3000.0,
        "gemm_tflop_s": 700.0,
    },
    ROW | {"case": "E4B", "floor_us": 15.0, "sdpa_takes": "math", "peers": PEERS},
    ROW | {"case": "31B", "floor_us": 10.0, "peers": {"eager": {"us": 10.0}}},
]
STATIC = json.loads((report.RESULTS / "static.json").read_text())


def test_static_md():
    assert (report.RESULTS / "static.md").read_text(encoding="utf-8") == report.static_md(STATIC)


def test_model_cpu_md():
    models = report.read_lines([report.RESULTS / "model_cpu.jsonl"])
    committed = (report.RESULTS / "model_cpu.md").read_text(encoding="utf-8")
    assert committed == report.model_md(models)


def test_readme_numbers():
    readme = report.README.read_text(encoding="utf-8")
    assert readme == report.with_numbers(readme), "run python bench/report.py"


def test_no_gpu_is_said_while_it_holds(tmp_path, monkeypatch):
    for file in ("static.json", "model_cpu.jsonl"):
        (tmp_path / file).write_text((report.RESULTS / file).read_text())
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.NO_GPU in report.numbers()
    (tmp_path / "ops_gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    numbers = report.numbers()
    assert report.NO_GPU not in numbers
    assert "A GPU, torch 2.13, 0.1 at abc: copies move 3000.0 GB/s" in numbers
    assert "| attention_prefill | 2 | 62% | 50% | 1.50 | 0.50 |" in numbers

    # Of a page too, which is named.
    (tmp_path / "ops_gpu.jsonl").rename(tmp_path / "elsewhere")
    (tmp_path / "gpu_a.json").write_text(json.dumps({"ops": ROWS}))
    told = "their peers: `bench/results/gpu_a.md`.\n"
    assert report.numbers() == numbers.replace("\n\n| op", f"\nCase by case, with {told}\n| op", 1)


def test_committed_pages():
    for file in report.RESULTS.glob("gpu_*.json"):
        page = gpu_page.markdown(json.loads(file.read_text()))
        assert file.with_suffix(".md").read_text(encoding="utf-8") == page


def test_ops_table():
    """Ratios, and of attention the backend that sdpa takes by itself."""
    lines = tables.ops_table(ROWS).splitlines()[2:]
    assert lines == [
        "| attention_prefill | E4B | 20.0 | 75% | 2.50 (sdpa math) | 2.50 (math) |",
        "| attention_prefill | 31B | 20.0 | 50% | 0.50 (eager) | - |",
    ]
    assert "| flash-attn | ValueError: head_dim 512 | 1 |" in tables.refusals_table(ROWS)
