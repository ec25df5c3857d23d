"""What generate chooses, against plain transformers: ids, scores, ends of rows, several answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny
from support.expect import NoHostReads
from torch import Tensor

from gemma4 import Gemma4ForCausalLM, Gemma4Tokenizer, GenerationConfig, demo
from gemma4.generate.sampling import Sampler, processors
from gemma4.generate.stopping import StopStrings

transformers = pytest.importorskip("transformers", minversion="5.24")

GOLDEN = Path(__file__).parents[1] / "golden"
NEW = 10
close = torch.testing.assert_close


def both(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    theirs = transformers.Gemma4ForCausalLM.from_pretrained(
        GOLDEN / name, attn_implementation="eager"
    )
    return Gemma4ForCausalLM.from_pretrained(GOLDEN / name), theirs.eval()


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    return both("e2b_like")


def prompt(batch: int = 2, width: int = 9) -> dict[str, Tensor]:
    """Ids, the first row of them padded on the left."""
    ids = torch.randint(3, 96, (batch, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def favour_even(ids: Tensor, scores: Tensor) -> Tensor:
    """Depends on the ids so far."""
    even = torch.arange(scores.shape[1]) % 2 == 0
    return scores + even * (0.5 + ids[:, -1:] % 3)


def as_theirs(options: dict) -> dict:
    given = options.get("logits_processor", [])
    listed = given if isinstance(given, list) else [given]
    return dict(options, logits_processor=transformers.LogitsProcessorList(listed))


RECORD = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(repetition_penalty=1.7),
        dict(repetition_penalty=0.6),
        dict(min_new_tokens=6),
        dict(logits_processor=[favour_even]),
        dict(repetition_penalty=1.3, min_new_tokens=4, logits_processor=favour_even),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_greedy_ids_scores_and_logits(models, options: dict) -> None:
    ours, theirs = models
    free = ours.generate(**prompt(), max_new_tokens=NEW, eos_token_id=[])
    # An early end for one row, so that the pads behind it count too.
    eos = [int(free[1, 9 + 2]), 5]
    shared = dict(prompt(), max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=0)
    expected = theirs.generate(**shared, **RECORD, **as_theirs(options))
    found = ours.generate(**shared, **RECORD, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(found.logits) == len(expected.scores)
    # A row that has ended says nothing more.
    new = expected.sequences[:, 9:]
    ended = torch.isin(new, torch.tensor(eos)).int().cumsum(1)
    for i in range(len(expected.scores)):
        alive = ended[:, i - 1] == 0 if i else torch.tensor([True, True])
        close(found.scores[i][alive], expected.scores[i][alive], atol=5e-5, rtol=0)
        close(found.logits[i][alive], expected.logits[i][alive], atol=5e-5, rtol=0)
    assert torch.equal(ours.generate(**shared, **options), expected.sequences)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7, top_k=0),
        dict(top_k=7),
        dict(top_k=0, top_p=0.4),
        dict(top_k=0, min_p=0.3),
        dict(top_k=500, top_p=0.999, min_p=0.001),
        dict(temperature=1.9, top_k=30, top_p=0.8, min_p=0.05, repetition_penalty=1.4),
        dict(temperature=0.5, top_k=0, top_p=0.9, logits_processor=[favour_even]),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_what_is_drawn_from(models, options: dict) -> None:
    """The scores of one step, and that the draw keeps to them."""
    ours, theirs = models
    shared = dict(prompt(), **RECORD, do_sample=True, max_new_tokens=1, eos_token_id=5)
    expected = theirs.generate(**shared, pad_token_id=0, **as_theirs(options)).scores[0]
    seen = set()
    for seed in range(20):
        found = ours.generate(**shared, **options, seed=seed)
        assert torch.equal(found.scores[0].isinf(), expected.isinf())
        close(found.scores[0], expected, atol=5e-5, rtol=0)
        drawn = found.sequences[:, -1]
        assert expected.gather(1, drawn[:, None]).isfinite().all()
        seen.add(tuple(drawn.tolist()))
    assert len(seen) > 1


def test_draws_follow_the_distribution() -> None:
    options = GenerationConfig(do_sample=True, top_k=4, min_p=0.1)
    logits = torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]).log().expand(1, 5)
    sampler, counts = Sampler(options, [], 0, 1, torch.device("cpu")), torch.zeros(5)
    for position in range(4000):
        sampler(torch.zeros(1, 0), logits, torch.tensor([position]))
        counts[sampler.ids] += 1
    expected = torch.tensor([0.1, 0.5, 0.2, 0.15, 0.0]) / 0.95
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts / 4000 - expected).abs() <= 5 * deviation).all()


@pytest.mark.parametrize("name", ["dense", "moe_like"])
def test_log_probabilities(name: str) -> None:
    ours, theirs = both(name)
    options = dict(prompt(), **RECORD, max_new_tokens=NEW, do_sample=False, eos_token_id=[95])
    expected = theirs.generate(**options, pad_token_id=0)
    expected = theirs.compute_transition_scores(
        expected.sequences, expected.scores, normalize_logits=True
    )
    found = ours.generate(**options)
    close(found.log_probabilities(), expected, atol=5e-5, rtol=0)
    found.scores = None
    with pytest.raises(ValueError, match="output_scores=True"):
        found.log_probabilities()


def test_several_answers_are_those_of_copied_prompts(models) -> None:
    ours, _ = models
    options = dict(do_sample=True, top_p=0.9, seed=3, max_new_tokens=NEW, eos_token_id=[])
    found = ours.generate(**prompt(), num_return_sequences=3, **RECORD, **options)
    copied = {name: x.repeat_interleave(3, 0) for name, x in prompt().items()}
    assert torch.equal(found.sequences, ours.generate(**copied, **options))
    assert len({tuple(row) for row in found.sequences.tolist()}) == 6
    cache = found.past_key_values
    assert cache.lengths == [14] * 3 + [18] * 3 and cache.batch_size == 6
    kept = [
        row[-(n + 1) : -1] for row, n in zip(found.sequences.tolist(), cache.lengths, strict=True)
    ]
    assert cache.ids == kept


def test_max_length_counts_the_prompt(models) -> None:
    ours, theirs = models
    options = dict(prompt(), do_sample=False, eos_token_id=[])
    expected = theirs.generate(**dict(options, eos_token_id=None), max_length=13)
    assert torch.equal(ours.generate(**options, max_length=13), expected)
    assert ours.generate(**options, max_length=13, max_new_tokens=2).shape == (2, 11)
    with pytest.raises(ValueError, match="max_length must exceed the prompt's 9 tokens, got 9"):
        ours.generate(**options, max_length=9)


def test_a_temperature_that_underflows_is_greedy(models) -> None:
    ours, _ = models
    options = dict(prompt(), max_new_tokens=NEW, eos_token_id=[])
    greedy = ours.generate(**options, do_sample=False)
    for temperature in (1e-6, 1e-20, 1e-46, 5e-324):
        assert torch.equal(
            ours.generate(**options, do_sample=True, temperature=temperature), greedy
        )


def test_criteria_of_the_caller_end_rows(models) -> None:
    ours, _ = models
    free = ours.generate(**prompt(), max_new_tokens=NEW, eos_token_id=[])
    seen = []

    def fourth(ids: Tensor, scores: object) -> Tensor:
        seen.append(ids.shape[1])
        return torch.tensor([ids.shape[1] == 9 + 4, False])

    found = ours.generate(
        **prompt(),
        max_new_tokens=NEW,
        eos_token_id=[],
        stopping_criteria=[fourth, lambda ids, scores: ids.shape[1] >= 9 + 6],
    )
    assert seen == list(range(10, 16))
    assert torch.equal(found[1], free[1, :15])
    assert torch.equal(found[0, :13], free[0, :13]) and not found[0, 13:].any()


def test_a_configuration_object_of_either_kind(models) -> None:
    ours, theirs = models
    config = transformers.GenerationConfig(
        max_new_tokens=5, repetition_penalty=1.5, do_sample=False, eos_token_id=5, pad_token_id=0
    )
    expected = theirs.generate(**prompt(), generation_config=config)
    assert torch.equal(ours.generate(**prompt(), generation_config=config), expected)
    own = GenerationConfig(max_new_tokens=5, repetition_penalty=1.5, eos_token_id=5)
    assert torch.equal(ours.generate(**prompt(), generation_config=own), expected)
    longer = ours.generate(**prompt(), generation_config=own, max_new_tokens=6)
    assert torch.equal(longer[:, :-1], expected)
    config.num_beams = 4
    with pytest.raises(ValueError, match="num_beams is not taken"):
        ours.generate(**prompt(), generation_config=config)


def test_a_step_of_all_processors_reads_nothing_on_the_host() -> None:
    options = GenerationConfig(
        do_sample=True, top_k=8, top_p=0.9, min_p=0.1, repetition_penalty=1.2, min_new_tokens=3,
        eos_token_id=[5, 6], output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids, logits = tiny.ids(2, 7), torch.randn(2, 97)
    process = processors(options, ids, torch.ones_like(ids).bool(), 97, favour_even)
    sampler = Sampler(options, process, 0, 2, torch.device("cpu"))
    positions = torch.tensor([7, 7])
    sampler(ids, logits, positions)
    with OnOneDevice():
        sampler(ids, logits, positions)


class OnOneDevice(NoHostReads):
    """Lets pass what copies a tensor to where it is, in another dtype or to be written to."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = func.overloadpacket.__name__ in ("_to_copy", "copy_")
        if copies and (kwargs or {}).get("device", args[0].device) == args[0].device:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_processors_that_write_leave_the_logits_alone(models) -> None:
    ours, _ = models

    def spoil(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.fill_(0.0)

    options = dict(prompt(), max_new_tokens=3, eos_token_id=[], **RECORD)
    found = ours.generate(**options, logits_processor=spoil)
    plain = ours(torch.cat([found.sequences[1:, :-1]])).logits[0, -3:]
    close(torch.cat([step[1:] for step in found.logits]), plain, atol=5e-5, rtol=0)
    assert not torch.stack(found.scores).any()


# Stop strings


@pytest.fixture(scope="module")
def demo_models() -> tuple:
    load = transformers.Gemma4ForCausalLM.from_pretrained
    theirs = load(demo.path(), attn_implementation="eager", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.path())
    ours = Gemma4ForCausalLM.from_pretrained(demo.path(), dtype="float32")
    return ours, Gemma4Tokenizer.from_pretrained(demo.path()), theirs, tokenizer


def test_stop_strings_end_where_transformers_ends(demo_models) -> None:
    ours, tokenizer, theirs, their_tokenizer = demo_models
    ids = torch.tensor([tokenizer.encode("She was the youngest of")])
    options = dict(do_sample=False, max_new_tokens=30, pad_token_id=0)
    free = ours.generate(ids, eos_token_id=[1], **options)
    text = tokenizer.decode(free[0, ids.shape[1] :])
    # Whole words, pieces over a token's end, more than one string, one that never comes.
    strings = [text[10:14], text[13:16], text[20:33], [text[30:35], text[24:28]], "\u2603"]
    lengths = set()
    for stop in strings:
        found = ours.generate(
            ids, eos_token_id=[1], stop_strings=stop, tokenizer=tokenizer, **options
        )
        expected = theirs.generate(
            ids, eos_token_id=1, stop_strings=stop, tokenizer=their_tokenizer, **options
        )
        assert torch.equal(found, expected), stop
        lengths.add(found.shape[1])
    assert len(lengths) >= 4 and max(lengths) == free.shape[1]


@pytest.mark.parametrize("string", ["é", "☃", "🙂", "n☃", "🙂🙃 ", "end.", "<turn|>", "☃" * 40])
def test_stop_strings_of_byte_tokens(demo_models, string: str) -> None:
    """Against the text of all ids so far; long runs, so that the tail that is kept is cut."""
    tokenizer = demo_models[1]
    text = "caf\u00e8 \u2602" + "\u2602\U0001f600" * 90 + " an" + string + "\u2602 and more"
    ids = tokenizer.encode(text, add_bos=False)
    stop = StopStrings(tokenizer, [string, "never said"], [ids[:3]])
    ended = [bool(stop(torch.tensor([[index]]), None)) for index in ids[3:]]
    seen = [
        string in tokenizer.decode(ids[: i + 1], skip_special_tokens=False)
        for i in range(3, len(ids))
    ]
    assert any(seen) and ended.index(True) == seen.index(True)
    assert len(stop.tails[0]) <= 4 * stop.tokens + 64


def test_stop_strings_row_by_row(demo_models) -> None:
    ours, tokenizer, *_ = demo_models
    texts = ["She was the youngest of", "It is a truth universally"]
    batch = tokenizer(texts)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=[])
    free = ours.generate(**batch, **options)
    width = batch["input_ids"].shape[1]
    said = [tokenizer.decode(row[width:]) for row in free]
    stop: Callable = lambda row: said[row][8:14]  # noqa: E731
    found = ours.generate(**batch, **options, stop_strings=[stop(0), stop(1)], tokenizer=tokenizer)
    for row, text in enumerate(texts):
        alone = ours.generate(
            **tokenizer(text), **options, stop_strings=[stop(0), stop(1)], tokenizer=tokenizer
        )
        new = alone[0, tokenizer(text)["input_ids"].shape[1] :]
        assert torch.equal(found[row, width : width + len(new)], new)
        assert not found[row, width + len(new) :].any()
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        ours.generate(**batch, stop_strings="x")
