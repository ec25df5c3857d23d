"""`gemma4 generate` on the demo checkpoint."""

import io
import re
import sys

import pytest
import torch
from support.command import PROMPT, SHORT, SUMMARY

import gemma4_kernels
from gemma4 import Gemma4ForCausalLM, demo


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
        "--min-new-tokens 2 --repetition-penalty 1.5 --stop a --stop b. --kv-dtype fp8"
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
        "kv_dtype": "fp8",
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
