"""The tokenizer: its ids, its files, and what it refuses."""

import json

import pytest
import torch
from support.small_tokenizer import (
    BOS,
    SENTENCES,
    SPECIALS,
    TEXTS,
    save,
    small_tokenizer,
)
from support.small_tokenizer import tokenizer as tokenizer

from gemma4.tokenizer import Gemma4Tokenizer


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
