"""The command `gemma4`: generate, chat, info, check, bench, score, quantize.

Answers go to stdout; thoughts, rates and errors go to stderr. Exit codes: 0, 1 for a kernel that
failed its check, 2 for an error, 130 for ctrl-c, 141 for a pipe that was closed at the other end.

Next to nothing is imported up here: `main` sees to ctrl-c first, and torch, which takes seconds,
comes when the arguments are right.
"""

import sys

_INTERRUPTED = "gemma4: interrupted"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. argparse exits by itself on a wrong option.

    Without argv this is the process's own command, and ctrl-c cannot disturb its end.
    """
    try:
        code = _run(argv)
        if argv is None:
            _ignore_ctrl_c()
    except KeyboardInterrupt:
        if argv is None:
            _ignore_ctrl_c()
        code = 130
        print(_INTERRUPTED, file=sys.stderr)
    return code


def _run(argv: list[str] | None) -> int:
    import os
    import signal

    debug = False
    try:
        before = signal.getsignal(signal.SIGINT)
        # Half-imported modules turn a KeyboardInterrupt into whatever they like. Not where ctrl-c
        # means something else already; and threads have no say in it.
        guarded = before is signal.default_int_handler and _in_main_thread()
        if guarded:
            signal.signal(signal.SIGINT, _leave)
        try:
            from .arguments import complete, parse

            args = parse(argv)
            debug = args.debug
            complete(args)
            from . import commands
        finally:
            if guarded:
                signal.signal(signal.SIGINT, before)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        code = getattr(commands, args.command)(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        print(error_line(error), file=sys.stderr)
        return 2
    return code or 0


def error_line(error: BaseException) -> str:
    """An error as one line: its first one, with the type if it is not a plain refusal."""
    first = (str(error).strip().splitlines() or [""])[0]
    name = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return f"gemma4: error: {name}{first}"


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _ignore_ctrl_c() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(signal_number: int, frame: object) -> None:
    import os

    os.write(2, f"{_INTERRUPTED}\n".encode())
    os._exit(130)
