"""Keys and values in 8 bits: what they cost in memory and in exactness, and that every way through
a cache finds the same ones."""

import io
from itertools import pairwise

import pytest
import torch
from support.tiny import ALL, DENSE, E_SERIES, ids, tiny

from gemma4 import Cache, Gemma4ForCausalLM, Gemma4Tokenizer
from gemma4.cli import main
from gemma4.decode import Decoder
from gemma4.demo import path

each = pytest.mark.parametrize("options", ALL.values(), ids=ALL)
both = pytest.mark.parametrize("kv_dtype", ["fp8", "fp8-all"])
GREEDY = dict(do_sample=False, eos_token_id=[], return_dict_in_generate=True)
close = torch.testing.assert_close
E4M3 = torch.float8_e4m3fn


def cache_of(model, batch, kv_dtype, **options):
    return Cache(
        model.config, batch, model.compute_dtype, model.device, kv_dtype=kv_dtype, **options
    )


def held(cache, row):
    """The keys and values that a row holds, its codes times their scales, by layer."""
    found = []
    for layer in cache.k:
        slots = cache.k[layer].shape[1]
        written = [p % slots for p in range(max(0, cache.lengths[row] - slots), cache.lengths[row])]
        for x, scales in zip((cache.k, cache.v), cache.scales(layer), strict=True):
            values = x[layer][row].float()[written]
            found.append(values if scales is None else values * scales[row][written, :, None])
    return found


@both
def test_memory(kv_dtype):
    """A byte a number and four for each head of a key; in 16 bits two a number."""
    model = tiny(DENSE)
    sizes = model.config, 2, torch.bfloat16, torch.device("cpu"), 100
    wide, cache = Cache(*sizes), Cache(*sizes, kv_dtype=kv_dtype)
    for layer, k in cache.k.items():
        coded = kv_dtype == "fp8-all" or not cache.is_ring(layer)
        assert (k.dtype == cache.v[layer].dtype == E4M3) == coded
        assert k.shape == wide.k[layer].shape
        k_scales, v_scales = cache.scales(layer)
        if not coded:
            assert k_scales is None and v_scales is None
            continue
        assert k_scales.shape == v_scales.shape == k.shape[:-1]
        assert 2 * k.nbytes == wide.k[layer].nbytes
        assert k_scales.nbytes == 4 * k.nbytes // k.shape[-1]


@torch.no_grad()
@each
@both
def test_what_a_layer_attends_to_is_what_the_cache_holds(options, kv_dtype):
    """Whatever the chunks, a prompt's logits are the same: keys are read from the cache alone. In
    float64, where sums in other orders lead to no other codes."""
    model, batch = tiny(options).double(), ids(2, 30)
    whole = model(batch, cache=(one := cache_of(model, 2, kv_dtype))).logits
    for cuts in ((0, 29, 30), (0, 1, 17, 30), (0, 20, 24, 25, 30)):
        cache = cache_of(model, 2, kv_dtype, rollback=20)
        parts = [model(batch[:, a:b], cache=cache).logits for a, b in pairwise(cuts)]
        close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)
        for row in range(2):
            for x, y in zip(held(cache, row), held(one, row), strict=True):
                close(x[-8:], y[-8:], atol=1e-6, rtol=0)


@torch.no_grad()
@each
def test_how_far_logits_are_from_those_of_a_wide_cache(options):
    """Of full layers, whose share of all keys is what a released model's is."""
    model, batch = tiny(options), ids(2, 40)
    wide, near = (model(batch, cache=cache_of(model, 2, kv)).logits for kv in (None, "fp8"))
    difference = (near - wide).pow(2).mean().sqrt() / wide.pow(2).mean().sqrt()
    assert 1e-4 < difference < 0.1


@torch.no_grad()
def test_the_demo_says_the_same():
    """Next tokens of a text: nearly all alike, at a divergence of thousandths of a bit."""
    model, tokenizer = (c.from_pretrained(path()) for c in (Gemma4ForCausalLM, Gemma4Tokenizer))
    text = "It is a truth universally acknowledged, that a single man in possession of a fortune"
    batch = torch.tensor([tokenizer.encode(text)])
    wide, near = (model(batch, cache=cache_of(model, 1, kv)).logits[0] for kv in (None, "fp8"))
    p, q = (x.float().log_softmax(-1) for x in (wide, near))
    assert (p.argmax(-1) == q.argmax(-1)).float().mean() > 0.9
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.01


@each
@both
def test_generate_goes_on_from_what_is_there(options, kv_dtype):
    """In chunks, in one piece, and behind a conversation that a cache holds."""
    model, talk = tiny(options).double(), ids(2, 23)
    new = dict(max_new_tokens=7, **GREEDY)
    first = model.generate(talk, kv_dtype=kv_dtype, **new)
    cache = first.past_key_values
    assert cache.kv_dtype == kv_dtype
    chunks = model.generate(talk, kv_dtype=kv_dtype, prefill_chunk_size=5, **new)
    assert torch.equal(chunks.sequences, first.sequences)
    longer = torch.cat([first.sequences, ids(2, 4, seed=3)], 1)
    again = model.generate(longer, past_key_values=cache, **new)
    assert cache.reused == [29, 29]
    anew = model.generate(longer, kv_dtype=kv_dtype, **new)
    assert torch.equal(again.sequences, anew.sequences)
    # One token less than what is there: it is taken back, and made again.
    cache.trim(3)
    model.generate(longer, past_key_values=cache, **new)
    for row in range(2):
        for x, y in zip(held(cache, row), held(anew.past_key_values, row), strict=True):
            close(x[-8:], y[-8:], atol=1e-6, rtol=0)


@both
def test_copies_of_a_row(kv_dtype):
    model, talk = tiny(E_SERIES).double(), ids(2, 9)
    options = dict(do_sample=True, seed=1, max_new_tokens=5, eos_token_id=[])
    found = model.generate(talk, num_return_sequences=2, kv_dtype=kv_dtype, **options)
    for row in range(2):  # drawn by seed + its row
        drawn = options | dict(seed=1 + 2 * row)
        alone = model.generate(talk[row : row + 1], kv_dtype=kv_dtype, **drawn)
        assert torch.equal(found[2 * row], alone[0])


@torch.no_grad()
@each
@both
def test_steps_of_a_decoder(options, kv_dtype):
    """One token a row at a time, or several, from a cache with room and one that grows."""
    model, batch = tiny(options).double(), ids(2, 30)
    expected = model(batch, cache=cache_of(model, 2, kv_dtype)).logits
    cache = cache_of(model, 2, kv_dtype)
    model(batch[:, :12], cache=cache)
    decoder = Decoder(model, cache, 18)
    for t in range(12, 30):
        close(decoder(batch[:, t]), expected[:, t], atol=1e-9, rtol=0)
    cache.trim(3)
    close(model(batch[:, 27:], cache=cache).logits, expected[:, 27:], atol=1e-9, rtol=0)


def test_the_commands(capsys, monkeypatch, tmp_path):
    """Each hands its cache's kind on; a model's bits with one are its own without."""
    text = tmp_path / "text"
    text.write_text("It is a truth universally acknowledged, that a single man.")
    assert main(["score", str(text), "--against", str(path()), "--kv-dtype", "fp8"]) == 0
    assert "0.00000 bits a token apart" not in capsys.readouterr().out
    assert main(["score", str(text), "--against", str(path())]) == 0
    assert "0.00000 bits a token apart" in capsys.readouterr().out
    words = ["bench", "--kv-dtype", "fp8-all", "--prompt-tokens", "8", "--new-tokens", "2"]
    assert main([*words, "--repeat", "1"]) == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who are you?\n")))
    assert main(["chat", "--kv-dtype", "fp8", "--max-new-tokens", "2"]) == 0


def test_what_is_refused():
    model, talk = tiny(DENSE), ids(1, 5)
    for kv_dtype in ("int8", "fp16", 8, E4M3):
        with pytest.raises(ValueError, match=r"kv_dtype must be None or one of \('fp8', 'fp8-a"):
            cache_of(model, 1, kv_dtype)
    with pytest.raises(ValueError, match="the cache has kv_dtype 'fp8', got 'fp8-all'"):
        model.generate(talk, cache=cache_of(model, 1, "fp8"), kv_dtype="fp8-all")
    with pytest.raises(ValueError, match="compile takes no cache in fp8, got kv_dtype 'fp8'"):
        Decoder(model, cache_of(model, 1, "fp8"), 4, compile=True)


def test_gradients_of_a_prompt_are_those_without_a_cache():
    """Its tokens attend to their own keys; the cache is given copies in fp8."""
    model, batch = tiny(E_SERIES), ids(1, 12)
    cache = cache_of(model, 1, "fp8-all")
    model(batch, cache=cache).logits.sum().backward()
    found = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model(batch, use_cache=False).logits.sum().backward()
    close(found, model.model.layers[0].self_attn.k_proj.weight.grad)
    assert cache.lengths == [12]
