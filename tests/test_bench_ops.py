"""The op benchmark measures every op, on shapes it counts right; no test depends on speed."""

import json

import bench_ops
import emulated
import limits
import peers
import pytest
import torch

from gemma4 import measure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    timed = measure.time_calls
    monkeypatch.setattr(measure, "time_calls", lambda *a: timed(*a[:2], *a[2:3], seconds=0.0))


@pytest.mark.parametrize("sizes", [bench_ops.GPU, bench_ops.CPU], ids=["gpu", "cpu"])
def test_every_op_with_a_kernel_is_measured(sizes):
    measured = {case.op for case in bench_ops.cases(sizes)}
    assert measured == set(emulated.ops_with_kernels())


SMALL = {
    "rms_norm": lambda: bench_ops.rms_norm("E2B", 2),
    "qkv_norm_rope_cache": lambda: bench_ops.qkv_norm_rope_cache("E2B", 2),
    "prefill": lambda: bench_ops.attention_prefill("E2B", "sliding_attention", 20),
    "prefill backward": lambda: bench_ops.attention_prefill_backward("E2B", "full_attention", 20),
    "decode": lambda: bench_ops.attention_decode("E2B", "full_attention", 2, 40),
    "decode, a ring not full": lambda: bench_ops.attention_decode(
        "E2B", "sliding_attention", 2, 40
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_a_case(case):
    """Peers that can do it agree with ours; the others say why not."""
    row = bench_ops.measure_case(SMALL[case](), CPU, copy=1e9, gemm=1e12)
    assert row["p20_us"] <= row["us"] <= row["p80_us"] and row["floor_us"] > 0
    found = row["peers"]
    able = {"eager", "sdpa flash_attention", "sdpa math"} & set(found)
    assert able and all(found[name]["difference"] < 0.01 for name in able)
    assert all("error" in found[name] for name in set(found) - able)


def test_a_peer_that_computes_something_else_gets_no_time(monkeypatch):
    wrong = [("wrong", lambda args, inputs: lambda: torch.zeros_like(inputs["x"]))]
    monkeypatch.setattr(peers, "of", lambda op, device: wrong)
    row = bench_ops.measure_case(bench_ops.rms_norm("E2B", 2), CPU, 1e9, 1e12)
    assert "differs by 1" in row["peers"]["wrong"]["error"] and "us" not in row["peers"]["wrong"]


def test_grouped_mm_agrees():
    case = bench_ops.moe_experts("tiny", 6)
    row = bench_ops.measure_case(case, CPU, 1e9, 1e12)
    assert row["peers"]["torch grouped_mm"]["difference"] < 0.02


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    import dataclasses

    sizes = dict(hidden_size=64, moe_intermediate_size=32, num_experts=16, top_k_experts=4)
    config = dataclasses.replace(limits.MODELS["26B-A4B"], **sizes)
    monkeypatch.setitem(limits.MODELS, "tiny", config)


def test_a_run(tmp_path, monkeypatch, capsys):
    """The first line says what the machine is; a case that fails is a line, and the exit code."""
    sizes = bench_ops.Sizes((1,), (), (), (), (), ("tiny",))
    monkeypatch.setattr(bench_ops, "CPU", sizes)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "gemm_rate", lambda device: 1e12)
    out = tmp_path / "rows.jsonl"
    command = ["bench_ops", "--cpu", "--out", str(out), "--only", "rms_norm", "add_rms_norm"]
    monkeypatch.setattr("sys.argv", command)
    assert bench_ops.main() == 0
    first, *rows = map(json.loads, out.read_text().splitlines())
    assert first["kind"] == "machine" and first["copy_gb_s"] == 1.0
    assert [(row["kind"], row["op"]) for row in rows] == [
        ("op", "rms_norm"),
        ("op", "add_rms_norm"),
    ]

    def fails(*args):
        raise RuntimeError("out of order")

    monkeypatch.setattr(bench_ops, "measure_case", fails)
    assert bench_ops.main() == 1
    _, *rows = map(json.loads, out.read_text().splitlines())
    assert {row["why"] for row in rows} == {"RuntimeError: out of order"}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_ops", "--out", "rows.jsonl"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        bench_ops.main()
    assert error.value.code == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
