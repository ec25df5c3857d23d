"""What the kernels of rows ask of memory, counted by the emulator.

Each activation read once and each output written once, in whole 32-byte sectors, and no bank
conflict. Weights are asked for by every block; they are small and stay in the caches, so for them
only the sectors that DRAM must give count.
"""

import pytest
import torch
from support import backward_cases, cases, emulated
from support.backends import BF16
from support.marks import emulated_backend
from support.small_calls import CASES, SMALL, WEIGHTS, case_of
from support.traffic import check_sites, lines_with

from gemma4_kernels import opset


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_traffic(counted, case, dtype):
    backend = emulated_backend()
    op, arguments = case_of(backend, case, dtype)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    counted.settings.seed = 1
    with emulated.one_schedule():
        getattr(backend.ops, op)(**arguments)
    counts = counted.counts()

    # A lane's frequencies, and weights wider than x, are 32 bytes in two loads, a sector each time,
    # and from L1.
    exempt = {"inv_freq"}
    if "fp32 weight" in case and dtype == BF16:
        exempt |= WEIGHTS
    check_sites(counts, exempt)
    for buffer in counts.buffers[: len(counts.buffers) // counts.launches]:
        name, useful = buffer.name, buffer.bytes
        if name in tensors:  # a view may have gaps
            useful = tensors[name].numel() * tensors[name].element_size()
            if name == "ple":
                useful //= tensors[name].shape[1]
        if buffer.written_bytes and name in ("k_cache", "v_cache"):
            useful //= 2
        touched = 32 * buffer.sectors_touched
        assert touched <= 1.02 * useful + 64, f"{name}: {touched} bytes of DRAM for {useful}"
        if name not in SMALL and name != "index":
            asked = buffer.read_bytes + buffer.written_bytes
            assert asked == useful, f"{name}: {asked} bytes asked for, {useful} would do"


BACKWARD = {  # what a call of each backward reads and writes
    "geglu": (("grad", "gate_up"), ("d_gate_up",)),
    "ple_gate": (("grad", "gate", "ple"), ("d_gate", "d_slice")),
    "softcap_cross_entropy": (("logits",), ("d_logits",)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("op", BACKWARD)
def test_backward_traffic(counted, op, dtype):
    """All once, in one launch: five values an element of a gated product, two of a logit."""
    backend = emulated_backend()
    sizes = (64, 1, 256, 0) if op == "ple_gate" else (64, 2048)
    arguments = getattr(cases, op)(backend, *sizes, dtype=dtype)
    if op == "softcap_cross_entropy":
        arguments["targets"] = torch.arange(64)
    backward = getattr(backward_cases, f"{op}_backward")(backend, arguments)
    counted.reset_counts()
    counted.settings.seed = 1
    with emulated.one_schedule():
        opset.kernels.call(opset.OPS[f"{op}_backward"], tuple(backward.values()))
    counts, rows = counted.counts(), ("targets", "lse", "grad_nll", "grad_lse")
    assert counts.launches == 1
    read, written = BACKWARD[op]
    moved = {b.name: (b.read_bytes, b.written_bytes) for b in counts.buffers if b.name not in rows}
    elements = 64 * 2048 if op != "ple_gate" else 64 * 256
    halves = {"gate_up": 2, "d_gate_up": 2}
    expected = {n: (halves.get(n, 1) * elements * dtype.itemsize, 0) for n in read}
    expected |= {n: (0, halves.get(n, 1) * elements * dtype.itemsize) for n in written}
    assert moved == expected
    check_sites(counts, exempt=rows)


def test_cross_entropy_traffic(counted):
    """Logits once, and of a row the one of its target again; of ignored rows none."""
    backend = emulated_backend()
    arguments = cases.softcap_cross_entropy(backend, 8, 4096, dtype=BF16)
    with emulated.one_schedule():
        backend.ops.softcap_cross_entropy(**arguments)
    counts, kept = counted.counts(), int((arguments["targets"] != -100).sum())
    assert counts.launches == 1
    (logits,) = (b for b in counts.buffers if b.name == "logits")
    assert logits.read_bytes == kept * 2 * (4096 + 1) and kept == 6
    chosen = lines_with("linear/softcap_cross_entropy.cuh", "logits[target]")
    check_sites(counts, ("targets", "nll", "lse"), chosen)


@pytest.mark.parametrize("top_k", [0, 64])
def test_sample_work(counted, top_k):
    """The logits are read once, in whole sectors, and of four parts' winners each once."""
    backend = emulated_backend()
    arguments = cases.sample(backend, 2, 8192, dtype=BF16, temperature=0.7, top_k=top_k)
    with emulated.one_schedule():
        backend.ops.sample(**arguments)
    counts = counted.counts()
    buffers = {b.name: b for b in counts.buffers}
    assert counts.launches == 1
    read = buffers["logits"]
    assert read.read_bytes == arguments["logits"].nbytes == 32 * read.sectors_touched
    assert buffers["kept"].read_bytes == buffers["kept"].written_bytes == 2 * 4 * (top_k or 2) * 8
    state = ("seeds", "positions", "ids", "done", "counters", "eos")
    # Where winners stand among the others is the logits' choice.
    places = lines_with("linear/sample.cuh", "smem.kept[rank]")
    places += lines_with("linear/sample.cuh", "smem.kept[to + ")
    check_sites(counts, (*state, "kept"), places)
