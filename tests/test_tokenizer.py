"""The tokenizer, chat template and streamer, on a small byte-fallback BPE trained here."""

import json
import random

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from gemma4 import demo
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
