"""What the plug-in for transformers makes of masks, and its attention under each of them."""

import pytest
import torch
import torch.nn.functional as F
from support.plugged import (
    base,
    close,
    close_gradients,
    left_padding,
    load,
    plugin,
    small,
    small_models,
    some_ids,
    transformers,
    use_ops,
)
from support.plugged import way as way
from transformers import masking_utils

from gemma4_kernels import ops
from gemma4_kernels.integrations.transformers.attention import attention
from gemma4_kernels.integrations.transformers.mask import mask

BOUNDS = {
    "none": None,
    "ends": torch.tensor([[8], [6]]),
    "begins and ends": torch.tensor([[0, 9], [2, 8]]),
}


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(
    "options", [{}, dict(sliding_window=3), dict(softcap=2.0, scaling=1.0)], ids=str
)
def test_attention_under(options, bounds, queries, monkeypatch):
    """It is the same function of masks, windows and softcaps with the ops and without."""
    q, k, v = torch.randn(2, 4, queries, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    seen, results = BOUNDS[bounds], []
    if seen is not None:
        seen = seen.int()[:, None, None].repeat(1, 1, queries, 1)
        seen[..., -1] += torch.arange(1 - queries, 1)
    use_ops(monkeypatch, ops)
    for takes in (True, False):
        monkeypatch.setattr(base, "takes_ops", lambda x, takes=takes: takes)
        results.append(attention(torch.nn.Module(), q, k, v, seen, **options)[0])
    close(*results)


def test_attention_that_is_not_causal(monkeypatch):
    use_ops(monkeypatch, ops)
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
    found, _ = attention(torch.nn.Module(), q, k, v, None, is_causal=False)
    close(found.transpose(1, 2), F.scaled_dot_product_attention(q, k, v))


def test_masks():
    """None where a layer needs none; else a few numbers a query, however many the keys."""
    pure = dict(batch_size=2, q_length=5, dtype=torch.float32)
    ones, padded = torch.ones(2, 9).bool(), torch.tensor([[1] * 9, [0, 0] + [1] * 7]).bool()
    assert mask(kv_length=9, q_offset=4, attention_mask=ones, **pure) is None
    static = mask(kv_length=20, q_offset=torch.tensor(4), **pure)
    assert static[:, 0, :, 0].tolist() == [[5, 6, 7, 8, 9]] * 2
    bounds = mask(kv_length=9, q_offset=4, attention_mask=padded, **pure)
    assert bounds[:, 0, 0].tolist() == [[0, 5], [2, 5]]
    sequences = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    window = masking_utils.sliding_window_causal_mask_function(4)
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        window = masking_utils.remap_positions_for_packed_sequence(window, torch.zeros(2, 5))
    packed = masking_utils.and_masks(
        window,
        masking_utils.packed_sequence_mask_function(sequences),
    )
    starts = mask(kv_length=5, mask_function=packed, allow_is_causal_skip=False, **pure)
    assert starts.shape == (2, 1, 5, 3) and starts[:, 0, 4].tolist() == [[0, 2, 5], [0, 5, 5]]
    holes = padded.clone()
    holes[0, 3] = False
    with pytest.raises(ValueError, match="one run of ones per row"):
        mask(kv_length=9, q_offset=4, attention_mask=holes, **pure)


OTHER = {
    "bidirectional": masking_utils.bidirectional_mask_function,
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
    "blocks": masking_utils.or_masks(
        masking_utils.causal_mask_function,
        masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, 0, 1, 1, -1, -1]] * 2)),
    ),
    "somebody's": lambda b, h, q, k: (k <= q) & (k != 1),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_masks_are_made_in_full(name):
    """Also where transformers would allow causal ones to be skipped."""
    sizes = dict(batch_size=2, q_length=9, kv_length=9, mask_function=OTHER[name])
    made = mask(**sizes, dtype=torch.float32)
    assert torch.equal(made, masking_utils.eager_mask(**sizes, dtype=torch.float32))
    assert made.shape == (2, 1, 9, 9) and made.is_floating_point()


def test_without_the_mask_function_padding_is_lost():
    """The trap this registers against: transformers then hands every layer None."""
    transformers.AttentionInterface.register("unmasked", attention)
    theirs, ours = load("dense"), load("dense", "unmasked")
    ids, padding = some_ids(2, 14), left_padding(2, 14)
    with torch.no_grad():
        a, b = (m(ids, attention_mask=padding).logits[padding.bool()] for m in (ours, theirs))
    assert (a - b).abs().max() > 1e-2


def with_holes(batch, queries, keys, window=None):
    """Causal, the queries being the last keys, but for a few keys that nobody sees."""
    places = torch.arange(keys)
    ends = places[keys - queries :, None]
    seen = (places <= ends) & (places > ends - (window or keys))
    seen = seen.expand(batch, 1, queries, keys).clone()
    seen[0, ..., 3] &= places[keys - queries :] == 3
    return seen


def additive(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


FORMS = {
    "bool": lambda seen: seen,
    "additive": additive,
}


@pytest.mark.parametrize("by_layer_type", [False, True], ids=["one", "one for each layer type"])
@pytest.mark.parametrize("form", FORMS)
@small_models
def test_masks_made_by_the_user(name, form, by_layer_type, monkeypatch):
    """Boolean and additive [B, 1, N, S], with a cache and without, in training and generation."""
    use_ops(monkeypatch, ops)
    theirs, ours = small(name), plugin.enable(small(name))
    theirs.set_attn_implementation("sdpa")  # to eager attention True is a score of 1
    ids = some_ids(2, 12)

    def given(queries, keys):
        def make(window):
            return FORMS[form](with_holes(2, queries, keys, window))

        masks = {"sliding_attention": make(6), "full_attention": make(None)}
        return masks if by_layer_type else make(None)

    with pytest.warns(UserWarning, match="without a kernel"):
        for model in (theirs, ours):
            model.whole = model(ids, attention_mask=given(12, 12), use_cache=False).logits
            model.whole.square().mean().backward()
            # One that holds all keys in all layers, as one mask needs.
            cache = transformers.DynamicCache()
            options = dict(past_key_values=cache, logits_to_keep=2)
            first = model(ids[:, :8], attention_mask=given(8, 8), **options).logits
            second = model(ids[:, 8:], attention_mask=given(4, 12), **options).logits
            model.parts = torch.cat([first, second], 1)
    close(ours.whole, theirs.whole)
    close(ours.parts, theirs.parts)
    close_gradients(ours, theirs)


def test_masks_of_integers_are_refused():
    ours = plugin.enable(small("moe"))
    sentence = "4 dimensions must be bool or floating-point, got torch.int64"
    with pytest.raises(ValueError, match=sentence):
        ours(some_ids(2, 12), attention_mask=with_holes(2, 12, 12).long())


@small_models
def test_short_position_ids_are_named(name):
    ours = plugin.enable(small(name))
    with pytest.raises(
        ValueError, match="as many as the tokens, 12, or one for all of them, got 7"
    ):
        ours(some_ids(2, 12), position_ids=torch.arange(7)[None])


@torch.no_grad()
def test_one_position_for_all_tokens():
    theirs, ours = small("ple"), plugin.enable(small("ple"))
    options = dict(position_ids=torch.tensor([[3]]), attention_mask=torch.ones(2, 12))
    a, b = (m(some_ids(2, 12), **options).logits for m in (ours, theirs))
    close(a, b)
