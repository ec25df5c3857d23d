"""`gemma4 chat` on the demo checkpoint."""

import io
import json
import shutil
import sys

import torch
from support.command import SHORT, SUMMARY

from gemma4 import Gemma4ForCausalLM, demo


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
