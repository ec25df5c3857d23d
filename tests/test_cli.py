"""The command line on the demo checkpoint: in this process, and as a real command in a pipe.

Longer than 400 lines because cli.py is one command, and its tests share the fixtures here.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import gemma4_kernels
from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig, demo
from gemma4.cli import main
from gemma4.tokenizer import Gemma4Tokenizer

PROMPT = "It is a truth universally acknowledged"
SHORT = ["--max-new-tokens", "12"]
SUMMARY = re.compile(
    r"(\d+) prompt tokens, (\d+) new tokens, [\d.]+ prompt tok/s, ([\d.]+|-) decode tok/s, "
    r"first token \d+ ms"
)


@pytest.fixture(scope="module")
def tokenizer():
    return Gemma4Tokenizer.from_pretrained(demo.path())


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command here: (exit code, stdout, stderr)."""

    def call(*argv, stdin: bytes | None = None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = main([str(word) for word in argv])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return call


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


# generate


def test_generate_streams_text_and_reports_rates(run, tokenizer, monkeypatch):
    pieces = []

    class Recorder(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Recorder())
    code, _, err = run("generate", PROMPT, "--greedy", *SHORT)
    assert code == 0
    assert len([piece for piece in pieces if piece]) > 6
    ids = tokenizer.encode(PROMPT)
    model = Gemma4ForCausalLM.from_pretrained(demo.path())
    new = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert "".join(pieces) == tokenizer.decode(new) + "\n"
    assert SUMMARY.fullmatch(err.strip()).group(1, 2) == (str(len(ids)), str(len(new)))


def test_same_seed_same_text(run):
    texts = [run("generate", PROMPT, "--seed", seed, *SHORT)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_is_deterministic_and_is_temperature_0_and_top_k_1(run):
    options = (["--greedy"], ["--greedy", "--seed", "3"], ["--temperature", "0"], ["--top-k", "1"])
    assert len({run("generate", PROMPT, *SHORT, *option)[1] for option in options}) == 1


def test_sampling_options_reach_the_model(run, monkeypatch):
    seen = {}

    def fake(model, input_ids, *, streamer, **options):
        seen.update(options)
        streamer.put(input_ids)
        streamer.end()

    monkeypatch.setattr(Gemma4ForCausalLM, "generate", fake)
    words = (
        "--temperature 0.5 --top-k 7 --top-p 0.25 --min-p 0.1 --seed 4 --max-new-tokens 3 "
        "--min-new-tokens 2 --repetition-penalty 1.5 --stop a --stop b."
    )
    code, out, err = run("generate", PROMPT, *words.split())
    expected = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.25,
        "min_p": 0.1,
        "seed": 4,
        "max_new_tokens": 3,
        "min_new_tokens": 2,
        "repetition_penalty": 1.5,
        "stop_strings": ["a", "b."],
    }
    assert {name: seen[name] for name in expected} == expected
    assert seen["do_sample"] is True
    # A model that says nothing is no error, and gives no rates.
    assert (code, out) == (0, "\n")
    assert "0 new tokens, - prompt tok/s, - decode tok/s, first token - ms" in err
    seen.clear()
    run("generate", PROMPT)
    assert (seen["do_sample"], seen["seed"]) == (None, None)
    assert not {"temperature", "top_k", "top_p", "min_p", "stop_strings"} & seen.keys()
    assert seen["max_new_tokens"] == 256


def test_an_answer_ends_with_a_stop_string(run):
    _, whole, _ = run("generate", PROMPT, "--greedy", "--max-new-tokens", "30")
    stop = whole[20:26]
    code, out, _ = run("generate", PROMPT, "--greedy", "--stop", stop, "--max-new-tokens", "30")
    assert code == 0
    assert whole.startswith(out[:-1]) and stop in out and len(out) < len(whole)
    assert stop not in out[: -len(stop) - 8]


@pytest.mark.parametrize("dash", [[], ["-"]])
def test_prompt_from_stdin(run, dash):
    piped = run("generate", *dash, "--greedy", *SHORT, stdin=PROMPT.encode() + b"\n")
    assert piped[:2] == run("generate", PROMPT, "--greedy", *SHORT)[:2]


def test_stdout_that_cannot_show_a_character(run, replies, monkeypatch):
    replies("café")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run("generate", PROMPT)[0] == 0
    assert stdout.buffer.getvalue() == b"caf?\n"


def test_chat_turn_and_raw_differ(run, tokenizer):
    prompts = []
    for options in ([], ["--raw"], ["--chat"], ["--chat", "--system", "Be brief."]):
        code, _, err = run("generate", PROMPT, "--greedy", *SHORT, *options)
        assert code == 0
        prompts.append(int(SUMMARY.search(err)[1]))
    turn = {"role": "user", "content": PROMPT}
    chat = tokenizer.apply_chat_template([turn])
    system = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, turn])
    raw = tokenizer.encode(PROMPT)
    assert prompts == [len(raw), len(raw), len(chat), len(system)]


def test_dtype_and_debug_and_version(run):
    assert run("generate", PROMPT, "--greedy", "--dtype", "float32", *SHORT)[0] == 0
    assert run("--version")[:2] == (0, gemma4_kernels.__version__ + "\n")
    code, _, err = run("generate", PROMPT, "--model", "no-such-folder", "--debug")
    assert code == 2
    assert "Traceback" in err and "gemma4: error: no-such-folder" in err


def test_thoughts_go_to_stderr(run, tokenizer, monkeypatch):
    def fake(model, input_ids, *, streamer, **options):
        assert tokenizer.token_id("<|think|>") in input_ids[0]
        streamer.put(input_ids)
        text = "<|channel>thought\nHm.<channel|>Yes.<turn|>"
        for index in tokenizer.encode(text, add_bos=False):
            streamer.put(torch.tensor([index]))
        streamer.end()

    monkeypatch.setattr(Gemma4ForCausalLM, "generate", fake)
    code, out, err = run("generate", "--chat", "--think", PROMPT)
    assert (code, out) == (0, "Yes.\n")
    assert err.startswith("thought\nHm.\n")


def test_answer_ends_where_the_positions_end(run, tokenizer):
    ids = [*tokenizer.encode("word " * 2030)][:2040]
    code, _, err = run("generate", tokenizer.decode(ids), "--greedy", stdin=b"")
    note, summary, _ = err.split("\n")
    assert code == 0
    assert re.fullmatch(r"only \d+ more tokens fit the model's positions", note)
    prompt, new = map(int, SUMMARY.fullmatch(summary).group(1, 2))
    assert prompt + new <= 2048


# Refusals


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


# chat


def test_chat_through_a_pipe_and_reset(run):
    _, alone, first = run("chat", "--greedy", *SHORT, stdin=b"My dear\n")
    script = b"My dear\nAnd then?\n/reset\n\nMy dear\n/exit\nnot read\n"
    code, out, err = run("chat", "--greedy", *SHORT, stdin=script)
    assert code == 0
    assert out.startswith(alone) and out.endswith(alone)
    assert len(out) > 2 * len(alone)
    counts = [int(match[1]) for match in SUMMARY.finditer(err)]
    assert len(counts) == 3
    assert counts[0] == counts[2] == int(SUMMARY.search(first)[1]) < counts[1]


def test_chat_runs_only_what_is_new(run, tokenizer):
    """The same words as without a cache, and the counts of what it held."""
    lines = ["My dear Jane", "And then?", "Tell me more"]
    # In bf16 a prompt run in two pieces may round to another word.
    options = ["--greedy", "--dtype", "float32", "--max-new-tokens", "9", "--system", "Brief."]
    code, out, err = run("chat", *options, stdin="\n".join(lines).encode())
    assert code == 0
    summaries = [line for line in err.splitlines() if SUMMARY.match(line)]
    assert len(summaries) == 3 and "reused" not in summaries[0]
    model = Gemma4ForCausalLM.from_pretrained(demo.path(), dtype="float32")
    turns, held = [{"role": "system", "content": "Brief."}], []
    eos = [*model.generation_config.eos_ids, tokenizer.turn_end_id]
    for line, said, summary in zip(lines, out.splitlines(), summaries, strict=True):
        turns.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(turns)
        same = [i for i, (one, other) in enumerate(zip(ids, held, strict=False)) if one != other]
        reused = same[0] if same else len(held)
        assert f"{len(ids)} prompt tokens" in summary
        assert not held or summary.endswith(f", {reused} prompt tokens reused")
        options = dict(max_new_tokens=9, do_sample=False, eos_token_id=eos)
        whole = model.generate(torch.tensor([ids]), **options)[0].tolist()
        assert tokenizer.decode(whole[len(ids) :]) == said
        turns.append({"role": "assistant", "content": said})
        held = whole[:-1]


def test_chat_says_which_line_is_not_utf8(run, replies, monkeypatch):
    said = replies("One.")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    bad = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    keys = iter([bad, "a\udcff", "a", EOFError])

    def typed(prompt):
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", typed)
    code, out, err = run("chat")
    assert (code, out) == (0, "One.\n\n")
    assert err.count("gemma4: error: the line is not valid UTF-8\n") == 2
    assert len(said.prompts) == 1


class Replies:
    """Stands for `generate`: says each reply in turn, and ends with ctrl-c those marked ^C."""

    def __init__(self, tokenizer, *replies):
        self.tokenizer, self.replies, self.prompts = tokenizer, list(replies), []

    def __call__(self, input_ids, *, streamer, **options):
        self.prompts.append(self.tokenizer.decode(input_ids[0], skip_special_tokens=False))
        self.options = options
        reply = self.replies.pop(0)
        streamer.put(input_ids)
        for index in self.tokenizer.encode(reply.removesuffix("^C"), add_bos=False):
            streamer.put(torch.tensor([index]))
        if reply.endswith("^C"):
            raise KeyboardInterrupt
        streamer.put(torch.tensor([self.tokenizer.turn_end_id]))
        streamer.end()


@pytest.fixture
def replies(tokenizer, monkeypatch):
    def fake(*texts):
        stand_in = Replies(tokenizer, *texts)
        monkeypatch.setattr(Gemma4ForCausalLM, "generate", staticmethod(stand_in))
        return stand_in

    return fake


def test_interrupted_answers_leave_a_sane_history(run, replies):
    said = replies("One and^C", "^C", "Three.")
    code, out, _ = run("chat", "--system", "Be kind.", stdin=b"a\nb\nc\n")
    assert code == 0
    assert out == "One and\n\nThree.\n"
    start = "<bos><|turn>system\nBe kind.<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n"
    kept = "One and<turn|>\n<|turn>user\n"
    assert said.prompts == [
        start,
        f"{start}{kept}b<turn|>\n<|turn>model\n",
        f"{start}{kept}c<turn|>\n<|turn>model\n",
    ]


def test_interrupted_generate_exits_with_130(run, replies):
    replies("One^C")
    code, out, err = run("generate", "a")
    assert (code, out) == (130, "One\n")
    assert "Traceback" not in err


def test_thoughts_do_not_enter_the_history(run, replies):
    said = replies("<|channel>thought\nHm.<channel|>Yes.", "No.")
    code, out, err = run("chat", "--think", stdin=b"a\nb\n")
    assert (code, out) == (0, "Yes.\nNo.\n")
    assert err.startswith("thought\nHm.\n")
    assert "<turn|>\n<|turn>model\nYes.<turn|>\n<|turn>user\nb" in said.prompts[1]
    assert all("<|think|>" in prompt for prompt in said.prompts)


def test_an_empty_answer_is_a_turn(run, replies):
    said = replies("", "Two.")
    assert run("chat", stdin=b"a\nb\n")[:2] == (0, "\nTwo.\n")
    assert "a<turn|>\n<|turn>model\n<turn|>\n<|turn>user\nb" in said.prompts[1]


def test_chat_stops_at_the_turn_end_whatever_the_config_says(run, replies, tokenizer, tmp_path):
    folder = shutil.copytree(demo.path(), tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    said = replies("Yes.", "Yes.")
    assert run("chat", "--model", folder, stdin=b"a\n")[0] == 0
    assert sorted(said.options["eos_token_id"]) == [1, tokenizer.turn_end_id]
    assert run("generate", "a", "--model", folder)[0] == 0
    assert said.options["eos_token_id"] == [1]


def test_chat_at_a_terminal(run, replies, monkeypatch):
    said = replies("One.", "Two.")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    keys = iter([KeyboardInterrupt, "a", "", "word " * 3000, "b", EOFError])

    def typed(prompt):
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", typed)
    code, out, err = run("chat")
    assert code == 0
    assert out == "\nOne.\nTwo.\n\n"
    assert "ctrl-d leaves" in err
    # What does not fit is refused and forgotten, and the conversation goes on.
    assert "gemma4: error: the prompt has" in err
    assert "One.<turn|>\n<|turn>user\nb<turn|>" in said.prompts[1]


def test_chat_that_outgrows_the_model_fails_in_a_pipe(run, replies):
    replies("One.")
    code, _, err = run("chat", stdin=b"a\n" + b"word " * 3000 + b"\nb\n")
    assert code == 2
    assert "gemma4: error: the prompt has" in err


# info and bench


def test_info(run):
    code, out, err = run("info")
    build = gemma4_kernels.build_info()
    assert (code, err) == (0, "")
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert rows["gemma4-kernels"] == build["version"]
    assert rows["torch"] == torch.__version__
    assert rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (build["reason"] or "CUDA kernels") in rows["in use"]
    assert "rms_norm" in rows["ops"]
    assert "model" not in rows


def test_info_where_kernels_are_compiled(run, monkeypatch):
    build = dict(version="1", torch="2", cuda=True, reason=None, archs=["sm_90a"], device="A GPU")
    build["kernels"] = ["geglu", "rms_norm"]
    monkeypatch.setattr(gemma4_kernels, "build_info", lambda: {**build, "abi": "2.11"})
    _, out, _ = run("info")
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert rows["compiled for"] == "sm_90a"
    assert (rows["device"], rows["in use"], rows["abi"]) == ("A GPU", "CUDA kernels", "2.11")
    assert rows["kernels for"] == "geglu, rms_norm"
    build["device"] = None
    _, out, _ = run("info")
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert rows["in use"] == "eager torch: torch sees no CUDA device"


def test_info_on_a_model(run):
    code, out, _ = run("info", "--model", demo.path())
    assert code == 0
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    config = Gemma4TextConfig.from_pretrained(demo.path())
    parameters = Gemma4ForCausalLM.from_pretrained(demo.path()).num_parameters()
    assert rows["parameters"] == f"{parameters / 1e6:.2f} M"
    assert rows["layers"].startswith(f"{config.num_hidden_layers}, ")
    assert rows["dtype"] == config.dtype
    assert rows["released as"] == "-"
    assert "model.safetensors (" in rows["files"]


def test_info_knows_the_released_sizes(run, tmp_path):
    for name in ("E2B", "26B-A4B"):
        Gemma4TextConfig.preset(name).save_pretrained(tmp_path)
        assert re.search(rf"^released as +{name}$", run("info", "--model", tmp_path)[1], re.M)


def test_bench_reports_all_runs_but_the_warm_up(run, monkeypatch, tmp_path):
    # Seconds that each put takes to come, by run: a slow warm-up, then three measured runs.
    steps = iter([step for step in (100.0, 1.0, 4.0, 2.0) for _ in range(5)])
    now = 0.0

    def perf_counter():
        nonlocal now
        now += next(steps)
        return now

    monkeypatch.setattr("gemma4.cli.answer.time", SimpleNamespace(perf_counter=perf_counter))
    monkeypatch.setattr("gemma4.measure.copy_bandwidth", lambda device: 20e9)
    monkeypatch.setattr("gemma4.measure.gemm_rate", lambda device, dtype: 3e12)
    monkeypatch.setattr("gemma4.measure.decode_bytes", lambda model: 4e9)
    words = "--prompt-tokens 16 --new-tokens 4 --repeat 3 --json"
    code, out, err = run("bench", *words.split(), tmp_path / "rows")
    assert (code, err) == (0, "")
    title, head, *rows, rates, limit = out.splitlines()
    assert "bfloat16" in title and "3 runs" in title and title.startswith("demo: ")
    assert head.split() == ["tokens", "median", "least", "most"]
    assert [row.split() for row in rows] == [
        ["prompt", "16", "8.0", "4.0", "16.0", "tok/s"],
        ["decode", "4", "0.5", "0.2", "1.0", "tok/s"],
        ["first", "token", "1", "2000.0", "1000.0", "4000.0", "ms"],
    ]
    assert rates == "copies move 20.0 GB/s, matrix products make 3.000 TFLOP/s"
    assert limit == "reading the weights allows 5.0 decode tok/s: 10% reached"
    (line,) = (tmp_path / "rows").read_text().splitlines()
    assert json.loads(line)["decode_tok_s"] == [1.0, 0.25, 0.5]


def test_bench_gives_no_limit_where_a_cache_may_hold_the_weights(run, monkeypatch, tmp_path):
    """And calls a folder by its name."""
    monkeypatch.setattr("gemma4.measure.copy_bandwidth", lambda device: 20e9)
    monkeypatch.setattr("gemma4.measure.gemm_rate", lambda device, dtype: 3e12)
    folder = shutil.copytree(demo.path(), tmp_path / "tiny-austen")
    words = ["--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1", "--json"]
    code, out, _ = run("bench", "--model", f"{folder}/.", *words, tmp_path / "rows")
    assert code == 0
    assert out.startswith("tiny-austen: ") and "reading the weights" not in out
    row = json.loads((tmp_path / "rows").read_text())
    assert (row["model"], row["decode_limit_tok_s"]) == ("tiny-austen", None)


# As a process


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
