"""The command line as tests run it: as a process, and what all its refusals are like."""

import os
import re
import subprocess
import sys

PROMPT = "It is a truth universally acknowledged"
SHORT = ["--max-new-tokens", "12"]
SUMMARY = re.compile(
    r"(\d+) prompt tokens, (\d+) new tokens, [\d.]+ prompt tok/s, ([\d.]+|-) decode tok/s, "
    r"first token \d+ ms"
)


def spawn(*argv, **options) -> subprocess.Popen:
    """The command as a process; its stdio are pipes of bytes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, "-m", "gemma4", *argv], env=environment, **pipes, **options
    )


def assert_refused(result, sentence):
    """Exit code 2, nothing on stdout, and one line on stderr that holds `sentence`."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("gemma4: error: ") and err.endswith("\n") and err.count("\n") == 1
    assert sentence in err
