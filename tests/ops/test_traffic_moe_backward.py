"""What the kernels of the experts' gradients ask of memory and of the tensor cores."""

import pytest
from support import backward_cases, cases, emulated
from support.backends import BF16
from support.marks import emulated_backend
from support.traffic import check_sites
from test_traffic_moe import MOE_SMALL

from gemma4_kernels import opset

TOKENS, WIDTH, HIDDEN = 256, 128, 128


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen experts"])
def test_experts_work(counted, frozen):
    """On full tiles eight products and not one more, of frozen experts five; what a tile reads
    comes once for each tile beside it, and all that is made is written once, zeros of an idle
    expert too."""
    b = emulated_backend()
    forward = cases.moe_experts(b, TOKENS, 2, 1, WIDTH, HIDDEN, dtype=BF16)
    forward["experts"][:] = 1
    wanted = (True, False, False, True) if frozen else (True,) * 4
    arguments = backward_cases.moe_experts_backward(b, forward, *wanted)
    counted.reset_counts()
    with emulated.one_schedule():
        backward = opset.OPS["moe_experts_backward"]
        results = opset.kernels.call(backward, tuple(arguments.values()))

    counts = counted.counts()
    assert counts.launches == (5 if frozen else 7)
    assert counts.mma == (5 if frozen else 8) * TOKENS * WIDTH * HIDDEN // (16 * 8 * 16)
    read = {buffer.name: 0 for buffer in counts.buffers}
    written = dict(read)
    for buffer in counts.buffers:
        read[buffer.name] += buffer.read_bytes
        written[buffer.name] += buffer.written_bytes
    made = dict(zip(("dx", "d_gate_up", "d_down"), results, strict=False))
    assert {n: written.get(n, 0) for n in made} == {n: x.nbytes for n, x in made.items()}
    rows = TOKENS // 128  # tiles of an expert's weights meet so many of its tokens
    gate_up, down = (arguments[n][1].nbytes for n in ("gate_up", "down"))
    assert read["gate_up"] == 2 * rows * gate_up and read["down"] == rows * down
    # Two tiles of 64 hidden columns; of the weights' gradients two of gate_up's 128 rows and one of
    # down's columns.
    x, pair = arguments["x"].nbytes, TOKENS * 2 * HIDDEN * 2
    assert read["x"] == (2 if frozen else 4) * x and read["grad"] == (2 if frozen else 3) * x
    assert written["d_pair"] == pair and read["d_pair"] == (1 if frozen else 2) * pair
    assert read["dx_parts"] == written["dx_parts"] == x
    if not frozen:
        assert read["hidden"] == written["hidden"] == pair // 2
    check_sites(counts, exempt=(*MOE_SMALL, "d_parts", "d_weights"))
