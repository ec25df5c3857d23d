"""Text as it is generated, token by token."""

import random

import pytest
import torch
from support.small_tokenizer import BOS, SPECIALS, TEXTS, TURN
from support.small_tokenizer import tokenizer as tokenizer
from tokenizers import Tokenizer, decoders

from gemma4.tokenizer import Gemma4Tokenizer, TextStreamer


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
