"""The op benchmark measures every op, on shapes it counts right; no test depends on speed."""

import json

import bench_ops
import limits
import op_cases
import peers
import pytest
import torch
from ledger import Ledger
from support import emulated

from gemma4 import measure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    timed = measure.time_calls
    monkeypatch.setattr(measure, "time_calls", lambda *a: timed(*a[:2], *a[2:3], seconds=0.0))


@pytest.mark.parametrize("sizes", ["ALL", "BRIEF", "CPU"])
def test_every_op_with_a_kernel_is_measured(sizes):
    """Each of its cases under a name of its own, by which a later run knows it."""
    cases = list(op_cases.all_cases(getattr(op_cases, sizes)))
    assert {case.op for case in cases} == set(emulated.ops_with_kernels())
    assert len({case.item for case in cases}) == len(cases)


SMALL = {
    "rms_norm": lambda: op_cases.row("rms_norm", "E2B", 2),
    "qkv_norm_rope_cache": lambda: op_cases.row("qkv_norm_rope_cache", "E2B", 2),
    "prefill": lambda: op_cases.attention_prefill("E2B", "sliding_attention", 20),
    "prefill backward": lambda: op_cases.attention_prefill_backward("E2B", "full_attention", 20),
    "decode": lambda: op_cases.attention_decode("E2B", "full_attention", 2, 40),
    "one new token": lambda: op_cases.qkv_attention_decode("E2B", "full_attention", 2, 40),
    "decode, a ring not full": lambda: op_cases.attention_decode("E2B", "sliding_attention", 2, 40),
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
    row = bench_ops.measure_case(op_cases.row("rms_norm", "E2B", 2), CPU, 1e9, 1e12)
    assert "differs by 1" in row["peers"]["wrong"]["error"] and "us" not in row["peers"]["wrong"]


def test_grouped_mm_agrees():
    case = op_cases.moe_experts("tiny", 6)
    row = bench_ops.measure_case(case, CPU, 1e9, 1e12)
    assert row["peers"]["torch grouped_mm"]["difference"] < 0.02


@pytest.mark.parametrize(
    "case",
    [
        lambda: op_cases.packed_moe_experts("tiny", 3),
        lambda: op_cases.coded_attention_decode("E2B", "full_attention", 1, 40),
    ],
    ids=["experts in 4 bits", "keys in e4m3"],
)
def test_codes_are_timed_beside_eager_alone(case):
    row = bench_ops.measure_case(case(), CPU, 1e9, 1e12)
    assert list(row["peers"]) == ["eager"] and row["peers"]["eager"]["difference"] == 0


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    import dataclasses

    sizes = dict(hidden_size=64, moe_intermediate_size=64, num_experts=16, top_k_experts=4)
    config = dataclasses.replace(limits.MODELS["26B-A4B"], **sizes)
    monkeypatch.setitem(limits.MODELS, "tiny", config)


def test_a_run(tmp_path, monkeypatch, capsys):
    """The first line says what the machine is; a case that fails is a line, and the exit code."""
    sizes = op_cases.Sizes((1,), (), (), (), (), ("tiny",))
    monkeypatch.setattr(op_cases, "CPU", sizes)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "gemm_rate", lambda device: 1e12)
    out = tmp_path / "rows.jsonl"
    command = ["bench_ops", "--cpu", "--out", str(out), "--only", "rms_norm", "add_rms_norm"]
    monkeypatch.setattr("sys.argv", command)
    assert bench_ops.main() == 0
    first, *rows = Ledger(out).rows()
    assert first["kind"] == "machine" and first["copy_gb_s"] == 1.0
    assert [(row["kind"], row["op"]) for row in rows] == [
        ("op", "rms_norm"),
        ("op", "add_rms_norm"),
    ]

    def fails(*args):
        raise RuntimeError("out of order")

    # What is done is not measured again, and what was begun is.
    before = out.read_text()
    monkeypatch.setattr(bench_ops, "measure_case", fails)
    assert bench_ops.main() == 0 and out.read_text() == before

    command[-1:] = ["geglu"]
    assert bench_ops.main() == 1
    assert out.read_text().startswith(before)
    machine, begun, row = map(json.loads, out.read_text()[len(before) :].splitlines())
    assert machine["kind"] == "machine" and begun["outcome"] == "started"
    assert row["why"] == "RuntimeError: out of order" and row["item"] == begun["item"]


def test_a_lost_gpu_ends_the_run(tmp_path, monkeypatch):
    """A peer's fault takes the context along: our numbers stay, and a later process goes on."""
    lost, cases = [], iter([False, True, True, True])
    monkeypatch.setattr(bench_ops, "gpu_is_lost", lambda: next(cases))
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(measure, "gemm_rate", lambda device: 1e12)

    def dies(args, inputs):
        raise RuntimeError("illegal memory access")

    all_peers = [("good", lambda a, i: lambda: i["x"]), ("bad", dies), ("never", lost.append)]
    monkeypatch.setattr(peers, "of", lambda op, device: all_peers)
    monkeypatch.setattr(peers, "difference", lambda ours, theirs: 0.0)
    sizes = op_cases.Sizes((1, 2), (), (), (), (), ("tiny",))
    rows = list(bench_ops.run(sizes, CPU, ["rms_norm"], Ledger(tmp_path / "rows.jsonl")))
    assert [row["kind"] for row in rows] == ["machine", "op"] and not lost
    assert "us" in rows[1]["peers"]["good"]
    assert rows[1]["peers"]["bad"] == {"error": "RuntimeError: illegal memory access"}


def test_the_backend_that_sdpa_takes():
    """Of a CPU's two, flash has no mask of a window; what is differentiated is its own question."""
    prefill = op_cases.attention_prefill("E2B", "sliding_attention", 600).make(CPU)
    assert peers.sdpa_takes("attention_prefill", prefill | {"window": 0}) == "flash_attention"
    backward = op_cases.attention_prefill_backward("E2B", "full_attention", 20)
    row = bench_ops.measure_case(backward, CPU, 1e9, 1e12)
    assert row["sdpa_takes"] == "flash_attention"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_ops", "--out", "rows.jsonl"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        bench_ops.main()
    assert error.value.code == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
