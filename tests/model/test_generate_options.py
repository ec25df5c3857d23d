"""What generate takes and refuses by name: options, inputs, lengths, models gone wrong."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import DENSE, E_SERIES, ids, tiny

import gemma4.generate.loop
from gemma4 import Gemma4ForCausalLM, GenerationConfig
from gemma4.decode import Decoder

GREEDY = dict(do_sample=False, eos_token_id=[])


@pytest.fixture(scope="module")
def model() -> Gemma4ForCausalLM:
    return tiny(DENSE)


# What no option may be, by the kind of option.
WRONG = {
    **dict.fromkeys(("max_new_tokens", "max_length"), (0, -1, 1.0, "3", True)),
    **dict.fromkeys(("min_new_tokens", "top_k"), (-1, 2.0, "3", False)),
    **dict.fromkeys(
        ("do_sample", "return_dict_in_generate", "output_scores", "output_logits"),
        ("false", "True", 0, 1.0),
    ),
    "num_return_sequences": (0, -1, 1.0, "3", True),
    "temperature": (0, 0.0, -1.0, math.nan, math.inf, "1", True, [1.0]),
    "top_p": (0, -0.1, 1.0001, math.nan, "0.9", True),
    "min_p": (-0.1, 1.5, math.nan, "0.1", False),
    "repetition_penalty": (0, -1.0, math.nan, math.inf, "1.2", True),
    "eos_token_id": (-1, 1.0, "1", True, [1, -2], [1, "2"], [[1]]),
    "pad_token_id": (-1, 0.0, "0", False, [0]),
    "stop_strings": ("", ["a", ""], 3, ["a", 3], b"a"),
}  # fmt: skip
WRONG_PAIRS = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize(("name", "value"), WRONG_PAIRS, ids=str)
def test_options_of_a_wrong_type_or_range(model, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got ") as by_call:
        model.generate(ids(1, 4), **{name: value})
    with pytest.raises(ValueError) as by_config:
        GenerationConfig(**{name: value})
    assert str(by_config.value) == str(by_call.value)


@pytest.mark.parametrize(("name", "value"), WRONG_PAIRS, ids=str)
def test_generation_config_json_is_checked_alike(tmp_path: Path, name: str, value: object) -> None:
    if isinstance(value, bytes):
        value = 7
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"transformers_version": "5", name: value}))
    with pytest.raises(ValueError, match=rf"^{file}: {name} must be .*, got "):
        GenerationConfig().updated_from(tmp_path)


def test_every_option_has_wrong_values_here() -> None:
    assert set(WRONG) == set(GenerationConfig.__dataclass_fields__)


def test_a_file_is_read_and_written(tmp_path: Path) -> None:
    options = dict(max_length=40, top_k=64, top_p=0.95, min_p=0.1, eos_token_id=[1, 6],
                   temperature=1, do_sample=True, stop_strings=["\n"])  # fmt: skip
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**options, "max_new_tokens": None, "cache_config": {"a": 1}}))
    read = GenerationConfig(max_new_tokens=3).updated_from(tmp_path)
    assert read == GenerationConfig(**options)
    read.save_pretrained(tmp_path)
    assert GenerationConfig().updated_from(tmp_path) == read


def test_a_file_with_what_is_not_taken_warns(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"num_beams": 1, "length_penalty": 1.0, "use_cache": True}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenerationConfig().updated_from(tmp_path)
    file.write_text(json.dumps({"num_beams": 4}))
    with pytest.warns(UserWarning, match=r"generation_config\.json: num_beams is not taken"):
        GenerationConfig().updated_from(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (dict(num_beams=2), ValueError, "num_beams is not taken; the nearest is num_return_seq"),
        (dict(assistant_model=torch.nn.Identity()), ValueError, "assistant_model is not taken"),
        (dict(penalty_alpha=0.6), ValueError, "penalty_alpha .* top_k, top_p or min_p"),
        (dict(typical_p=0.9), ValueError, "typical_p .* min_p"),
        (dict(epsilon_cutoff=3e-4), ValueError, "epsilon_cutoff .* min_p"),
        (dict(no_repeat_ngram_size=3), ValueError, "no_repeat_ngram_size .* repetition_penalty"),
        (dict(bad_words_ids=[[5]]), ValueError, "bad_words_ids .* a logits_processor"),
        (dict(min_length=9), ValueError, "min_length .* min_new_tokens"),
        (dict(use_cache=False), ValueError, "use_cache is not taken"),
        (dict(output_hidden_states=True), ValueError, "output_hidden_states is not taken"),
        (dict(token_type_ids=torch.ones(1, 4)), ValueError, "token_type_ids is not taken"),
        (dict(inputs=[[3]]), ValueError, "inputs is not taken; the nearest is input_ids"),
        (dict(max_tokens=3), TypeError, "no argument max_tokens; did you mean max_new_tokens"),
        (dict(blue=3), TypeError, "takes no argument blue$"),
        (dict(eos_token_id=97), ValueError, r"eos_token_id must lie in 0\.\.96, got 97"),
        (dict(eos_token_id=[1, 400]), ValueError, r"eos_token_id must lie in 0\.\.96, got 400"),
        (dict(pad_token_id=97), ValueError, r"pad_token_id must lie in 0\.\.96, got 97"),
        (dict(output_scores=True), ValueError, "output_scores needs return_dict_in_generate"),
        (dict(num_return_sequences=2), ValueError, "num_return_sequences .* do_sample=True"),
        (dict(min_new_tokens=9, max_new_tokens=8), ValueError, "at most the 8 tokens .* got 9"),
        (dict(seed="1"), ValueError, "seed must be a whole number"),
        (dict(prefill_chunk_size=0), ValueError, "prefill_chunk_size must be a whole number"),
        (dict(prefill_chunk_size=2.0), ValueError, "prefill_chunk_size must be a whole number"),
        (dict(logits_processor=3), TypeError, "logits_processor must be a function"),
        (dict(stopping_criteria=[3]), TypeError, "stopping_criteria must be a function"),
        (dict(logits_processor=lambda i, s: s[:, :3]), ValueError, r"return scores \[1, 97\]"),
        (dict(logits_processor=lambda i, s: None), ValueError, r"\[1, 97\], got None"),
        (dict(generation_config={"top_k": 3}), TypeError, "must be a GenerationConfig"),
        (dict(past_key_values=()), TypeError, r"must be a gemma4\.Cache, got tuple"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refused_by_name(model, options: dict, error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        model.generate(ids(1, 4), **options)


def test_what_changes_nothing_is_let_pass(model) -> None:
    neutral = dict(num_beams=1, length_penalty=1.0, use_cache=True, typical_p=1.0, top_p=None,
                   token_type_ids=torch.zeros(1, 4), bad_words_ids=None, synced_gpus=False,
                   no_repeat_ngram_size=0, early_stopping=False, assistant_model=None)  # fmt: skip
    options = dict(GREEDY, max_new_tokens=3)
    plain = model.generate(ids(1, 4), **options)
    assert torch.equal(model.generate(ids(1, 4), **neutral, **options), plain)


# Inputs


def test_inputs_of_every_kind(model) -> None:
    batch, options = ids(2, 5), dict(GREEDY, max_new_tokens=3)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    expected = model.generate(batch, mask, **options)
    for given in (batch.tolist(), tuple(map(tuple, batch.tolist())), batch.numpy(),
                  *(batch.to(kind) for kind in (torch.uint8, torch.int16, torch.int32)),
                  batch.numpy().astype(np.uint16)):  # fmt: skip
        assert torch.equal(model.generate(given, mask, **options), expected)
    for given in (mask.tolist(), mask.numpy(), mask.bool(), mask.to(torch.uint8), mask.double()):
        assert torch.equal(model.generate(batch, given, **options), expected)
    row = batch[1].tolist()
    assert torch.equal(model.generate(row, **options)[0], expected[1])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(input_ids=torch.zeros(0, 4, dtype=torch.int64)), "the batch is empty"),
        (dict(input_ids=torch.zeros(2, 0, dtype=torch.int64)), "the prompt is empty"),
        (dict(input_ids=[]), "the prompt"),
        (dict(input_ids=[[]]), "the prompt is empty"),
        (dict(), "the prompt is empty"),
        (dict(input_ids=torch.ones(1, 4)), r"must be integers, got torch\.float32"),
        (dict(input_ids=torch.ones(1, 4).bool()), r"must be integers, got torch\.bool"),
        (dict(input_ids=np.ones((1, 4))), r"must be integers, got torch\.float64"),
        (dict(input_ids=[[1, 2], [3]]), "input_ids must be a tensor, an array or rows of equal"),
        (dict(input_ids="hello"), "input_ids must be a tensor"),
        (dict(input_ids=[["a"]]), "input_ids must be a tensor"),
        (dict(input_ids=[[5, 97]]), r"input_ids must lie in 0\.\.96, got 97"),
        (dict(input_ids=[[-1, 5]]), r"input_ids must lie in 0\.\.96, got -1"),
        (dict(input_ids=[[[5]]]), r"input_ids \[B, S\]"),
        (dict(input_ids=[[5]], inputs_embeds=torch.ones(1, 1, 64)), "exactly one of"),
        (dict(inputs_embeds=[[[1.0]]]), "inputs_embeds must be a tensor, got list"),
        (dict(inputs_embeds=torch.ones(1, 4)), r"inputs_embeds \[B, S, D\]"),
        (dict(input_ids=[[5, 6]], attention_mask=[[1]]), r"attention_mask must be \[1, 2\]"),
        (dict(input_ids=[[5, 6]], attention_mask=[[0, 0]]), "row 0 is empty: all its mask is 0"),
        (dict(input_ids=[[5, 6]], attention_mask=[[0.5, 1]]), "0 and 1 alone"),
        (dict(input_ids=[[5, 6]], attention_mask="11"), "attention_mask must be a tensor"),
    ],
)
def test_inputs_refused(model, given: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        model.generate(**given)


def test_embeddings_and_their_layers_must_agree() -> None:
    embeds = torch.ones(2, 3, 64)
    with pytest.raises(ValueError, match=r"per_layer_inputs must be \[2, 3, L, P\]"):
        tiny(E_SERIES).generate(inputs_embeds=embeds, per_layer_inputs=torch.ones(1, 3, 8, 8))


# Lengths


def test_long_answers_get_memory_in_steps(model, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders, real = [], Decoder.__init__

    def counted(self, model, cache, steps, *others):
        decoders.append(steps)
        real(self, model, cache, steps, *others)

    monkeypatch.setattr(Decoder, "__init__", counted)
    options = dict(eos_token_id=[], return_dict_in_generate=True)
    expected = model.generate(ids(2, 9), max_new_tokens=200, **options)
    assert decoders == [199] and expected.past_key_values.k[5].shape[1] == 256
    monkeypatch.setattr(gemma4.generate.loop, "RESERVED_STEPS", 30)
    found = model.generate(ids(2, 9), max_new_tokens=200, **options)
    assert torch.equal(found.sequences, expected.sequences)
    # 64 slots, then twice as many, as often as need be; a last decoder for what is left.
    assert decoders[1:] == [30, 30, 30] and found.past_key_values.k[5].shape[1] == 256


def test_a_length_that_no_memory_could_hold(model) -> None:
    free = model.generate(ids(1, 9), max_new_tokens=4, **GREEDY)
    row = free[0].tolist()
    options = dict(eos_token_id=row[11], return_dict_in_generate=True)
    for length in (dict(max_new_tokens=10**12), dict(max_length=10**12)):
        found = model.generate(ids(1, 9), **length, **options)
        assert found.sequences[0].tolist() == row[: row.index(row[11], 9) + 1]
        assert found.past_key_values.k[5].shape[1] < 10**4


def test_beyond_the_positions_is_one_warning() -> None:
    short = tiny(DENSE, max_position_embeddings=12)
    options = dict(GREEDY, max_new_tokens=8)
    for width, new, warned in ((4, 8, 0), (4, 9, 1), (9, 8, 1), (14, 3, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = short.generate(ids(1, width), **dict(options, max_new_tokens=new))
        assert found.shape == (1, width + new)
        assert len(caught) == warned
        assert all("made for 12 positions" in str(warning.message) for warning in caught)
        assert all(warning.filename == __file__ for warning in caught)


# Models gone wrong


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("model.layers.3.self_attn.o_proj.weight", "layer 3 is the first that is not"),
        ("model.layers.0.mlp.down_proj.weight", "layer 0 is the first that is not"),
        ("model.embed_tokens.weight", "the embeddings are not"),
        ("lm_head.weight", "the head's product"),
    ],
)
@torch.no_grad()
def test_logits_that_are_not_finite(place: str, sentence: str) -> None:
    broken = tiny(DENSE, tie_word_embeddings=False)
    broken.state_dict()[place].fill_(math.nan)
    for chunk in (2048, 4):
        with pytest.raises(RuntimeError, match=f"logits of row 0 are not finite .*: {sentence}"):
            broken.generate(ids(2, 11), prefill_chunk_size=chunk)


@torch.no_grad()
def test_the_row_that_is_not_finite_is_named() -> None:
    broken = tiny(DENSE, tie_word_embeddings=False)
    batch = torch.tensor([[5, 6, 7, 8], [5, 6, 60, 8]])
    broken.model.embed_tokens.weight[60] = math.inf
    with pytest.raises(RuntimeError, match=r"logits of row 1 are not finite .*: the embeddings"):
        broken.generate(batch)
