"""What a call of an op costs before its arithmetic, and what the imports cost, in Python alone.

    python bench/call_overhead.py

A call runs with its twin replaced by the twin's result: what is left is the public function, the
judgement of its arguments and the check. `instructions` counts the bytecodes of one call, which no
other load on the machine changes; `over_add` is its time over that of torch.add on empty tensors.
An import is CPU time in a process of its own, with compiled bytecode, `over_torch` that over the
time of `import torch`. To compare two versions, run it with PYTHONPATH set to each by turns.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from time import process_time
from timeit import timeit
from types import FrameType
from typing import Any

import torch

import gemma4_kernels
from gemma4_kernels import opset
from gemma4_kernels.check.cases import CASES, HOST, Draw

IMPORTED = ("from gemma4_kernels import rms_norm", "from gemma4 import Gemma4ForCausalLM")
PROBE = "import time, torch; torch_s = time.process_time(); {}; \
print(time.process_time() - torch_s, torch_s)"
PROCESSES, REPEATS = 15, 500


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
    add = functools.partial(torch.add, torch.empty(0), torch.empty(0))
    for name, op in opset.OPS.items():
        public = getattr(gemma4_kernels, name, None)
        if public is None:
            continue  # a backward, which autograd calls
        args = next(CASES[name](Draw(HOST, torch.bfloat16)))
        given, result = dict(zip(op.names, args, strict=True)), op.twin(*args)
        op.twin = lambda *args, result=result: result
        call = functools.partial(public, **given)
        count = count_instructions(call)
        # By turns, and the least of each: whatever else runs only adds.
        pairs = [
            [timeit(f, timer=process_time, number=100) for f in (add, call)] for _ in range(REPEATS)
        ]
        add_s, call_s = (min(column) for column in zip(*pairs, strict=True))
        yield dict(kind="call", op=name, instructions=count, over_add=round(call_s / add_s, 2))


def imports() -> Iterator[dict[str, Any]]:
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    for statement in IMPORTED:
        command = [sys.executable, "-c", PROBE.format(statement)]
        seconds = [
            [float(x) for x in subprocess.check_output(command, env=environment).split()]
            for _ in range(PROCESSES + 1)
        ][1:]  # the first compiles
        ours, torchs = (statistics.median(column) for column in zip(*seconds, strict=True))
        over = round(ours / torchs, 4)
        yield dict(kind="import", statement=statement, ms=round(ours * 1e3, 1), over_torch=over)


if __name__ == "__main__":
    for row in (*calls(), *imports()):
        print(json.dumps(row))
