"""Steps of decoding under the plug-in: the tokens of plain transformers, over its own caches."""

import copy

import pytest
import torch
from support.plugged import (
    Calls,
    both,
    close,
    each,
    left_padding,
    plugin,
    small,
    some_ids,
    transformers,
    use_ops,
)
from support.plugged import way as way
from transformers.cache_utils import StaticLayer

from gemma4_kernels.integrations.transformers.cache import RingLayer


def static_cache(model, slots):
    return transformers.StaticCache(model.config, max_cache_len=slots)


@pytest.mark.parametrize(
    ("batch", "cache"), [(1, "static"), (4, "static"), (16, "static"), (4, "dynamic")]
)
@each
def test_tokens(name, batch, cache, way):
    """Past the window, with padding on the left where there is more than one row."""
    if way == "as on a CPU":
        return  # where steps are transformers' own
    ids, mask = some_ids(batch, 9), left_padding(batch, 9)
    mask[3:] = mask[:1]
    options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None, disable_compile=True)
    options |= dict(cache_implementation=cache)
    theirs, ours = both(name)
    expected = theirs.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **options), expected)
    if batch == 1:
        plugin.disable(ours)
        assert torch.equal(ours.generate(ids, attention_mask=mask, **options), expected)


def fed(model, ids, mask, cache, begin, end):
    """Logits of the columns from begin to end."""
    part = dict(input_ids=ids[:, begin:end], attention_mask=mask[:, :end])
    return model(**part, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@each
@torch.no_grad()
def test_a_static_cache_serves_steps_chunks_and_others(name, padded, way):
    """One conversation over one cache: a prompt shorter than the window, steps past it, some tokens
    at once, steps, the plug-in taken out; keys lie as transformers leaves them."""
    if way == "as on a CPU":
        return
    theirs, ours = both(name)
    ids = some_ids(2, 32)
    mask = left_padding(2, 32) if padded else torch.ones_like(ids)
    caches = [static_cache(theirs, 33) for _ in range(2)]
    ends = [4, *range(5, 14), 17, 18, 19, 25, 26, 27, 28, 29]
    for begin, end in zip([0, *ends], ends, strict=False):
        if end == 28:
            plugin.disable(ours)
        found, expected = (
            fed(model, ids, mask, cache, begin, end)
            for model, cache in zip((ours, theirs), caches, strict=True)
        )
        real = mask[:, begin:end].bool()
        close(found[real], expected[real])
        if end in (8, 19):  # whoever looks at a ring has it put in order, and steps go on
            for pair in zip(caches[0].layers, caches[1].layers, strict=True):
                if not isinstance(pair[1], StaticLayer):  # of a layer that borrows its keys
                    continue
                # Of padding attention gives one thing or another, which later layers make keys of.
                row, first = 1, 3 if padded else 0
                if pair[1].is_sliding:
                    first = max(0, first - (end - pair[1].max_cache_len))
                for name in ("keys", "values"):
                    close(*(getattr(layer, name)[row, :, first:end] for layer in pair))
                assert len({int(layer.get_seq_length()) for layer in pair}) == 1
    assert any(type(layer) is RingLayer for layer in caches[0].layers)
    caches[0].reset()
    again = fed(ours, ids[:, :9], mask[:, :9], caches[0], 0, 9)
    close(
        again[mask[:, :9].bool()],
        theirs(ids[:, :9], attention_mask=mask[:, :9]).logits[mask[:, :9].bool()],
    )


@pytest.mark.parametrize("name", ["experts", "ple"])
@torch.no_grad()
def test_hooks_between_steps(name, way):
    """A hook comes and goes while a conversation runs over a ring that has turned."""
    ids, results = some_ids(2, 24), []
    mask = left_padding(2, 24)
    for model in (small(name), plugin.enable(small(name))):
        cache, found = static_cache(model, 25), []
        found.append(fed(model, ids, mask, cache, 0, 9)[:, -1:])
        for end in range(10, 24):
            handles = []
            if end in (12, 13, 17):
                for path in ("layers.0.self_attn", "layers.1.self_attn.q_norm", "layers.1"):
                    module = model.model.get_submodule(path)
                    handles.append(module.register_forward_hook(lambda *args: None))
            if end in (14, 15, 20):
                module = model.model.layers[-1].self_attn.q_proj  # of a layer that may borrow keys
                handles.append(module.register_forward_hook(lambda *args: 1.25 * args[-1]))
            found.append(fed(model, ids, mask, cache, end - 1, end))
            for handle in handles:
                handle.remove()
        results.append(torch.cat(found, 1))
    close(*results)


@torch.no_grad()
def test_ops_of_a_step(way, monkeypatch):
    """Whole, and with one module after the other hooked."""
    if way == "as on a CPU":
        return  # where no op runs
    for name, layers, gates in (("ple", 4, 1), ("experts", 2, 0)):
        model = plugin.enable(small(name))
        cache, ids = static_cache(model, 16), some_ids(1, 16)
        model(ids[:, :9], past_key_values=cache)
        calls = Calls()
        use_ops(monkeypatch, calls)
        model(ids[:, 9:10], past_key_values=cache)
        # The last layer closes for the norm behind all layers.
        expected = dict(qkv_attention_decode=layers, add_rms_norm=1, rms_norm=1)
        expected["rms_norm"] += gates  # of the per-layer inputs
        if name == "ple":
            expected["linear_small"] = 6 * layers
        else:
            expected |= dict(linear_small=2 * layers, moe_open=layers, moe_experts_small=layers)
            expected["add_rms_norm"] += 1
            expected["rms_norm"] += 1
        assert calls == expected


@torch.no_grad()
def test_what_is_handed_on_is_what_was_returned(way):
    """A text model of another make is given whole hidden states."""
    if way == "as on a CPU":
        return
    theirs, ours = small("experts"), plugin.enable(small("experts"))
    ids = some_ids(2, 8)
    for model in (theirs, ours):
        inner = copy.copy(model.model)  # shares its layers; its forward is an attribute now
        seen = []
        forward = type(inner).forward.__get__(inner)
        inner.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)
        model.model = inner
        cache = static_cache(model, 9)
        seen.append(model(ids[:, :7], past_key_values=cache).logits)
        seen.append(model(ids[:, 7:], past_key_values=cache).logits)
        model.seen = torch.cat(seen, 1)
    close(ours.seen, theirs.seen)


@torch.no_grad()
def test_weights_stay_who_they_are(tmp_path, way):
    """Joined in memory, they are saved and loaded as transformers saves them."""
    model, ids = plugin.enable(small("ple")), some_ids(1, 9)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    expected = model.generate(ids, max_new_tokens=4, eos_token_id=None)
    assert all(parameters[name] is x for name, x in model.named_parameters())
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    model.save_pretrained(tmp_path)
    loaded = transformers.Gemma4ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, eos_token_id=None), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ple", "experts"])
@torch.no_grad()
def test_steps_compile_whole(name, way):
    """In 16 bits, and with masks made outside, as `generate` does; a ring fills and turns."""
    if way == "as on a CPU":
        return
    torch.compiler.reset()
    exact, theirs = small(name), small(name).bfloat16()
    ours = plugin.enable(small(name).bfloat16())
    nodes: list[str] = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled, ids = torch.compile(ours, fullgraph=True, backend=backend), some_ids(1, 11)
    caches = [static_cache(model, 12) for model in (ours, theirs)]
    found = []
    for begin, end in zip([0, *range(4, 10)], range(4, 11), strict=True):
        masks = transformers.masking_utils.create_masks_for_generate(
            config=ours.config,
            inputs_embeds=torch.empty(1, end - begin, 0),
            attention_mask=torch.ones(1, end),
            cache=caches[0],
            position_ids=None,
        )
        options = dict(attention_mask=masks, past_key_values=caches[0])
        a = (compiled if begin else ours)(ids[:, begin:end], **options).logits
        b = theirs(ids[:, begin:end], past_key_values=caches[1]).logits
        found.append((a, b))
    a, b = (torch.cat(logits, 1) - exact(ids[:, :10]).logits for logits in zip(*found, strict=True))
    assert a.abs().mean() <= 1.25 * b.abs().mean()
    assert any("qkv_attention_decode" in node for node in nodes)
