"""A text's score, against float64 over whole logits."""

import json
import math

import pytest
import torch
from support.tiny import ALL, DENSE, ids, tiny

from gemma4 import Gemma4ForCausalLM, Gemma4Tokenizer, demo
from gemma4.cli import main
from gemma4.score import CHUNK_TOKENS, score


def logs(model, window):
    return torch.log_softmax(model(window).logits[0, :-1].double(), -1)


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
@torch.no_grad()
def test_sums(options):
    """Windows longer than what is computed at once, and a last one that is short."""
    one, other = tiny(options), tiny(options, seed=1)
    text = ids(1, 2 * CHUNK_TOKENS + 41)[0].tolist()
    context = CHUNK_TOKENS + 30
    nats = others = agreed = apart = tokens = 0
    for begin in range(0, len(text), context - 1):
        window = torch.tensor([[2, *text[begin : begin + context - 1]]])
        p, q = logs(one, window), logs(other, window)
        of = window[0, 1:, None]
        nats, others = nats - p.gather(1, of).sum(), others - q.gather(1, of).sum()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        apart += (q.exp() * (q - p)).sum()
        tokens += len(of)
    made = score(one, text, other, context, bos=2)
    assert (made.tokens, made.agreed) == (tokens, agreed) and tokens == len(text)
    wanted = torch.stack([nats, others, apart])
    given = torch.tensor([made.nats, made.against_nats, made.divergence], dtype=torch.float64)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-4)
    assert made.bits_per_token == made.nats / math.log(2) / tokens
    alone = score(one, text, context=context, bos=2)
    assert alone.nats == made.nats and math.isnan(alone.divergence)


def test_a_model_agrees_with_itself():
    model = tiny(DENSE)
    made = score(model, ids(1, 50)[0].tolist(), model, 16)
    assert made.agreed == made.tokens == 46 and made.divergence == 0
    assert made.nats == made.against_nats


@pytest.mark.parametrize(("text", "context"), [([5], 8), ([], 8), ([5, 6, 7], 1)])
def test_what_cannot_be_scored_is_refused(text, context):
    with pytest.raises(ValueError, match="two tokens and fit a context"):
        score(tiny(DENSE), text, context=context, bos=2 if context == 1 else None)


def test_models_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="one vocab_size, got 97 and 96"):
        score(tiny(DENSE), [5, 6, 7], tiny(DENSE, vocab_size=96))


def test_logits_that_are_not_finite_are_no_score():
    model = tiny(DENSE)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        score(model, [5, 6, 7])


def test_the_command(capsys, tmp_path):
    (tmp_path / "text").write_text("It is a truth universally acknowledged, that a single man.")
    file, line = str(tmp_path / "text"), tmp_path / "line.json"
    words = ["score", file, "--against", str(demo.path()), "--context", "9", "--json", str(line)]
    assert main(words) == 0
    out = capsys.readouterr().out
    row = json.loads(line.read_text())
    text = Gemma4Tokenizer.from_pretrained(demo.path()).encode((tmp_path / "text").read_text())
    made = score(Gemma4ForCausalLM.from_pretrained(demo.path()), text[1:], context=9, bos=2)
    assert row["tokens"] == made.tokens == len(text) - 1 and row["nats"] == made.nats
    assert f"{made.bits_per_token:.4f} bits a token" in out and "100.00% the same" in out
    (tmp_path / "text").write_bytes(b"\xff")
    assert main(["score", file]) == 2
    assert f"{file} is not valid UTF-8 (byte 0)" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
