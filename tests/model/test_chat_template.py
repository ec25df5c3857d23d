"""Chat templates: what they render, what they may use, and what is refused."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.small_tokenizer import BOS, SPECIALS, TURN, save, small_tokenizer, with_template
from support.small_tokenizer import tokenizer as tokenizer

from gemma4 import template
from gemma4.tokenizer import Gemma4Tokenizer

USER = {"role": "user", "content": "Hi there"}
SYSTEM = {"role": "system", "content": "You are terse."}
HI = "<|turn>user\nHi there<turn|>\n"
CUE = "<|turn>model\n"


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([USER], {}, f"<bos>{HI}{CUE}"),
        (
            [USER],
            {"enable_thinking": True},
            f"<bos><|turn>system\n<|think|>\n<turn|>\n{HI}{CUE}",
        ),
        ([SYSTEM, USER], {}, f"<bos><|turn>system\nYou are terse.<turn|>\n{HI}{CUE}"),
        (
            [SYSTEM, USER],
            {"enable_thinking": True},
            f"<bos><|turn>system\n<|think|>\nYou are terse.<turn|>\n{HI}{CUE}",
        ),
        ([USER], {"add_generation_prompt": False}, f"<bos>{HI}"),
        (
            [
                {"role": "user", "content": "  Hi there \n"},
                {"role": "assistant", "content": "<|channel>thought\nhm<channel|> Yes. "},
                USER,
            ],
            {},
            f"<bos>{HI}<|turn>model\nYes.<turn|>\n{HI}{CUE}",
        ),
    ],
    ids=["user", "thinking", "system", "system_thinking", "no_cue", "three_turns"],
)
def test_chat_renderings(tokenizer, messages, options, expected):
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == expected
    ids = tokenizer.apply_chat_template(messages, **options)
    assert ids[:2] == [BOS, TURN]
    assert ids.count(BOS) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_template_refusal_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="Roles must alternate"):
        tokenizer.apply_chat_template([USER, USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.more }}",
        "{% for %}",
        "{{ 'a' + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
    ids=["undefined", "syntax", "type", "escape", "mutation"],
)
def test_broken_template_is_a_value_error(tmp_path, source):
    with pytest.raises(ValueError, match=r"\w"):
        with_template(tmp_path, source).apply_chat_template([USER])


NAMESPACE = "{% set n = namespace(x=START) %}{% for i in range(64) %}STEP{% endfor %}"


def grown(start: str, step: str) -> str:
    return NAMESPACE.replace("START", start).replace("STEP", "{% set n.x = " + step + " %}")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2, "did not end within"),
        (grown("[1]", "[n.x, n.x]") + "{{ n.x | string | length }}", "512 MiB of memory"),
        ("{{ ('x' * 10**10) | length }}", "512 MiB of memory"),
        ("{{ 'x' | center(10**10) }}", "512 MiB of memory"),
        ("{{ '%9999999999d' | format(1) }}", "512 MiB of memory"),
        ("{{ '{:>9999999999}'.format(1) }}", "512 MiB of memory"),
        (grown("'ab'", "n.x ~ n.x") + "{{ n.x | length }}", "512 MiB of memory"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %}", "more than 4194304 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deep"),
        ("{{ " + "(" * 100_000 + ")" * 100_000 + " }}", "nested too deep"),
        ("{% if 1 %}" * 500 + "{% endif %}" * 500, "nested too deep|SyntaxError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("a\nb\n{% for %}", r"\(line 3\)"),
        ("{{ raise_exception('one\ntwo') }}", "one two$"),
        ("{{ raise_exception('') }}", "it refused$"),
    ],
)
def test_templates_are_bounded(tmp_path, monkeypatch, source, sentence):
    monkeypatch.setattr(template, "SECONDS", 1.0)
    loaded = with_template(tmp_path, source)
    with pytest.raises(ValueError, match=sentence) as error:
        loaded.apply_chat_template([USER])
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/chat_template.jinja: ")
    assert "\n" not in said and len(said) < 500
    monkeypatch.undo()  # a machine may be slow
    plain = with_template(tmp_path, "{{ messages[0].content }}")
    assert plain.apply_chat_template([USER], tokenize=False) == "Hi there"


def test_templates_of_threads_and_forks(tokenizer):
    """One process serves all threads, and a fork, which a trainer's workers are, has its own."""
    asked = [[{"role": "user", "content": str(i)}] for i in range(40)]
    expected = [f"<bos><|turn>user\n{i}<turn|>\n{CUE}" for i in range(40)]

    def render(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(render, asked)) == expected
    if hasattr(os, "fork"):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if [render(messages) for messages in asked] == expected else 1)
        assert [render(messages) for messages in asked] == expected
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "must be a list of at least one message"),
        ("Hi", "must be a list of at least one message"),
        (USER, "must be a list of at least one message"),
        (None, "must be a list of at least one message"),
        ([USER, "Hi"], r"messages\[1\] must be a dict"),
        ([{"content": "Hi"}], r"messages\[0\] must have a role, a text, got None"),
        ([{"role": 5, "content": "Hi"}], r"messages\[0\] must have a role, a text, got 5"),
        ([{"role": "user"}], r"messages\[0\] must have a content, text, got None"),
        ([{"role": "user", "content": 5}], r"messages\[0\] must have a content, text, got 5"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "text model, got 'image'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "text model, got 'audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must hold parts"),
        ([{"role": "user", "content": ["Hi"]}], "must hold parts"),
        ([{"role": "user", "content": "Hi", "mine": {1}}], "must be plain data"),
    ],
)
def test_wrong_conversations_are_named(tokenizer, messages, sentence):
    with pytest.raises(ValueError, match=sentence):
        tokenizer.apply_chat_template(messages)


def test_text_in_parts(tokenizer):
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": " there"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert text == f"<bos><|turn>user\nHithere<turn|>\n{CUE}"


def test_what_templates_may_use(tmp_path):
    source = (
        "  {% for n in range(9) %}\n{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}\n"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}{{ mine }}"
        "{{ eos_token }}{{ pad_token }}"
    )
    loaded = with_template(tmp_path, source)
    text = loaded.apply_chat_template([USER], tokenize=False, mine="!")
    assert text == '01{"a": "<é>"}4!<eos><pad>'
    assert loaded.apply_chat_template([USER], mine="!")[0] == BOS


@pytest.mark.parametrize(
    "template",
    ["{{ bos_token }}A", [{"name": "default", "template": "{{ bos_token }}A"}]],
    ids=["string", "list"],
)
def test_template_in_the_config(tmp_path, template):
    loaded = Gemma4Tokenizer.from_pretrained(save(tmp_path, config={"chat_template": template}))
    assert loaded.apply_chat_template([USER], tokenize=False) == "<bos>A"
    loaded = Gemma4Tokenizer.from_pretrained(save(tmp_path, template="the file wins"))
    assert loaded.apply_chat_template([USER], tokenize=False) == "the file wins"


def test_named_templates(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    loaded = Gemma4Tokenizer.from_pretrained(save(tmp_path, config={"chat_template": named}))
    assert loaded.apply_chat_template([USER], tokenize=False) == "D"
    assert loaded.apply_chat_template([USER], tokenize=False, tools=[{}]) == "T"
    save(tmp_path, config={"chat_template": [{"name": "rag", "template": "R"}]})
    with pytest.raises(ValueError, match=r"without a default chat template \(has: rag\)"):
        Gemma4Tokenizer.from_pretrained(tmp_path).apply_chat_template([USER])


@pytest.mark.parametrize("missing", ["<|turn>", "<turn|>"])
def test_chat_needs_turn_tokens(tmp_path, missing):
    save(tmp_path, small_tokenizer([token for token in SPECIALS if token != missing]), template="")
    loaded = Gemma4Tokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded.encode("the dog")) == "the dog"
    with pytest.raises(ValueError, match="token, which a chat needs") as error:
        loaded.apply_chat_template([USER])
    assert missing in str(error.value)


def test_chat_needs_a_template(tmp_path):
    with pytest.raises(ValueError, match=r"without a default chat template \(has: none\)"):
        Gemma4Tokenizer.from_pretrained(save(tmp_path)).apply_chat_template([USER])
