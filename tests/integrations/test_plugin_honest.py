"""Whatever hangs on a module of an enabled model acts as it does in plain transformers.

Every submodule in turn: a hook that changes what it gives, hooks that change what it is given, and
a wrapper in its place. Logits of a prompt, of a step of decoding, and gradients are compared.
"""

import copy
import functools

import pytest
import torch
from support.plugged import (
    Calls,
    close,
    close_gradients,
    left_padding,
    plugin,
    small,
    some_ids,
    transformers,
    use_ops,
)
from support.plugged import way as way
from torch import nn
from torch.nn.utils import parametrize

from gemma4_kernels import ops


def changed(value, integers=False):
    """Another value of the same form: each channel, and the last token, in its own way."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return 98 - value if integers else value
        value = value * torch.linspace(0.8, 1.2, value.shape[-1]) + 0.05
        if value.ndim > 2:  # experts see their tokens in an order of their own
            value = torch.cat([value[:, :-1], 1.5 * value[:, -1:]], 1)
        return value
    if isinstance(value, tuple):
        return tuple(changed(part, integers) for part in value)
    if hasattr(value, "last_hidden_state"):
        value.last_hidden_state = changed(value.last_hidden_state)
    return value


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return changed(self.inner(*args, **kwargs))


def hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda module, args, output: changed(output))


def pre_hook(model, name):
    module = model.get_submodule(name)
    integers = "embed" in name or "rotary" in name
    module.register_forward_pre_hook(lambda module, args: changed(args, integers))


def pre_hook_with_kwargs(model, name):
    def change(module, args, kwargs):
        for key in ("hidden_states", "position_embeddings", "input_ids"):
            if kwargs.get(key) is not None:
                kwargs[key] = changed(kwargs[key], key == "input_ids")
        return changed(args, "embed" in name or "rotary" in name), kwargs

    model.get_submodule(name).register_forward_pre_hook(change, with_kwargs=True)


def wrapper(model, name):
    model.set_submodule(name, Wrapper(model.get_submodule(name)))


def results(model, ids, padding, static=False):
    """Logits of a padded prompt and of a step after it, and those of training, with gradients."""
    cache = None
    if static:  # longer than the window of half of its layers, which is full at the step
        cache = transformers.StaticCache(model.config, max_cache_len=ids.shape[1] + 2)
    with torch.no_grad():
        prompt = model(
            ids[:, :-1], attention_mask=padding[:, :-1], use_cache=True, past_key_values=cache
        )
        step = model(ids[:, -1:], attention_mask=padding, past_key_values=prompt.past_key_values)
    trained = model(ids, attention_mask=padding, use_cache=False).logits[padding.bool()]
    (trained * torch.linspace(-1, 1, trained.shape[-1])).mean().backward()
    return [prompt.logits[padding[:, :-1].bool()], step.logits, trained]


@functools.cache
def modules_of(name):
    """All that is called; the third layer is as the fourth."""
    return [
        path
        for path, module in small(name).named_modules()
        if path and not isinstance(module, nn.ModuleList) and ".layers.2" not in path
    ]


@functools.cache
def expected_of(name, change):
    """What plain transformers gives under a change of each module: numbers and gradients."""
    expected = {}
    for path in modules_of(name):
        model = small(name)
        change(model, path)
        expected[path] = results(model, IDS, PADDING, change is not wrapper), model
    return expected


models = pytest.mark.parametrize("name", ["experts", "ple"])
IDS, PADDING = some_ids(2, 11), left_padding(2, 11)


@pytest.mark.parametrize("change", [hook, pre_hook, pre_hook_with_kwargs, wrapper])
@models
def test_every_submodule(name, change, monkeypatch):
    use_ops(monkeypatch, ops)  # these experts are too narrow for grouped_mm on a CPU
    static = change is not wrapper
    unchanged, without_effect = results(small(name), IDS, PADDING, static), set()
    enabled = plugin.enable(small(name))
    for path, (expected, theirs) in expected_of(name, change).items():
        ours = copy.deepcopy(enabled)
        change(ours, path)
        found = results(ours, IDS, PADDING, static)
        try:
            for a, b in zip(found, expected, strict=True):
                close(a, b)
            close_gradients(ours, theirs)
        except AssertionError as error:
            raise AssertionError(f"{change.__name__} on {path}") from error
        if all(torch.equal(a, b) for a, b in zip(expected, unchanged, strict=True)):
            without_effect.add(path)
    # What is called with keywords alone gives a hook that sees none of them nothing to change.
    by_keyword = {path for path in modules_of(name) if path.endswith("self_attn")} | {"model"}
    assert without_effect == (by_keyword if change is pre_hook else set())


@models
@torch.no_grad()
def test_what_is_not_plain_leaves_the_rest_fused(name, way, monkeypatch):
    if way == "as on a CPU":
        return  # where nothing is fused
    model = plugin.enable(small(name))
    layers = len(model.model.layers)

    def calls():
        counted = Calls()
        use_ops(monkeypatch, counted)
        model(IDS, attention_mask=PADDING)
        return counted

    plain = calls()
    assert plain["qkv_norm_rope"] == layers
    expected = {
        "": {},
        "self_attn": {},
        "self_attn.q_norm": {"qkv_norm_rope": -1, "rms_norm": 3},
        "post_attention_layernorm": {"add_rms_norm": -1, "rms_norm": 2},
        "pre_feedforward_layernorm": {"rms_norm": 1},
        "post_feedforward_layernorm": {"add_rms_norm": -1, "rms_norm": 1},
        "mlp": {},
        "mlp.act_fn": {"ple_gate": -1},
    }
    for path, difference in expected.items():
        module = model.model.layers[0].get_submodule(path)
        handle = module.register_forward_hook(lambda *args: None)
        assert calls() == {**plain, **{k: plain[k] + n for k, n in difference.items()}}, path
        handle.remove()
    # Whoever sees what a layer is given sees cosines, and so do all layers.
    handle = model.model.layers[0].register_forward_hook(lambda *args: None, with_kwargs=True)
    assert calls()["qkv_norm_rope"] == 0
    handle.remove()
    assert calls() == plain


def test_the_rotary_embedding_gives_cosines_to_others():
    """Called by hand, and to a hook; within a model that is all plain and outside of it."""
    theirs, ours = small("experts"), plugin.enable(small("experts"))
    x, positions = torch.randn(1, 5, 32), torch.arange(5)[None]
    ours(IDS)
    for model in (theirs, ours):
        model.seen = []
        cos, sin = model.model.rotary_emb(x, positions, "full_attention")
        model.model.rotary_emb.register_forward_hook(lambda m, a, o, to=model.seen: to.append(o))
        model(IDS)
        model.seen.append((cos, sin))
    for a, b in zip(ours.seen, theirs.seen, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


class Half(nn.Module):
    def forward(self, scalar):
        return scalar / 2


@models
def test_layer_scalars_that_are_trained_or_computed(name, monkeypatch):
    use_ops(monkeypatch, ops)
    theirs, ours = small(name), plugin.enable(small(name))
    for model in (theirs, ours):
        first, second = model.model.layers[:2]
        del first.layer_scalar
        first.layer_scalar = nn.Parameter(torch.tensor([0.7]))
        parametrize.register_parametrization(second, "layer_scalar", Half())
    for a, b in zip(*(results(m, IDS, PADDING) for m in (ours, theirs)), strict=True):
        close(a, b)
    close_gradients(ours, theirs)
    assert ours.model.layers[0].layer_scalar.grad is not None


def test_hooks_of_all_modules(monkeypatch):
    use_ops(monkeypatch, ops)
    theirs, ours, seen = small("ple"), plugin.enable(small("ple")), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(id(m)))
    try:
        for model in (theirs, ours):
            seen.clear()
            model(IDS)
            called = [name for i in seen for name, m in model.named_modules() if id(m) == i]
            model.called = called
    finally:
        handle.remove()
    assert ours.called == theirs.called
