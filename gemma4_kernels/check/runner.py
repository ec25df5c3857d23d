"""Runs kernels in a process that may die: one that traps or hangs takes its CUDA context along."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from .. import extension, library
from . import judge
from .record import Card

Kernels = Mapping[str, Callable[..., Any]]
Heard = tuple[str | None, str | None]  # a case that begins or goes wrong, and what is wrong
END: Heard = None, None
START_SECONDS = 120
# For one case. The driver may have to compile PTX before the first.
CASE_SECONDS, PTX_SECONDS = 15, 300


def compiled() -> Kernels:
    """The kernels of the library."""
    ops = getattr(torch.ops, library.COMPILED)
    return {name: getattr(ops, name) for name in extension.ops_in(library.COMPILED)}


def cards() -> dict[Card, torch.device]:
    """The cards that the kernels are compiled for, of several alike the first.

    Raises RuntimeError if there are none.
    """
    if extension.BUILD.reason:
        raise RuntimeError(f"there are no kernels to check: {extension.BUILD.reason}")
    if not torch.cuda.is_available():
        raise RuntimeError("there is nothing to check the kernels on: torch sees no CUDA device")
    found: dict[Card, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if extension.covers(device):
            found.setdefault(extension.card(device), device)
    if not found:
        archs = ", ".join(extension.BUILD.archs)
        raise RuntimeError(f"no card here runs the kernels, which are compiled for {archs}")
    return found


class Runner:
    """Checks the kernels that `kernels()` gives, in a process that lives until one fails.

    `kernels` is called in that process, which finds it by its module's name.
    """

    def __init__(
        self,
        device: torch.device,
        kernels: Callable[[], Kernels] = compiled,
        limit_seconds: float | None = None,
    ):
        if limit_seconds is None:
            limit_seconds = CASE_SECONDS if extension.has_code(device) else PTX_SECONDS
        self.device, self.kernels, self.limit_seconds = device, kernels, limit_seconds
        self.process: BaseProcess | None = None

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def check(self, op: str) -> str | None:
        """What is wrong with the kernel of an op, as a verb phrase; None if nothing is.

        Raises RuntimeError if the process does not even start.
        """
        if self.process is None:
            self._start()
        self.connection.send(op)
        at, reason = "before its first case", None
        while reason is None:
            case, reason = self._hear(self.limit_seconds)
            if (case, reason) == END:
                return None
            at = case or at
        self._end()  # what a wrong kernel did to the memory of its process, nobody knows
        return f"{reason} ({at})"

    def _hear(self, seconds: float) -> Heard:
        """What the process says next; if nothing, the reason why."""
        if not self.connection.poll(seconds):
            return None, f"hangs: no end in {seconds:g} s"
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return None, f"ends its process with {how}"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        arguments = other, self.device, self.kernels
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        other.close()
        _, reason = self._hear(START_SECONDS)
        if reason is not None:
            self._end()
            raise RuntimeError(f"the process that runs the kernels does not start: it {reason}")

    def _end(self) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.join(CASE_SECONDS)  # a hanging kernel may hold it in the driver
            self.process = None


def _serve(connection: Connection, device: torch.device, kernels: Callable[[], Kernels]) -> None:
    """The process: for each op that is asked for it says each case that it begins, and the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    serving = kernels()
    torch.zeros(1, device=device)
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
            connection.send((case, f"raises {type(error).__name__}: {str(error).splitlines()[0]}"))
