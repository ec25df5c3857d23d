"""Chat templates, rendered in a process of their own.

A template is a program that came with a download. jinja's sandbox keeps it from the machine, but
bounds neither its time nor its memory: one expression can take gigabytes inside C code that
nothing in this process could stop. So templates run in a child that holds jinja alone, with little
memory, and that is killed when it takes too long. It starts with the first conversation, in a
tenth of a second, and serves the next ones in a fraction of a millisecond. This file is both sides
of it.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

SECONDS, START_SECONDS = 5.0, 60.0
MEMORY_BYTES = 512 * 2**20
MOST_CHARACTERS = 4 * 2**20

READY = b"ready\n"
# Not `python -m`, which would import the package, and torch with it, in the child.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); exec(open(sys.argv[1]).read())"


def render(template: str, values: Mapping[str, object], source: str) -> str:
    """The text of a jinja template, with what transformers offers to chat templates.

    `values` are plain data, as JSON has it. Raises ValueError, naming `source`, with the
    template's own sentence if it refuses the values, and if it is wrong, takes more than SECONDS
    or MEMORY_BYTES, or writes more than MOST_CHARACTERS.
    """
    try:
        request = json.dumps({"template": template, "values": values}).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: the values given must be plain data: {error}") from None
    with _lock:
        answer = _answer(request)
    if not answer:
        raise ValueError(
            f"{source}: the template did not end within {SECONDS:g} s "
            f"and {MEMORY_BYTES >> 20} MiB of memory"
        )
    result = json.loads(answer)
    if "error" in result:
        raise ValueError(f"{source}: {result['error']}")
    return result["text"]


# The parent's side.


class _Child:
    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", _START, __file__, json.dumps(sys.path)]
        # A session of its own: ctrl-c at the terminal is not for it.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.questions, self.answers = self.process.stdin, self.process.stdout
        if self._within(START_SECONDS, self.answers.readline) != READY:
            self.end()
            raise RuntimeError(f"{sys.executable} did not start the process for chat templates")

    def ask(self, request: bytes) -> bytes:
        """One line for one line; nothing if the child ended, or took more than its time."""

        def exchange() -> bytes:
            self.questions.write(request)
            self.questions.flush()
            return self.answers.readline()

        try:
            return self._within(SECONDS, exchange)
        except BrokenPipeError:
            return b""

    def _within(self, seconds: float, call: Callable[[], bytes]) -> bytes:
        clock = threading.Timer(seconds, self.process.kill)
        clock.daemon = True
        clock.start()
        try:
            return call()
        finally:
            clock.cancel()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.questions, self.answers):
            with suppress(BrokenPipeError):  # what was not sent yet
                pipe.close()


_child: _Child | None = None
_lock = threading.Lock()


def _answer(request: bytes) -> bytes:
    global _child
    if _child is not None and _child.process.poll() is not None:
        _child.end()
        _child = None
    if _child is None:
        _child = _Child()
    answer = b""
    try:
        answer = _child.ask(request)
    finally:
        if not answer:  # dead, or, after ctrl-c, about to answer a question that nobody asks
            _child.end()
            _child = None
    return answer


@atexit.register
def _end() -> None:
    if _child is not None:
        _child.end()


def _forget() -> None:
    """In a fork: the child is its parent's, and so was whoever held the lock."""
    global _child, _lock
    _child, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# The child's side.


def _serve() -> None:
    """Answers each line of stdin, {template, values}, with one of stdout, {text} or {error}."""
    # Not POSIX, and the time alone is bounded, or a lower bound holds already.
    with suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    from jinja2 import TemplateError

    def answer(line: bytes) -> bytes:
        try:
            return json.dumps({"text": _rendered(**json.loads(line))}).encode()
        except MemoryError:
            reason = f"the template takes more than {MEMORY_BYTES >> 20} MiB of memory"
        except RecursionError:
            reason = "the template is nested too deep"
        except Exception as error:
            name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            line_number = getattr(error, "lineno", None)
            where = f" (line {line_number})" if line_number else ""
            reason = name + (" ".join(str(error)[:300].split()) or "it refused") + where
        return json.dumps({"error": reason}).encode()

    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(answer(line) + b"\n")
        sys.stdout.buffer.flush()


def _rendered(template: str, values: Mapping[str, object]) -> str:
    pieces, length = [], 0
    for piece in _compiled(template).generate(values):
        length += len(piece)
        if length > MOST_CHARACTERS:
            raise ValueError(f"the template writes more than {MOST_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=8)
def _compiled(template: str) -> "Template":
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = tojson
    return environment.from_string(template)


if __name__ == "__main__":
    _serve()
