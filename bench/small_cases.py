"""Every kernel on small shapes on the GPU, beside its eager twin on the CPU.

    python bench/small_cases.py

What gpu_check.py runs compute-sanitizer over: it takes seconds, and launches each instance that the
card's planner can choose. Prints what is far from its twin; the tests say how near is right.
"""

import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import static_report
import torch
from conftest import Backend

import gemma4_kernels
from gemma4_kernels import build_info

FAR = 0.02  # of a result's largest value: several roundings to bf16


def moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def far(
    calls: Iterable[static_report.Call], ops: ModuleType = gemma4_kernels.ops, device: str = "cuda"
) -> Iterator[str]:
    """Names the calls whose results on `device` are not those of the eager twins."""
    for op, arguments in calls:
        made = static_report.function(ops, op)(**moved(arguments, device))
        expected = static_report.function(gemma4_kernels.ops, op)(**moved(arguments, "cpu"))
        for ours, theirs in zip(as_tuple(made), as_tuple(expected), strict=True):
            if theirs is None or not theirs.numel():
                continue
            error = (ours.cpu().double() - theirs.double()).abs().max()
            most = FAR * theirs.double().abs().max() if theirs.is_floating_point() else 0
            if not error <= most:
                yield f"{op} {theirs.dtype} {list(theirs.shape)}: off by {error:.3g}"


def main() -> int:
    build = build_info()
    if not (build["cuda"] and torch.cuda.is_available()):
        print(f"no kernels to run: {build['reason'] or 'torch finds no CUDA device'}")
        return 1
    torch.manual_seed(0)
    found = list(far(static_report.launch_cases(Backend("cuda", "cuda"))))
    torch.cuda.synchronize()
    print("\n".join(found) or "all near their eager twins")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
