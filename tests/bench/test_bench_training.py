"""The training benchmark runs every way on the same weights; no test depends on speed."""

import bench_model
import bench_training
import pytest
from ledger import Ledger
from support import tiny

from gemma4 import Gemma4TextConfig

TINY = bench_model.options(Gemma4TextConfig(**tiny.MOE | dict(moe_intermediate_size=32)))


@pytest.mark.parametrize("options", [[], ["--lora", "--checkpointing"]], ids=["all", "LoRA"])
def test_a_run(options, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(bench_training, "CONFIGS", {"tiny": TINY})
    argv = ["bench_training", "--out", str(out), "--only", "tiny", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*argv, "--repeat", "1", "--tokens", "64", *options])
    bench_training.main()
    (row,) = Ledger(out).rows()
    assert row["max_loss_difference"] < 1e-4 and row["tokens"] == 64
    assert set(row["ways"]) - {"liger"} == {"gemma4", "sdpa", "enabled"}
    for found in row["ways"].values():
        assert found["tok_s"] > 0 and found["bytes"] > found["peak"] > 0
    assert row["liger"] in capsys.readouterr().out or row["liger"] == "measured"
    before = out.read_text()
    monkeypatch.setattr(bench_training, "run", pytest.fail)
    bench_training.main()  # nothing is left
    assert out.read_text() == before
