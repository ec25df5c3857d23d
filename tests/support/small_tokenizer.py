"""A small byte-fallback BPE, trained here, in a folder like a checkpoint's."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from gemma4 import demo
from gemma4.tokenizer import Gemma4Tokenizer

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
