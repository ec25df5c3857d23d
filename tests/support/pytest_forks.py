"""Runs pytest again and again, each time in a fork of a process that has imported what is slow to.

A line of stdin is a JSON list, a file for the output and pytest's arguments; its answer on stdout
is the exit status, negative for a signal.
"""

import gc
import json
import os
import sys

import pytest
import torch
import torch._inductor  # as torch.use_deterministic_algorithms does, in two seconds

import gemma4_kernels  # noqa: F401

gc.freeze()  # pytest collects at its end
torch.set_num_threads(1)  # several of these run at once
for line in sys.stdin:
    output, *arguments = json.loads(line)
    child = os.fork()
    if not child:
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, sys.stdout.fileno())
        os.dup2(file, sys.stderr.fileno())
        status = pytest.main(["-p", "no:anyio", "-p", "no:cacheprovider", *arguments])
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
