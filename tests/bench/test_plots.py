"""What the pictures show is what the lines of JSON say."""

import sys
from unittest import mock

import plots
import pytest


def row(op, case, us, peers=None, tflop_s=0.0):
    peers = {name: {"us": x} if x else {"error": "no"} for name, x in (peers or {}).items()}
    made = {"kind": "op", "op": op, "case": case, "us": us, "floor_us": 10.0}
    return made | {"gb_s": 500.0, "tflop_s": tflop_s, "peers": peers}


MACHINE = {"kind": "machine", "device": "a card", "copy_gb_s": 1000.0, "gemm_tflop_s": 100.0}
NORM = row("rms_norm", "E2B, 64 tokens", 20.0, {"eager": 60.0, "Liger": 30.0, "torch.compile": 0})
DECODE = [
    row("attention_decode", f"E4B full, batch {b}, {n} keys", n / 100, tflop_s=2.0)
    for b, n in ((1, 32768), (1, 8192), (8, 8192))
]


def test_over_floor():
    shown = plots.over_floor([NORM])
    assert {name: points[0][0] for name, points in shown.items()} == {
        "gemma4_kernels": 2.0,
        "eager": 6.0,
        "Liger": 3.0,
    }


def test_best_peer_ratios():
    assert plots.best_peer_ratios([NORM, *DECODE]) == [(1.5, "E2B, 64 tokens (Liger)")]


def test_roofline():
    """2 TFLOP/s at 500 GB/s are four FLOP a byte."""
    assert [point[:2] for point in plots.roofline([NORM, *DECODE])] == [(4.0, 2.0)] * 3


def test_against_context():
    """A batch of which there is one context alone is no line."""
    expected = {"E4B full, batch 1": [(8192, 81.92), (32768, 327.68)]}
    assert plots.against_context([NORM, *DECODE]) == expected


@pytest.mark.parametrize("real", [False, True], ids=["recorded", "matplotlib"])
def test_draw(tmp_path, monkeypatch, real):
    rows = [MACHINE, NORM, {"kind": "skipped", "op": "geglu", "case": "", "why": ""}, *DECODE]
    if real:
        pytest.importorskip("matplotlib").use("agg")
        plots.draw(rows, tmp_path)
        drawn = [path.name for path in tmp_path.iterdir() if path.stat().st_size > 1000]
    else:
        figure = mock.MagicMock()
        pyplot = mock.MagicMock(subplots=lambda figsize: (figure, mock.MagicMock()))
        monkeypatch.setitem(sys.modules, "matplotlib", mock.MagicMock(pyplot=pyplot))
        plots.draw(rows, tmp_path)
        drawn = [call.args[0].name for call in figure.savefig.call_args_list]
    decode = {f"attention_decode{kind}.png" for kind in ("", "-roofline", "-context")}
    assert set(drawn) == decode | {"rms_norm.png", "rms_norm-best-peer.png"}
