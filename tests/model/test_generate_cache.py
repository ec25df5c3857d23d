"""Conversations that go on: what a cache of an earlier call saves, and what it may not change."""

from collections.abc import Callable

import pytest
import torch
from support.tiny import ALL, DENSE, E_SERIES, K_EQ_V, ids, tiny
from torch import Tensor

import gemma4.generate.loop
from gemma4 import Cache, Gemma4ForCausalLM

each = pytest.mark.parametrize("options", ALL.values(), ids=ALL)
GREEDY = dict(do_sample=False, eos_token_id=[], return_dict_in_generate=True)
close = torch.testing.assert_close


class Tokens:
    """Counts the tokens whose embedding is looked up, row by row of what was padded."""

    def __init__(self, model: Gemma4ForCausalLM):
        self.count = 0
        model.model.embed_tokens.register_forward_hook(self._add)

    def _add(self, _module: object, arguments: tuple[Tensor], _output: object) -> None:
        self.count += arguments[0].numel()

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


@each
def test_a_conversation_runs_only_what_is_new(options: dict) -> None:
    model = tiny(options)
    talk, tokens, cache, held = ids(1, 13), Tokens(model), None, 0
    for turn, width in enumerate((5, 1, 20)):
        expected = model.generate(talk, max_new_tokens=6, **GREEDY).sequences
        assert tokens.taken() == talk.shape[1] + 5
        found = model.generate(talk, max_new_tokens=6, past_key_values=cache, **GREEDY)
        assert tokens.taken() == talk.shape[1] - held + 5
        assert torch.equal(found.sequences, expected)
        cache = found.past_key_values
        assert cache.reused == [held]
        held = expected.shape[1] - 1
        assert cache.ids == [expected[0, :held].tolist()] and cache.lengths == [held]
        talk = torch.cat([expected, ids(1, width, seed=turn + 1)], 1)


@each
@pytest.mark.parametrize("chunk", [2048, 4])
def test_rows_go_on_each_from_its_own_beginning(options: dict, chunk: int) -> None:
    """Rows of unequal prompts, one of which ended early and was filled up, one wholly new."""
    model = tiny(options)
    first, mask = ids(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :7], mask[1, :3] = 0, 0
    free = model.generate(first, mask, max_new_tokens=9, **GREEDY).sequences
    eos = int(free[1, 12 + 3])
    found = model.generate(first, mask, max_new_tokens=9, **dict(GREEDY, eos_token_id=eos))
    cache = found.past_key_values
    rows = []
    for row, begin in enumerate((7, 3, 0)):
        said = found.sequences[row, begin:].tolist()
        answer = said[12 - begin :]
        if eos in answer:
            said = said[: 12 - begin + answer.index(eos) + 1]
        rows.append(said + ids(1, 4 + row, seed=row)[0].tolist())
    rows[2] = ids(1, 6, seed=9)[0].tolist()
    width = max(map(len, rows))
    batch = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    whole = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    arguments = dict(input_ids=batch, attention_mask=whole, max_new_tokens=7, **GREEDY)
    expected = model.generate(**arguments)
    again = model.generate(**arguments, cache=cache, prefill_chunk_size=chunk)
    assert torch.equal(again.sequences, expected.sequences)
    assert again.past_key_values is cache and cache.reused[2] == 0
    assert cache.reused[0] == 5 + 8 and cache.reused[1] == len(rows[1]) - 5
    assert cache.lengths == [len(row) + 6 for row in rows]
    # And once more, padded on the right.
    longer = torch.zeros(3, width + 8, dtype=torch.int64)
    mask = torch.zeros_like(longer)
    for row, ids_ in enumerate(rows):
        said = ids_ + again.sequences[row, width:].tolist() + [5]
        longer[row, : len(said)], mask[row, : len(said)] = torch.tensor(said), 1
    third = dict(input_ids=longer, attention_mask=mask, max_new_tokens=4, **GREEDY)
    found = model.generate(**third, cache=cache)
    assert torch.equal(found.sequences, model.generate(**third).sequences)
    assert cache.reused == [len(row) + 6 for row in rows]


@each
def test_what_differs_is_taken_back_or_starts_anew(options: dict) -> None:
    model, talk = tiny(options), ids(1, 30)
    for at, kept in ((0, 0), (3, 0), (20, 20), (29, 29)):
        cache = model.generate(talk, max_new_tokens=6, **GREEDY).past_key_values
        changed = talk.clone()
        changed[0, at] = (changed[0, at] - 3 + 1) % 94 + 3
        expected = model.generate(changed, max_new_tokens=6, **GREEDY).sequences
        found = model.generate(changed, max_new_tokens=6, cache=cache, **GREEDY)
        assert torch.equal(found.sequences, expected)
        # Rings hold the window of 8 and 16 tokens more: 20 is within reach, 3 is lost.
        assert cache.reused == [kept]
    shorter = model.generate(talk[:, :25], max_new_tokens=2, cache=cache, **GREEDY)
    assert torch.equal(
        shorter.sequences, model.generate(talk[:, :25], max_new_tokens=2, **GREEDY).sequences
    )
    assert cache.reused == [24]


def test_the_same_prompt_again_runs_one_token() -> None:
    model, talk = tiny(DENSE), ids(1, 9)
    cache = model.generate(talk, max_new_tokens=4, **GREEDY).past_key_values
    tokens = Tokens(model)
    model.generate(talk, max_new_tokens=1, cache=cache, **GREEDY)
    assert tokens.taken() == 1 and cache.reused == [8]


@torch.no_grad()
def test_a_forward_makes_a_beginning_too() -> None:
    """As transformers takes it: what a forward cached is the beginning of the row."""
    model, talk = tiny(E_SERIES), ids(2, 15)
    cache = model(talk[:, :10], use_cache=True).past_key_values
    tokens = Tokens(model)
    found = model.generate(talk, max_new_tokens=3, past_key_values=cache, **GREEDY)
    assert tokens.taken() == 2 * (5 + 2) and cache.reused == [10, 10]
    assert torch.equal(found.sequences, model.generate(talk, max_new_tokens=3, **GREEDY).sequences)


def interrupt_after(count: int) -> Callable:
    def criterion(ids: Tensor, scores: object) -> bool:
        if ids.shape[1] == count:
            raise KeyboardInterrupt
        return False

    return criterion


@pytest.mark.parametrize("new", [1, 2, 9])
def test_an_interrupted_answer_leaves_a_usable_cache(new: int) -> None:
    model, talk = tiny(E_SERIES), ids(1, 27)
    cache = Cache(model.config, 1, model.dtype, model.device)
    with pytest.raises(KeyboardInterrupt):
        model.generate(
            talk,
            max_new_tokens=20,
            cache=cache,
            stopping_criteria=interrupt_after(27 + new),
            **GREEDY,
        )
    assert cache.lengths == [27 + new - 1] == [len(cache.ids[0])]
    other = torch.cat([talk, ids(1, 3, seed=5)], 1)
    found = model.generate(other, max_new_tokens=5, cache=cache, **GREEDY)
    assert cache.reused == [27]
    assert torch.equal(found.sequences, model.generate(other, max_new_tokens=5, **GREEDY).sequences)


def test_an_interrupted_prefill_leaves_a_usable_cache() -> None:
    model, talk = tiny(DENSE), ids(1, 27)
    cache, chunks = Cache(model.config, 1, model.dtype, model.device), []

    def third_fails(*_: object) -> None:
        chunks.append(1)
        if len(chunks) == 3:
            raise KeyboardInterrupt

    hook = model.model.register_forward_pre_hook(third_fails)
    with pytest.raises(KeyboardInterrupt):
        model.generate(talk, max_new_tokens=20, cache=cache, prefill_chunk_size=5, **GREEDY)
    hook.remove()
    assert cache.ids == [talk[0, :10].tolist()]
    found = model.generate(talk, max_new_tokens=5, cache=cache, **GREEDY)
    assert cache.reused == [10]
    assert torch.equal(found.sequences, model.generate(talk, max_new_tokens=5, **GREEDY).sequences)


def test_several_answers_leave_the_cache_with_the_prompt() -> None:
    model, talk = tiny(DENSE), ids(2, 9)
    cache = model.generate(talk, max_new_tokens=3, **GREEDY).past_key_values
    options = dict(do_sample=True, seed=1, max_new_tokens=5, num_return_sequences=2)
    options = dict(GREEDY, **options) | options
    found = model.generate(talk, cache=cache, **options)
    assert torch.equal(found.sequences, model.generate(talk, **options).sequences)
    assert cache.ids == talk.tolist() and cache.batch_size == 2
    more = torch.cat([found.sequences, ids(4, 3, seed=2)], 1)
    greedy = dict(GREEDY, max_new_tokens=4)
    again = model.generate(more, cache=found.past_key_values, **greedy)
    assert torch.equal(again.sequences, model.generate(more, **greedy).sequences)
    assert found.past_key_values.reused == [13] * 4


# The cache itself


@torch.no_grad()
def test_rows_are_trimmed_apart() -> None:
    model, batch = tiny(E_SERIES), ids(3, 12)
    cache = model(batch, use_cache=True).past_key_values
    cache.trim([3, 0, 12])
    assert cache.lengths == [9, 12, 0] and cache.columns == 12
    more = ids(3, 2, seed=1)
    mask = torch.arange(14) >= torch.tensor([[3], [0], [12]])
    logits = model(more, attention_mask=mask, cache=cache).logits
    for row, kept in enumerate((9, 12, 0)):
        whole = torch.cat([batch[row : row + 1, :kept], more[row : row + 1]], 1)
        close(logits[row], model(whole, use_cache=False).logits[0, -2:], atol=3e-5, rtol=0)


def test_what_a_cache_refuses() -> None:
    model = tiny(DENSE)
    for rollback in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match="rollback must be a whole number of at least 0"):
            Cache(model.config, 1, model.dtype, model.device, rollback=rollback)
    with torch.no_grad():
        cache = model(ids(2, 9), use_cache=True).cache
    for count in (1.5, -1, True, "1", 10, None, [1, 1.0], [0, -1], [10, 0]):
        with pytest.raises(ValueError, match="cannot trim"):
            cache.trim(count)
    with pytest.raises(ValueError, match="cannot trim 3 rows, the cache holds 2"):
        cache.trim([1, 1, 1])
    assert cache.lengths == [9, 9]
    rope = dict(model.config.rope_parameters)
    rope["sliding_attention"] = dict(rope["sliding_attention"], rope_theta=9e3)
    for other, sentence in (
        (tiny(K_EQ_V), "a model of another shape"),
        (tiny(DENSE).half(), r"cache holds torch\.float32, the model computes in torch\.float16"),
        (tiny(DENSE, rope_parameters=rope), "other rope_parameters"),
        (tiny(DENSE, sliding_window=9), "a model of another shape"),
    ):
        with pytest.raises(ValueError, match=sentence):
            other.generate(ids(2, 12), cache=cache)
        with pytest.raises(ValueError, match=sentence), torch.no_grad():
            other(ids(2, 1), cache=cache)
    away = Cache(model.config, 2, torch.float32, torch.device("meta"))
    with pytest.raises(ValueError, match="cache lies on meta, the model on cpu"):
        model.generate(ids(2, 12), cache=away)
    with pytest.raises(ValueError, match="cache lies on meta, the model on cpu"):
        model(ids(2, 1), cache=away)
    with pytest.raises(ValueError, match="cache holds 2 rows, the input has 1"):
        model.generate(ids(1, 12), cache=cache)
    with pytest.raises(ValueError, match="past_key_values go with input_ids"):
        model.generate(inputs_embeds=torch.ones(2, 3, 64), cache=cache)


def test_a_row_that_starts_anew_has_its_rollback_again() -> None:
    model, talk = tiny(DENSE), ids(1, 60)
    with torch.no_grad():
        cache = model(talk, use_cache=True).cache
        cache.trim(60)
        assert cache.lengths == [0] and cache.columns == 0
        model(talk[:, :20], cache=cache)
        cache.trim(12)
        found = model(talk[:, 8:11], cache=cache).logits
        close(found, model(talk[:, :11], use_cache=False).logits[:, 8:], atol=1e-5, rtol=0)


# Ids that the host reads late, as those of a GPU


@pytest.fixture(params=[1, 2])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """generate with so many steps under way, beside how often its model ran."""

    def run(model: Gemma4ForCausalLM, *args: object, lag: int = request.param, **options: object):
        tokens, streamed = Tokens(model), Streamed()
        monkeypatch.setattr(gemma4.generate.loop, "_lag", lambda device: lag)
        found = model.generate(*args, streamer=streamed, **options)
        return found, streamed, tokens.taken()

    return run


class Streamed:
    def __init__(self) -> None:
        self.ids: list[list[int]] = []
        self.ended = 0

    def put(self, ids: Tensor) -> None:
        self.ids.append(ids.tolist())

    def end(self) -> None:
        self.ended += 1


@each
def test_late_ids_change_nothing(options: dict, late: Callable) -> None:
    """Rows that end at an eos id, or by length: ids, stream, cache and what it is good for."""
    talk = ids(2, 12)
    free = tiny(options).generate(talk, max_new_tokens=12, **GREEDY).sequences
    for eos, new in (([], 7), (free[:, 12 + 5].tolist(), 12), (free[:, 12].tolist(), 12)):
        arguments = dict(max_new_tokens=new, **GREEDY) | dict(eos_token_id=eos)
        (expected, stream, count), (found, late_stream, late_count) = (
            late(tiny(options), talk, lag=0, **arguments), late(tiny(options), talk, **arguments)
        )  # fmt: skip
        assert torch.equal(found.sequences, expected.sequences)
        assert late_stream.ids == stream.ids and late_stream.ended == stream.ended == 1
        cache, other = found.past_key_values, expected.past_key_values
        assert (cache.lengths, cache.columns, cache.ids) == (
            other.lengths, other.columns, other.ids
        )  # fmt: skip
        assert late_count >= count and (late_count == count) == (not eos)
        more = torch.cat([found.sequences, ids(2, 3, seed=1)], 1)
        greedy = dict(GREEDY, max_new_tokens=4)
        again = tiny(options).generate(more, cache=cache, **greedy)
        assert torch.equal(again.sequences, tiny(options).generate(more, **greedy).sequences)
        assert cache.reused == other.lengths


def test_late_ids_of_a_sampled_answer(late: Callable) -> None:
    options = dict(GREEDY, do_sample=True, top_k=9, seed=3, max_new_tokens=20)
    model, talk = tiny(DENSE), ids(2, 9)
    options["eos_token_id"] = model.generate(talk, **options).sequences[:, 15].tolist()
    (expected, *_), (found, *_) = late(model, talk, lag=0, **options), late(model, talk, **options)
    assert torch.equal(found.sequences, expected.sequences)


def test_functions_of_the_caller_are_never_late(late: Callable) -> None:
    seen: list[int] = []

    def fifth(ids: Tensor, scores: object) -> bool:
        seen.append(ids.shape[1])
        return ids.shape[1] == 9 + 5

    found, stream, count = late(
        tiny(DENSE), ids(1, 9), max_new_tokens=20, stopping_criteria=fifth, **GREEDY
    )
    assert found.sequences.shape[1] == 14 and seen == [10, 11, 12, 13, 14]
    assert len(stream.ids) == 6 and count == 9 + 4


def test_an_interrupted_stream_of_late_ids_leaves_a_usable_cache(late: Callable) -> None:
    model, talk = tiny(E_SERIES), ids(1, 27)
    cache = Cache(model.config, 1, model.dtype, model.device)

    class Failing(Streamed):
        def put(self, ids: Tensor) -> None:
            super().put(ids)
            if len(self.ids) == 4:
                raise KeyboardInterrupt

    _, whole, _ = late(model, talk, lag=0, max_new_tokens=20, **GREEDY)
    late(model, talk, max_new_tokens=1, **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        model.generate(talk, max_new_tokens=20, cache=cache, streamer=Failing(), **GREEDY)
    (held,) = cache.ids
    assert cache.lengths == [len(held)] and 27 + 3 <= len(held) <= 27 + 5
    assert held == talk[0].tolist() + [step[0] for step in whole.ids[1:]][: len(held) - 27]


def test_a_cache_without_rollback_is_not_run_past_what_it_can_take_back(late: Callable) -> None:
    talk, model = ids(1, 20), tiny(DENSE)
    eos = int(model.generate(talk, max_new_tokens=9, **GREEDY).sequences[0, 25])
    options = dict(GREEDY, max_new_tokens=9, eos_token_id=eos)
    cache = Cache(model.config, 1, model.dtype, model.device, rollback=0)
    found, *_ = late(model, talk, cache=cache, **options)
    assert torch.equal(found.sequences, late(model, talk, lag=0, **options)[0].sequences)
    assert cache.lengths == [found.sequences.shape[1] - 1]
