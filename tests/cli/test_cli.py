"""The command line as a process: pipes, ctrl-c, how it starts."""

import os
import signal
import subprocess
import sys

import pytest
from support.command import PROMPT, SHORT, SUMMARY, assert_refused, spawn

from gemma4 import Gemma4ForCausalLM


def test_command_streams_into_a_pipe():
    with spawn("generate", PROMPT, "--seed", "1", *SHORT) as process:
        out, err = process.communicate(b"", timeout=120)
    assert process.returncode == 0
    assert out.endswith(b"\n") and len(out) > 12
    assert SUMMARY.fullmatch(err.decode().strip())


def test_closed_pipe_is_quiet():
    with spawn("generate", PROMPT, "--greedy", "--max-new-tokens", "1500") as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=120) == 141
        assert process.stderr.read() == b""


def test_ctrl_c_ends_generate():
    with spawn("generate", PROMPT, "--greedy", "--max-new-tokens", "1500") as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
        assert b"Traceback" not in process.stderr.read()


def test_ctrl_c_ends_an_answer_of_the_chat_only():
    with spawn("chat", "--greedy", "--max-new-tokens", "1500") as process:
        process.stdin.write(b"My dear Jane,\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(b"/reset\n/exit\n", timeout=120)
    assert process.returncode == 0
    assert len(SUMMARY.findall(err.decode())) == 1
    assert "a new conversation" in err.decode()


def test_errors_of_the_command():
    with spawn("generate", PROMPT, "--model", "no-such-folder") as process:
        out, err = process.communicate(b"", timeout=120)
    assert_refused((process.returncode, out.decode(), err.decode()), "no-such-folder")


@pytest.fixture
def torch_that(tmp_path, monkeypatch):
    """Puts a module `torch` with this source before the real one, for processes."""

    def put(source):
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(source)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    return put


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["--version"], 0),
        (["generate", "a", "--bogus"], 2),
        (["generate", "a", "--device", "abacus"], 2),
        (["generate", "a", "--greedy", "--top-k", "3"], 2),
        (["generate", "a", "--think"], 2),
        (["generate", ""], 2),
        ([], 2),
    ],
)
def test_torch_is_not_imported_to_say_no(torch_that, argv, code):
    torch_that("raise SystemExit('torch is imported')")
    with spawn(*argv) as process:
        out, err = process.communicate(b"", timeout=120)
    assert process.returncode == code
    assert b"torch is imported" not in err
    assert (err.count(b"\n"), out) == (1, b"") if code else (out and not err)


@pytest.mark.parametrize("argv", [["generate", PROMPT], ["chat"], ["info"], ["bench"]])
def test_ctrl_c_while_starting_is_one_line(torch_that, argv):
    torch_that(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "except BaseException as error:\n    raise ImportError('half imported') from error\n"
    )
    with spawn(*argv) as process:
        out, err = process.communicate(b"", timeout=50)
    assert (process.returncode, out, err) == (130, b"", b"gemma4: interrupted\n")


def test_ctrl_c_at_the_end_changes_nothing():
    with spawn("info") as process:
        while not process.stdout.readline().startswith(b"ops "):
            assert process.poll() is None
        for _ in range(20):
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    # The last line is out while the command still runs: then it was interrupted, else it was done.
    assert (process.returncode, err) in ((0, b""), (130, b"gemma4: interrupted\n"))


def test_ctrl_c_while_weights_are_read_or_input_awaited_is_one_line(run, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Gemma4ForCausalLM, "from_pretrained", interrupt)
    assert run("generate", "a") == (130, "", "gemma4: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr("gemma4.cli.arguments.decoded", interrupt)
    assert run("generate", stdin=b"a") == (130, "", "gemma4: interrupted\n")


def test_names_are_imported_when_asked_for():
    code = (
        "import sys, gemma4\n"
        "assert 'torch' not in sys.modules and set(gemma4.__all__) <= set(dir(gemma4))\n"
        "assert all(getattr(gemma4, name).__name__ == name for name in gemma4.__all__)\n"
        "assert gemma4.cache.Cache is gemma4.Cache\n"
        "try:\n    gemma4.nothing\n"
        "except AttributeError as error:\n    print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout == b"module 'gemma4' has no attribute 'nothing'\n", done.stderr
