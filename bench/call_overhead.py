"""What a call of an op costs before its arithmetic, and what the imports cost, in Python alone.

    python bench/call_overhead.py

A call runs with its twin replaced by the twin's result: what is left is the public function, the
judgement of its arguments and the check. `instructions` counts the bytecodes of one call, which no
other load on the machine changes; `over_add` is its time over that of torch.add on empty tensors.
An import is CPU time in a process of its own, `over_torch` that over the time of `import torch`.
To compare two versions, run it with PYTHONPATH set to each by turns.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

import gemma4_kernels
from gemma4 import measure
from gemma4_kernels import opset
from gemma4_kernels.check.cases import CASES, HOST, Draw

IMPORTS = 15
PROBE = "import time, torch; torch_s = time.process_time(); import {}; \
print(time.process_time() - torch_s, torch_s)"


def count_instructions(call: Callable[[], object]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    call()  # what is made once is made
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def calls() -> Iterator[dict[str, Any]]:
    empty = torch.empty(0)
    add = measure.time_calls(lambda i: torch.add(empty, empty), HOST).median
    for name, op in opset.OPS.items():
        public = getattr(gemma4_kernels, name, None)
        if public is None:
            continue  # a backward, which autograd calls
        args = next(CASES[name](Draw(HOST, torch.bfloat16)))
        given, result = dict(zip(op.names, args, strict=True)), op.twin(*args)
        op.twin = lambda *args, result=result: result
        took = measure.time_calls(lambda i, f=public, given=given: f(**given), HOST).median
        count = count_instructions(lambda f=public, given=given: f(**given))
        yield dict(kind="call", op=name, instructions=count, over_add=round(took / add, 2))


def imports() -> Iterator[dict[str, Any]]:
    for package in ("gemma4_kernels", "gemma4"):
        command = [sys.executable, "-c", PROBE.format(package)]
        seconds = [
            [float(x) for x in subprocess.check_output(command, text=True).split()]
            for _ in range(IMPORTS)
        ]
        ours, torchs = (statistics.median(column) for column in zip(*seconds, strict=True))
        over = round(ours / torchs, 4)
        yield dict(kind="import", package=package, ms=round(ours * 1e3, 2), over_torch=over)


if __name__ == "__main__":
    for row in (*calls(), *imports()):
        print(json.dumps(row))
