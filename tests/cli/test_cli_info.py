"""`gemma4 info` and `gemma4 bench`."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import torch

import gemma4_kernels
from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig, demo


def test_info(run):
    code, out, err = run("info")
    build = gemma4_kernels.build_info()
    assert (code, err) == (0, "")
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert rows["gemma4-kernels"] == build["version"]
    assert rows["torch"] == torch.__version__
    assert rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (build["reason"] or "CUDA kernels") in rows["in use"]
    assert "rms_norm" in rows["ops"]
    assert "model" not in rows


def test_info_where_kernels_are_compiled(run, monkeypatch):
    build = dict(version="1", torch="2", cuda=True, reason=None, archs=["sm_90a"], device="A GPU")
    build["kernels"] = ["geglu", "rms_norm"]
    monkeypatch.setattr(gemma4_kernels, "build_info", lambda: {**build, "abi": "2.11"})
    _, out, _ = run("info")
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert rows["compiled for"] == "sm_90a"
    assert (rows["device"], rows["in use"], rows["abi"]) == ("A GPU", "CUDA kernels", "2.11")
    assert rows["kernels for"] == "geglu, rms_norm"
    build["device"] = None
    _, out, _ = run("info")
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert rows["in use"] == "eager torch: torch sees no CUDA device"


def test_info_on_a_model(run):
    code, out, _ = run("info", "--model", demo.path())
    assert code == 0
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    config = Gemma4TextConfig.from_pretrained(demo.path())
    parameters = Gemma4ForCausalLM.from_pretrained(demo.path()).num_parameters()
    assert rows["parameters"] == f"{parameters / 1e6:.2f} M"
    assert rows["layers"].startswith(f"{config.num_hidden_layers}, ")
    assert rows["dtype"] == config.dtype
    assert rows["released as"] == "-"
    assert "model.safetensors (" in rows["files"]


def test_info_knows_the_released_sizes(run, tmp_path):
    for name in ("E2B", "26B-A4B"):
        Gemma4TextConfig.preset(name).save_pretrained(tmp_path)
        assert re.search(rf"^released as +{name}$", run("info", "--model", tmp_path)[1], re.M)


def test_bench_reports_all_runs_but_the_warm_up(run, monkeypatch, tmp_path):
    # Seconds that each put takes to come, by run: a slow warm-up, then three measured runs.
    steps = iter([step for step in (100.0, 1.0, 4.0, 2.0) for _ in range(5)])
    now = 0.0

    def perf_counter():
        nonlocal now
        now += next(steps)
        return now

    monkeypatch.setattr("gemma4.cli.answer.time", SimpleNamespace(perf_counter=perf_counter))
    monkeypatch.setattr("gemma4.measure.copy_bandwidth", lambda device: 20e9)
    monkeypatch.setattr("gemma4.measure.gemm_rate", lambda device, dtype: 3e12)
    monkeypatch.setattr("gemma4.measure.decode_bytes", lambda model: 4e9)
    words = "--prompt-tokens 16 --new-tokens 4 --repeat 3 --json"
    code, out, err = run("bench", *words.split(), tmp_path / "rows")
    assert (code, err) == (0, "")
    title, head, *rows, rates, read, limit = out.splitlines()
    assert "bfloat16" in title and "3 runs" in title and title.startswith("demo: ")
    assert head.split() == ["tokens", "median", "least", "most"]
    assert [row.split() for row in rows] == [
        ["prompt", "16", "8.0", "4.0", "16.0", "tok/s"],
        ["decode", "4", "0.5", "0.2", "1.0", "tok/s"],
        ["first", "token", "1", "2000.0", "1000.0", "4000.0", "ms"],
    ]
    assert rates == "copies move 20.0 GB/s, matrix products make 3.000 TFLOP/s"
    assert read == "a token reads 4000.0 MB, 100% of it weights"
    assert limit == "its bytes alone allow 5.0 decode tok/s: 10% reached"
    (line,) = (tmp_path / "rows").read_text().splitlines()
    row = json.loads(line)
    assert row["decode_tok_s"] == [1.0, 0.25, 0.5] and row["launches_per_token"] is None
    assert row["bytes_per_token"] == 4e9 + 18 * 2 * (10 * 32 + 2 * 64) * 2


def test_bench_gives_no_limit_where_a_cache_may_hold_the_weights(run, monkeypatch, tmp_path):
    """And calls a folder by its name."""
    monkeypatch.setattr("gemma4.measure.copy_bandwidth", lambda device: 20e9)
    monkeypatch.setattr("gemma4.measure.gemm_rate", lambda device, dtype: 3e12)
    folder = shutil.copytree(demo.path(), tmp_path / "tiny-austen")
    words = ["--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1", "--json"]
    code, out, _ = run("bench", "--model", f"{folder}/.", *words, tmp_path / "rows")
    assert code == 0
    assert out.startswith("tiny-austen: ") and "bytes alone" not in out
    row = json.loads((tmp_path / "rows").read_text())
    assert (row["model"], row["decode_limit_tok_s"]) == ("tiny-austen", None)
