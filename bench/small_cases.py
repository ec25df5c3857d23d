"""Every kernel on small shapes on the GPU, beside its eager twin on the CPU.

    python bench/small_cases.py --out FILE

What gpu_check.py runs compute-sanitizer over: it takes seconds, and launches each instance that the
card's planner can choose. A case that stands in FILE already is not run again. Says what is far
from its twin; the tests say how near is right.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import paths  # noqa: F401
import torch
from ledger import LOST, Ledger, gpu_is_lost
from support.backends import EAGER, function
from support.cases import Arguments
from support.small_calls import Call, launch_cases

import gemma4_kernels
from gemma4_kernels import opset
from gemma4_kernels.packed import PackedWeight

FAR = 0.02  # of a result's largest value: several roundings to bf16


def moved(arguments: Arguments, device: str) -> Arguments:
    tensors = torch.Tensor, PackedWeight
    return {n: x.to(device) if isinstance(x, tensors) else x for n, x in arguments.items()}


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def differences(call: Call, device: str) -> list[str]:
    """Which results on `device` are not those of the eager twin on the CPU."""
    op, arguments = call
    made = function(op)(**moved(arguments, device))
    with opset.using(opset.NoKernels()):
        expected = function(op)(**moved(arguments, "cpu"))
    found = []
    for ours, theirs in zip(as_tuple(made), as_tuple(expected), strict=True):
        if theirs is None or not theirs.numel():
            continue
        error = (ours.cpu().double() - theirs.double()).abs().max()
        most = FAR * theirs.double().abs().max() if theirs.is_floating_point() else 0
        if not error <= most:
            found.append(f"{theirs.dtype} {list(theirs.shape)}: off by {error:.3g}")
    return found


def item(number: int, call: Call) -> str:
    op, arguments = call
    shapes = (
        f"{name} {str(x.dtype)[6:]} {'x'.join(map(str, x.shape))}"
        for name, x in arguments.items()
        if isinstance(x, torch.Tensor)
    )
    return f"{number}: {op}, {next(shapes)}"


def run(calls: Iterable[Call], ledger: Ledger, device: str = "cuda") -> None:
    """The calls that are not in the ledger, which gets them; stops where the GPU is lost."""
    done = ledger.done()
    for number, call in enumerate(calls):
        name = item(number, call)
        if name in done:
            continue
        print(name, flush=True)  # what a sanitizer says next is of this case
        ledger.start(name)
        try:
            found = differences(call, device)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        ledger.end(name, "failed" if found else "passed", why="; ".join(found))
        if found:
            print(f"FAILED: {'; '.join(found)}", flush=True)
        if gpu_is_lost():
            return


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of JSON lines")
    return parser


def main() -> int:
    ledger = Ledger(arguments().parse_args().out)
    build = gemma4_kernels.build_info()
    if not (build["cuda"] and torch.cuda.is_available()):
        print(f"no kernels to run: {build['reason'] or 'torch finds no CUDA device'}")
        return 2
    torch.zeros(1, device="cuda")  # a sanitizer takes a process without a GPU for a failure
    torch.manual_seed(0)
    # Inputs made on the CPU come by a copy, which initcheck sees; a kernel of torch's it would not.
    run(launch_cases(EAGER), ledger)
    if gpu_is_lost():
        return LOST
    return int(any(row["outcome"] == "failed" for row in ledger.rows()))


if __name__ == "__main__":
    sys.exit(main())
