"""What the command line refuses: exit code 2 and one line."""

import shutil
import sys

import pytest
import torch
from support.command import SHORT, assert_refused

from gemma4 import Gemma4ForCausalLM, demo


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "COMMAND"),
        (["dream"], "invalid choice"),
        (["generate", ""], "the prompt is empty"),
        (["generate", " \n"], "the prompt is empty"),
        (["generate", "a", "--bogus"], "--bogus"),
        (["generate", "a", "--temperature", "-1"], "--temperature: must be a number of at least 0"),
        (["generate", "a", "--temperature", "nan"], "--temperature"),
        (["generate", "a", "--top-p", "0"], "--top-p: must be above 0 and at most 1, got '0'"),
        (["generate", "a", "--top-p", "1.01"], "--top-p"),
        (["generate", "a", "--top-k", "-3"], "--top-k"),
        (["generate", "a", "--min-p", "1.5"], "--min-p: must be at least 0 and at most 1"),
        (["generate", "a", "--repetition-penalty", "0"], "--repetition-penalty: must be a number"),
        (["generate", "a", "--min-new-tokens", "-1"], "--min-new-tokens"),
        (["generate", "a", "--stop", ""], "--stop: must not be empty"),
        (["generate", "a", "--stop", "\udcff"], "not valid UTF-8"),
        (["generate", "a", "--seed", "x"], "--seed"),
        (["generate", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "a", "--greedy", "--top-k", "3"], "--greedy goes with no"),
        (["generate", "a", "--greedy", "--min-p", "0.1"], "--greedy goes with no"),
        (["generate", "a", "--dtype", "int3"], "--dtype"),
        (["generate", "a", "--kv-dtype", "int8"], "--kv-dtype"),
        (["bench", "--compile", "--kv-dtype", "fp8"], "--compile goes with no --kv-dtype"),
        (["generate", "a", "--device", "abacus"], "--device: must be cpu, cuda or cuda:N"),
        (["generate", "a", "--device", "cuda:99"], "torch sees no such device"),
        (["generate", "a", "--ple-device", "cuda:99"], "--ple-device"),
        (["generate", "a", "--model", "no-such-folder"], "no-such-folder is neither a folder"),
        (["generate", "a", "--model", "\udcff"], "not valid UTF-8"),
        (["generate", "a", "--system", "b"], "--system and --think need --chat"),
        (["generate", "a", "--think"], "--system and --think need --chat"),
        (["generate", "a", "--raw", "--chat"], "not allowed with"),
        (["generate", "a\udcff"], "not valid UTF-8"),
        (["generate", "word " * 3000], "positions must hold it and its answer"),
        (["chat", "--system", "\udcff"], "not valid UTF-8"),
        (["chat", "--model", "no-such-folder"], "no-such-folder"),
        (["info", "--model", "no-such-folder"], "no-such-folder"),
        (["bench", "--model", "no-such-folder"], "no-such-folder"),
        (["bench", "--repeat", "0"], "--repeat"),
        (["bench", "--new-tokens", "1"], "--new-tokens"),
        (["bench", "--prompt-tokens", "4000"], "4064 tokens do not fit the model's 2048 positions"),
    ],
)
def test_refused(run, argv, sentence):
    assert_refused(run(*argv), sentence)


def test_a_prompt_is_refused_before_the_weights_are_read(run, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(Gemma4ForCausalLM, "from_pretrained", fail)
    for option in ("--raw", "--chat"):
        result = run("generate", "word " * 3000, option)
        assert_refused(result, "positions must hold it and its answer")


def test_cuda_is_refused_where_there_is_none(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert_refused(run("generate", "a", "--device", "cuda"), "cuda is asked for")


def test_stdin_is_refused(run, monkeypatch):
    assert_refused(run("generate", stdin=b"abc\xff"), "stdin is not valid UTF-8 (byte 3)")
    assert_refused(run("generate", stdin=b"\n"), "the prompt is empty")
    assert_refused(run("chat", stdin=b"\xff\n"), "stdin is not valid UTF-8")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert_refused(run("generate"), "no prompt")


def test_broken_folders_are_refused(run, tmp_path):
    command = ["generate", "a", "--model", tmp_path]
    assert_refused(run(*command), f"{tmp_path} holds no config.json")
    for name, complaint in (
        ("config.json", "holds no tokenizer.json"),
        ("tokenizer.json", "holds no model.safetensors"),
        ("model.safetensors", ""),
    ):
        shutil.copy(demo.path() / name, tmp_path)
        result = run(*command, *SHORT)
        if complaint:
            assert_refused(result, complaint)
    assert result[0] == 0
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert_refused(run(*command), "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    assert_refused(run(*command), "config.json is not valid JSON")
    assert_refused(run("generate", "a", "--chat", "--model", tmp_path), "config.json")


def test_chat_needs_a_template(run, tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(demo.path() / name, tmp_path)
    for argv in (["generate", "--chat", "a"], ["chat"]):
        assert_refused(run(*argv, "--model", tmp_path, stdin=b"a\n"), "chat template")


def test_surprises_are_one_line_too(run, monkeypatch):
    def fail(model, *args, **options):
        raise RuntimeError("out of memory\nat this address\nand that one")

    monkeypatch.setattr(Gemma4ForCausalLM, "generate", fail)
    assert_refused(run("generate", "a"), "gemma4: error: RuntimeError: out of memory\n")
