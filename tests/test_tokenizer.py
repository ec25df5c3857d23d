"""The tokenizer, chat template and streamer, on a small byte-fallback BPE trained here."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from gemma4 import demo, template
from gemma4.tokenizer import Gemma4Tokenizer, TextStreamer

SPECIALS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>"),
    *("<|channel>", "<channel|>", "<|tool_response>"),
]
BOS, TURN = SPECIALS.index("<bos>"), SPECIALS.index("<|turn>")
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "user and model take turns: Hi there, be terse; you are welcome.",
    "Ein Mädchen saß auf der Brücke.\nDort saß es lange.",
]
TEXTS = [
    *SENTENCES,
    " leading, trailing and  double   spaces ",
    "line\n\nbreaks\tand tabs\r\n",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🎉, 漢字, עברית, a\u0301 and a real \ufffd",
    "<0x41> is text, ▁ comes back as a space",
]


def small_tokenizer(specials=SPECIALS) -> Tokenizer:
    """A BPE in the shape of Gemma 4's: byte fallback, spaces as U+2581, its own BOS on top."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    learner.train_from_iterator(SENTENCES, BpeTrainer(vocab_size=160, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    if "<bos>" in specials:
        bos = ("<bos>", tokenizer.token_to_id("<bos>"))
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return tokenizer


def save(folder, tokenizer=None, config=None, template=None):
    """A checkpoint folder without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (tokenizer or small_tokenizer()).save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Gemma4Tokenizer:
    template = (demo.path() / "chat_template.jinja").read_text(encoding="utf-8")
    return Gemma4Tokenizer.from_pretrained(
        save(tmp_path_factory.mktemp("checkpoint"), template=template)
    )


def with_template(folder, source) -> Gemma4Tokenizer:
    return Gemma4Tokenizer.from_pretrained(save(folder, template=source))


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("text", ["the dog", "<bos>the dog", "<bos><bos>the dog", "", "<bos>"])
def test_exactly_one_bos(tokenizer, text, add_bos):
    ids = tokenizer.encode(text, add_bos)
    wanted = add_bos is not False or text.startswith("<bos>")
    assert ids.count(BOS) == wanted
    assert ids[:1] == [BOS] or not wanted
    assert tokenizer.decode(ids) == text.replace("<bos>", "")


def test_bos_follows_the_config(tmp_path):
    plain = Gemma4Tokenizer.from_pretrained(save(tmp_path, config={"add_bos_token": False}))
    assert BOS not in plain.encode("the dog")
    assert plain.encode("the dog", add_bos=True)[0] == BOS
    assert plain.encode("<bos>the dog").count(BOS) == 1


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert tokenizer.decode(torch.tensor(ids), skip_special_tokens=False).startswith("<bos>")


def test_old_turn_string_is_ordinary_text(tokenizer):
    ids = tokenizer.encode("<start_of_turn>a<end_of_turn>")
    assert not set(ids[1:]) & tokenizer.skipped_ids
    assert tokenizer.decode(ids) == "<start_of_turn>a<end_of_turn>"


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800")


def test_ids_of_special_tokens(tokenizer):
    found = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert found == (BOS, SPECIALS.index("<eos>"), SPECIALS.index("<pad>"))
    assert tokenizer.turn_end_id == SPECIALS.index("<turn|>")
    assert len(tokenizer) > len(SPECIALS) + 256


def test_batch_is_padded_on_the_left(tokenizer):
    batch = tokenizer(["dog", "the quick brown fox", ""])
    lengths = [len(tokenizer.encode(text)) for text in ("dog", "the quick brown fox", "")]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, mask, length in zip(batch["input_ids"], batch["attention_mask"], lengths, strict=True):
        assert mask[-length:].all()
        assert row[:-length].tolist() == [tokenizer.pad_token_id] * (max(lengths) - length)
        assert row[-length] == BOS
    assert tokenizer("dog")["input_ids"].tolist() == [tokenizer.encode("dog")]
    with pytest.raises(ValueError, match="texts is empty"):
        tokenizer([])


def test_padding_and_truncation_of_the_file_do_not_apply(tmp_path):
    backend = small_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    loaded = Gemma4Tokenizer.from_pretrained(save(tmp_path, backend))
    assert loaded.decode(loaded.encode(SENTENCES[0])) == SENTENCES[0]


@pytest.mark.parametrize("missing", ["<bos>", "<eos>", "<pad>"])
def test_missing_token_is_named(tmp_path, missing):
    save(tmp_path, small_tokenizer([token for token in SPECIALS if token != missing]))
    with pytest.raises(ValueError, match=f"tokenizer.json has no {missing} token"):
        Gemma4Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["<stop>", {"content": "<stop>"}])
def test_names_of_tokens_come_from_the_config(tmp_path, name):
    backend = small_tokenizer([token.replace("<eos>", "<stop>") for token in SPECIALS])
    loaded = Gemma4Tokenizer.from_pretrained(save(tmp_path, backend, {"eos_token": name}))
    assert loaded.eos_token == "<stop>"
    assert loaded.eos_token_id == 1


def test_bad_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no tokenizer.json"):
        Gemma4Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Gemma4Tokenizer.from_pretrained(tmp_path)
    for content, complaint in (("{", "is not valid JSON"), ("[]", "must hold a JSON object")):
        save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json {complaint}"):
            Gemma4Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"add_bos_token": "false"}, "add_bos_token must be true or false, got 'false'"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false, got 1"),
        ({"bos_token": 5}, "bos_token must be a token's text, got 5"),
        ({"eos_token": {"content": ["<eos>"]}}, "eos_token must be a token's text"),
        ({"chat_template": 5}, "chat_template must be text or a list of templates, got 5"),
        ({"chat_template": ["x"]}, r"chat_template\[0\] must have a name and a template, got 'x'"),
        ({"chat_template": [{"name": "default"}]}, r"chat_template\[0\] must have a name"),
        ({"chat_template": [{"template": "x"}]}, r"chat_template\[0\] must have a name"),
        ({"chat_template": {"default": 5}}, r"chat_template\[0\] must have .* got .*5"),
    ],
)
def test_wrong_entries_are_named(tmp_path, config, sentence):
    save(tmp_path, config=config)
    with pytest.raises(ValueError, match=rf"{tmp_path}/tokenizer_config\.json: {sentence}"):
        Gemma4Tokenizer.from_pretrained(tmp_path)


def test_files_that_are_no_text_are_named(tmp_path):
    save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chat_template\.jinja must be UTF-8"):
        Gemma4Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b" " * 2**21)
    with pytest.raises(ValueError, match=r"chat_template\.jinja must be at most 1048576 bytes"):
        Gemma4Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a git-lfs pointer"):
        Gemma4Tokenizer.from_pretrained(tmp_path)
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        save(tmp_path)
        (tmp_path / name).write_bytes(deep)
        with pytest.raises(ValueError, match=rf"{name} is not"):
            Gemma4Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_more_tokens_than_the_model_has(tmp_path, tokenizer, nested):
    save(tmp_path)
    sentence = rf"tokenizer\.json must have no more tokens .* {len(tokenizer) - 1}, got"
    for rows, fits in ((len(tokenizer), True), (len(tokenizer) - 1, False)):
        config = {"vocab_size": rows}
        config = {"text_config": config} if nested else config
        (tmp_path / "config.json").write_text(json.dumps(config))
        if fits:
            assert len(Gemma4Tokenizer.from_pretrained(tmp_path)) == rows
        else:
            with pytest.raises(ValueError, match=sentence):
                Gemma4Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "templates",
    [{}, {"default": "{{ bos_token }}ä\r\n"}, {"default": "D", "tool_use": "T"}, {"rag": "R"}],
)
def test_saved_and_loaded(tmp_path, templates):
    config = {"add_bos_token": False, "eos_token": {"content": "<eos>"}, "mine": [1, "é"]}
    made = Gemma4Tokenizer(small_tokenizer(), config, templates)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "chat_template.jinja").write_text("an older one")
    made.save_pretrained(tmp_path / "new")
    again = Gemma4Tokenizer.from_pretrained(tmp_path / "new")
    assert again.templates == templates
    assert {k: v for k, v in again.config.items() if k != "chat_template"} == config
    assert again.add_bos_token is False
    for text in TEXTS:
        assert again.encode(text) == made.encode(text)


# Chat

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


# Streaming


def streamed(tokenizer, ids, prompt=(BOS, TURN), **options) -> list[str]:
    pieces: list[str] = []
    streamer = TextStreamer(tokenizer, pieces.append, **options)
    streamer.put(torch.tensor([list(prompt)]))
    for index in ids:
        streamer.put(torch.tensor([index]))
    streamer.end()
    return pieces


def byte_ids(tokenizer, data: bytes) -> list[int]:
    return [tokenizer.token_id(f"<0x{byte:02X}>") for byte in data]


def random_text(rng) -> str:
    ranges = [(32, 127), (160, 0x250), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x200D, 0x200E)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 60)))


def test_streams_what_decode_gives_on_random_text(tokenizer):
    rng = random.Random(0)
    for text in [*TEXTS, *(random_text(rng) for _ in range(300))]:
        pieces = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text.replace("▁", " ")
        assert all(pieces)
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_streams_what_decode_gives_on_random_ids(tokenizer):
    rng = random.Random(1)
    first = len(SPECIALS)
    for _ in range(1000):
        ends = rng.choice([(0, len(tokenizer)), (first, first + 256), (first + 128, first + 300)])
        ids = [rng.randrange(*ends) for _ in range(rng.randrange(40))]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_whole_characters_only(tokenizer):
    word = tokenizer.encode("the", add_bos=False)
    ids = [*word, *byte_ids(tokenizer, "🎉é".encode()), *word, *byte_ids(tokenizer, b"\xe2\x82")]
    assert [p for p in streamed(tokenizer, ids) if "🎉" in p] == [
        "🎉é" + streamed(tokenizer, word)[0]
    ]
    assert "".join(streamed(tokenizer, ids)) == "the🎉éthe\ufffd\ufffd"


def test_special_tokens_are_skipped_even_inside_a_character(tokenizer):
    high, low = byte_ids(tokenizer, "é".encode())
    assert streamed(tokenizer, [high, TURN, low, TURN]) == ["é"] == [tokenizer.decode([high, low])]


def test_first_token_that_decodes_differently(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    stripping = Gemma4Tokenizer(backend)
    ids = stripping.encode("  the dog  sleeps ")
    assert "".join(streamed(stripping, ids)) == stripping.decode(ids) == " the dog  sleeps "


def test_cost_per_token_is_constant(tokenizer, monkeypatch):
    decoded = 0

    def counting(ids, skip_special_tokens=True):
        nonlocal decoded
        decoded += len(ids)
        return Gemma4Tokenizer.decode(tokenizer, ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counting, raising=False)
    ids = tokenizer.encode("the dog sleeps 🎉🎉 " * 300) + byte_ids(tokenizer, b"\xff" * 1000)
    streamed(tokenizer, ids)
    assert decoded <= 3 * len(ids)


def test_prompt_is_written_on_demand_and_the_streamer_serves_again(tokenizer):
    prompt, new = tokenizer.encode("the dog"), tokenizer.encode(" sleeps", add_bos=False)
    assert "".join(streamed(tokenizer, new, prompt, skip_prompt=False)) == "the dog sleeps"
    pieces: list[str] = []
    streamer = TextStreamer(tokenizer, pieces.append)
    for _ in range(2):
        streamer.put(torch.tensor(prompt))
        streamer.put(torch.tensor(new[:1]))
        streamer.put(torch.tensor([new[1:]]))
        streamer.end()
    assert "".join(pieces) == " sleeps sleeps"


def test_batch_cannot_be_streamed(tokenizer):
    streamer = TextStreamer(tokenizer, print)
    with pytest.raises(ValueError, match="got a batch of 2"):
        streamer.put(torch.zeros(2, 3, dtype=torch.int64))
    streamer = TextStreamer(tokenizer, print)
    streamer.put(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="got a batch of 2"):
        streamer.put(torch.zeros(2, dtype=torch.int64))
