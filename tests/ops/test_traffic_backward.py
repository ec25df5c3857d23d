"""What the kernels of gradients ask of memory, counted by the emulator.

Beside each activation read once and each gradient written once, in whole sectors, there are the
sums that blocks keep of weights' gradients: together no more than 5 % over what must be moved.
"""

import pytest
from support import backward_cases, cases, emulated
from support.backends import BF16, FP32, in_dtypes
from support.marks import emulated_backend
from support.traffic import check_sites

from gemma4_kernels import opset

ROWS = 256  # of 6 blocks that keep sums
CASES = {  # op, sizes, arguments that are fp32
    "rms_norm": ("rms_norm", (ROWS, 512), ()),
    "add_rms_norm": ("add_rms_norm", (ROWS, 512), ()),
    "add_rms_norm, 31B": ("add_rms_norm", (ROWS, 5376), ()),
    "add_rms_norm, autocast": (
        "add_rms_norm",
        (ROWS, 512),
        ("residual", "post_weight", "next_weight", "scale"),
    ),
    "moe_norm": ("moe_norm", (ROWS, 512), ()),
    "qkv_norm_rope, sliding": ("qkv_norm_rope", (64, 8, 2, 256), ()),
    "qkv_norm_rope, full": ("qkv_norm_rope", (96, 4, 1, 512), ()),
    "qkv_norm_rope, autocast": ("qkv_norm_rope", (64, 8, 2, 256), ("q_weight", "k_weight")),
}
# Every block's, and small; of those in fp32 beside 16 bits a lane reads 32 bytes in two loads.
WEIGHTS = {"weight", "post_weight", "next_weight", "scale", "q_weight", "k_weight"}
CACHED = WEIGHTS | {"inv_freq", "index", "positions"}


@pytest.mark.parametrize("wants", [True, False], ids=["full", "frozen weights"])
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if "31B" in case else case for case in CASES],
)
def test_traffic(counted, case, wants):
    op, sizes, wide = CASES[case]
    b = emulated_backend()
    # Of q, k and v apart, as training makes them: of views each would count the memory of all.
    options = dict(packed=False) if op == "qkv_norm_rope" else {}
    forward = getattr(cases, op)(b, *sizes, dtype=BF16, **options)
    forward = in_dtypes(forward, **dict.fromkeys(wide, FP32))
    arguments = getattr(backward_cases, f"{op}_backward")(b, forward)
    for name in arguments:
        if name.startswith("wants_") and name.endswith(("weight", "scale")):
            arguments[name] = wants
    counted.reset_counts()
    with emulated.one_schedule():
        backward = opset.OPS[f"{op}_backward"]
        results = opset.kernels.call(backward, tuple(arguments.values()))

    counts = counted.counts()
    assert counts.launches == 1 + wants
    read = {n: x for n, x in arguments.items() if hasattr(x, "nbytes") and n not in CACHED}
    asked = dict.fromkeys((buffer.name for buffer in counts.buffers), 0)
    for buffer in counts.buffers:
        asked[buffer.name] += buffer.read_bytes + buffer.written_bytes
    for name, x in read.items():
        assert asked[name] == x.nbytes, f"{name}: {asked[name]} bytes asked for"
    written = sum(x.nbytes for x in results)
    floor = sum(x.nbytes for x in read.values()) + written
    moved = sum(n for name, n in asked.items() if name not in CACHED)
    assert moved <= 1.05 * floor, f"{moved} bytes for {floor}"
    assert wants or moved == floor
    check_sites(counts, exempt={"partial"} | CACHED)
