"""The command in this process, and stand-ins for what the model says."""

import io
import sys

import pytest
import torch

from gemma4 import Gemma4ForCausalLM, demo
from gemma4.cli import main
from gemma4.tokenizer import Gemma4Tokenizer


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
