"""Runs kernels in a process that may die: one that traps or hangs takes its CUDA context along."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from .. import extension, opset
from . import judge, record

Kernels = Mapping[str, Callable[..., Any]]
Heard = tuple[str | None, str | None]  # a case that begins or goes wrong, and what is wrong
END: Heard = None, None
START_SECONDS = 120
# For one case. The driver may have to compile PTX before the first.
CASE_SECONDS, PTX_SECONDS = 15, 300
# Asked for before any kernel runs, so that a card that others have filled is no kernel's fault.
MEMORY_BYTES = 1 << 28


def compiled() -> Kernels:
    """Those of the compiled library."""
    return {name: getattr(opset.kernels.ops, name) for name in opset.kernels.names}


def case_seconds(device: torch.device) -> int:
    return CASE_SECONDS if extension.has_code(device) else PTX_SECONDS


def cards() -> dict[record.Card, torch.device]:
    """The cards that the kernels are compiled for, of several alike the first.

    Raises RuntimeError if there are none.
    """
    if extension.BUILD.reason:
        raise RuntimeError(f"there are no kernels to check: {extension.BUILD.reason}")
    if not torch.cuda.is_available():
        raise RuntimeError("there is nothing to check the kernels on: torch sees no CUDA device")
    found: dict[record.Card, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if extension.covers(device):
            found.setdefault(record.card(device), device)
    if not found:
        archs = ", ".join(extension.BUILD.archs)
        raise RuntimeError(f"no card here runs the kernels, which are compiled for {archs}")
    return found


class Runner:
    """Checks the kernels that `kernels()` gives, in a process that lives until one fails.

    `kernels` is called in that process, which finds it by its module's name. A case may take
    `case_seconds`.
    """

    def __init__(
        self,
        device: torch.device,
        kernels: Callable[[], Kernels] = compiled,
        case_seconds: float = CASE_SECONDS,
    ):
        self.device, self.kernels, self.case_seconds = device, kernels, case_seconds
        self.process: _Process | None = None

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.end()

    def check(self, op: str) -> str | None:
        """What is wrong with the kernel of an op, as a verb phrase; None if nothing is.

        Raises RuntimeError if the process does not even start.
        """
        process = self.process = self.process or _Process(self.device, self.kernels)
        with contextlib.suppress(ConnectionError):  # what became of it is heard below
            process.connection.send(op)
        at = "before its first case"
        while True:
            case, reason = heard = process.hear(self.case_seconds)
            if heard == END:
                return None
            at = case or at
            if reason is not None:
                # What a wrong kernel did to the memory of its process, nobody knows.
                process.end()
                self.process = None
                return f"{reason} ({at})"


class _Process:
    def __init__(self, device: torch.device, kernels: Callable[[], Kernels]):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        arguments = other, device, kernels
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        other.close()
        _, reason = self.hear(START_SECONDS)
        if reason is not None:
            self.end()
            raise RuntimeError(f"the process that runs the kernels does not start: it {reason}")

    def hear(self, seconds: float) -> Heard:
        """What the process says next; if nothing, the reason why."""
        if not self.connection.poll(seconds):
            return None, f"hangs: no end in {seconds:g} s"
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(seconds)
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return None, f"ends its process with {how}"

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join(CASE_SECONDS)  # a hanging kernel may hold it in the driver


def _serve(connection: Connection, device: torch.device, kernels: Callable[[], Kernels]) -> None:
    """The process: for each op that is asked for it says each case that it begins, and the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    serving = kernels()
    torch.zeros(MEMORY_BYTES, dtype=torch.uint8, device=device)
    connection.send(END)
    with open(os.devnull, "w") as nowhere:  # for what a dying kernel prints
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    while True:
        op = connection.recv()
        case = ""
        try:
            for case, reason in judge.judged(op, serving[op], device):
                connection.send((case, reason))
            connection.send(END)
        except Exception as error:
            reason = f"raises {type(error).__name__}: {error}".splitlines()[0]
            connection.send((case, reason))
