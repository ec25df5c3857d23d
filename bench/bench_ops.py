"""Each op on Gemma 4's shapes, beside its floor and its peers, all in one process.

    python bench/bench_ops.py --out FILE [--only OP ...] [--brief | --cpu]
    python bench/bench_ops.py --out FILE --overhead

Lines of JSON: first what the machine is and what its copies and GEMMs reach, then a line a case. A
case that stands in FILE already is not measured again. Inputs rotate beyond L2, calls are captured
in a CUDA graph where they can be, times are medians with p20 and p80. A floor is bytes at the
copy's rate or useful FLOP (what a mask hides excluded) at the GEMM's, whichever is longer. Peers
that are not installed or refuse a case say so in their place. --brief takes few shapes, --cpu those
that two cores can do. --overhead times calls without tokens through the emulated library: the
public function, the dispatcher, the checks and the outputs, and no kernel.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import limits
import op_cases
import paths  # noqa: F401
import peers
import torch
from ledger import LOST, Ledger, gpu_is_lost
from support.backends import function
from support.cases import complete

import gemma4_kernels
from gemma4 import measure
from gemma4.config import FULL

MOST_BYTES = 16e9  # of one case's inputs


def rotations(case: op_cases.Case, device: torch.device) -> int:
    """Sets of inputs that are more than twice what L2 holds."""
    cached = 64 << 20
    if device.type == "cuda":
        cached = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return int(min(64, 1 + cached // max(case.bytes, 1)))


def timing_row(timing: measure.Timing) -> dict[str, Any]:
    us = {f"{n}us": round(getattr(timing, f) * 1e6, 3)
          for n, f in (("", "median"), ("p20_", "p20"), ("p80_", "p80"))}  # fmt: skip
    return us | {"taken": timing.taken}


def measure_case(
    case: op_cases.Case, device: torch.device, copy: float, gemm: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()  # past a number of shapes the compiler would quietly run eager torch
    if device.type == "cuda":
        torch.cuda.empty_cache()
    sets = [case.make(device) for _ in range(rotations(case, device))]
    ours = function(case.op)
    expected = ours(**sets[0])
    timing = measure.time_calls(lambda i: ours(**sets[i]), device, len(sets))
    floor = max(case.bytes / copy, case.flop / gemm)
    row = {
        "kind": "op",
        "op": case.op,
        "case": case.label,
        **timing_row(timing),
        "floor_us": round(floor * 1e6, 3),
        "gb_s": round(case.bytes / timing.median / 1e9, 1),
        "tflop_s": round(case.flop / timing.median / 1e12, 3),
        "peers": {},
    }
    if case.op in peers.SDPA_OPS and not case.codes:
        row["sdpa_takes"] = peers.sdpa_takes(case.op, sets[0])
    for name, prepare in peers.of(case.op, device):
        if case.codes and name != "eager":
            continue
        try:
            calls = [prepare(list(complete(case.op, s).values()), s) for s in sets]
            found = {"difference": peers.difference(expected, calls[0]())}
            found |= timing_row(measure.time_calls(lambda i, c=calls: c[i](), device, len(sets)))
        except Exception as error:  # whatever a peer raises is its answer
            said = str(error).strip().partition("\n")[0]
            found = {"error": f"{type(error).__name__}: {said}"[:200]}
        row["peers"][name] = found
        if gpu_is_lost():
            break  # the others could only fail
    return row


def run(
    sizes: op_cases.Sizes, device: torch.device, only: list[str], ledger: Ledger
) -> Iterator[dict[str, Any]]:
    """The rows of the cases that are not in the ledger, which gets them; stops where the GPU is
    lost."""
    cases = [case for case in op_cases.all_cases(sizes) if not only or case.op in only]
    done = ledger.done()
    cases = [case for case in cases if case.item not in done]
    if not cases:
        return
    copy, gemm = measure.copy_bandwidth(device), measure.gemm_rate(device)
    rates = {"copy_gb_s": round(copy / 1e9, 1), "gemm_tflop_s": round(gemm / 1e12, 3)}
    facts = measure.machine(device)
    row = {"kind": "machine", **facts, **rates, "build": gemma4_kernels.build_info()}
    ledger.note(**row)
    yield row
    for case in cases:
        ledger.start(case.item)
        outcome, row = "passed", {"kind": "skipped", "op": case.op, "case": case.label}
        if case.bytes > MOST_BYTES:
            row["why"] = f"{case.bytes / 1e9:.0f} GB of inputs"
        else:
            try:
                row = measure_case(case, device, copy, gemm)
            except Exception as error:
                outcome = "failed"
                row |= {"kind": "failed", "why": f"{type(error).__name__}: {error}"}
        row["device"] = facts["device"]
        ledger.end(case.item, outcome, **row)
        yield row
        if gpu_is_lost():
            return


def overhead() -> Iterator[dict[str, Any]]:
    """Calls without tokens on the emulated library, beside torch.add of two empty tensors."""
    from support import emulated

    device, ops = torch.device("cpu"), emulated.ops()
    kernels = emulated.kernels()
    kernels.call = super(emulated.EmulatedKernels, kernels).call  # once, and not on each schedule
    direct = kernels.ops
    empty = torch.empty(0, 2560, dtype=op_cases.DTYPE)
    add = measure.time_calls(lambda i: torch.add(empty, empty), device).median
    yield {"kind": "machine", **measure.machine(device), "add_us": round(add * 1e6, 2)}
    rows = ("rms_norm", "add_rms_norm", "qkv_norm_rope", "geglu", "ple_gate")
    made = [op_cases.row(op, "E4B", 0) for op in rows]
    made += [op_cases.attention_prefill("E4B", FULL, 0)]
    made += [op_cases.attention_decode("E4B", FULL, 0, 512)]
    made += [op_cases.row("moe_norm", "26B-A4B", 0), op_cases.moe_route("26B-A4B", 0)]
    made += [op_cases.moe_experts(limits.FEW_EXPERTS, 0)]
    for case in made:
        inputs = case.make(device)
        args, public = complete(case.op, inputs).values(), getattr(ops, case.op)
        compiled = getattr(direct, case.op)
        by_op = measure.time_calls(lambda i, f=compiled, a=args: f(*a), device).median
        by_name = measure.time_calls(lambda i, f=public, a=inputs: f(**a), device).median
        yield {
            "kind": "overhead",
            "op": case.op,
            "device": "cpu",
            "over_add": round(by_name / add, 1),
            "dispatcher_and_binding_over_add": round(by_op / add, 1),
        }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of JSON lines")
    parser.add_argument("--only", nargs="*", default=[], help="these ops alone")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--brief", action="store_true", help="few shapes")
    kind.add_argument("--cpu", action="store_true", help="few small shapes, on the CPU")
    kind.add_argument("--overhead", action="store_true")
    return parser


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    ledger = Ledger(args.out)
    if args.overhead:
        for row in overhead():
            ledger.note(**row)
            show(row)
        return 0
    if not (args.cpu or torch.cuda.is_available()):
        parser.error("torch finds no CUDA device; --cpu takes small shapes on the CPU")
    sizes = op_cases.CPU if args.cpu else op_cases.BRIEF if args.brief else op_cases.ALL
    with torch.no_grad():
        for row in run(sizes, torch.device("cpu" if args.cpu else "cuda"), args.only, ledger):
            show(row)
    if gpu_is_lost():
        return LOST
    return int(any(row.get("outcome") == "failed" for row in ledger.rows()))


def show(row: dict[str, Any]) -> None:
    shown = ("kind", "op", "case", "us", "floor_us", "over_add", "why")
    print(*(row[key] for key in shown if key in row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
