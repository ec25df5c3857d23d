"""The model benchmark runs every way of a model on the same weights; no test depends on speed."""

import bench_model
import pytest
from ledger import Ledger
from support import tiny

from gemma4 import Gemma4TextConfig

TINY = bench_model.options(Gemma4TextConfig(**tiny.E_SERIES))


def test_a_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(bench_model, "CONFIGS", {"tiny": TINY})
    monkeypatch.setattr(bench_model, "PREFILL_TOKENS", 8)
    monkeypatch.setattr(bench_model, "DECODE_TOKENS", 2)
    # What test_decode.py compiles, and no more.
    monkeypatch.setattr("gemma4.compiled.step", lambda decoder, ids: decoder.forward(ids))
    argv = ["bench_model", "--out", str(out), "--only", "tiny", "--device", "cpu", "--repeat", "2"]
    monkeypatch.setattr("sys.argv", argv)
    bench_model.main()
    rows = Ledger(out).rows()
    assert [row["item"] for row in rows] == ["tiny float32", "tiny bfloat16"]
    assert rows[0]["max_logit_difference"] < 1e-4
    assert all(ratio > 0 for ratio in rows[0]["vs_sdpa"] + rows[0]["enabled_vs_sdpa"])
    assert rows[0]["compiled_vs_sdpa"] > 0 and rows[0]["launches_per_token"] is None
    values = rows[0]["bytes_per_token"] / 4  # of weights, and of 9 positions' keys
    assert values - rows[1]["bytes_per_token"] / 2 == 0 and rows[0]["floor_tok_s"] > 0
    before = out.read_text()
    monkeypatch.setattr(bench_model, "build", pytest.fail)
    bench_model.main()  # nothing is left
    assert out.read_text() == before
