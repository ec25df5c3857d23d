"""The decoding step: the numbers of the ordinary forward, without its host work."""

from collections import Counter

import pytest
import torch
from support import emulated, tiny
from support.expect import NoHostReads
from support.marks import needs_compiler
from torch.utils._python_dispatch import TorchDispatchMode

import gemma4.decode_layers
import gemma4.modules
import gemma4.steps
from gemma4 import GenerationConfig
from gemma4.cache import Cache
from gemma4.decode import Decoder
from gemma4.generate.sampling import Sampler

PROMPT = 13  # longer than the window of 8


def prefilled(model, lengths):
    """A cache of rows of these lengths, left-padded, and the ids to go on with."""
    width = max(lengths)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    cache = Cache(model.config, len(lengths), model.dtype, "cpu")
    with torch.no_grad():
        logits = model(tiny.ids(len(lengths), width), attention_mask=mask, cache=cache).logits
    return cache, logits[:, -1].argmax(-1)


@pytest.mark.parametrize("name", tiny.ALL)
def test_equals_the_forward(name):
    """Rings that fill and wrap twice, rows of unequal length; and the cache goes on being one."""
    model, lengths, steps = tiny.tiny(tiny.ALL[name]), (PROMPT, 1, 8), 40
    expected, ids = prefilled(model, lengths)
    cache, _ = prefilled(model, lengths)
    decoder = Decoder(model, cache, steps)
    for _ in range(steps):
        with torch.no_grad():
            want = model(ids[:, None], cache=expected).logits[:, -1]
        assert torch.equal(decoder(ids), want)
        ids = want.argmax(-1)
    assert cache.lengths == expected.lengths and cache.columns == expected.columns
    for held in (cache, expected):
        held.trim(3)
    with torch.no_grad():
        one, other = (model(ids[:, None], cache=held).logits for held in (cache, expected))
    assert torch.equal(one, other)


def test_full_cache_and_wrong_rows_are_named():
    model = tiny.tiny(tiny.DENSE)
    cache, ids = prefilled(model, (PROMPT, 2))
    decoder = Decoder(model, cache, 1)
    with pytest.raises(ValueError, match=r"ids must be \[2\], got \[3\]"):
        decoder(torch.zeros(3, dtype=torch.int64))
    for _ in range(cache.room):
        decoder(ids)
    with pytest.raises(ValueError, match="cache is full: its longest row holds 64 tokens"):
        decoder(ids)
    with pytest.raises(ValueError, match="cache belongs to a model of another shape"):
        Decoder(tiny.tiny(tiny.K_EQ_V), cache, 1)


@pytest.mark.parametrize("name", tiny.ALL)
def test_step_compiles_whole(name):
    model, eager = (tiny.tiny(tiny.ALL[name]) for _ in range(2))
    steps = 4
    expected, ids = prefilled(eager, (PROMPT, 5))
    cache, _ = prefilled(model, (PROMPT, 5))
    decoder, reference = Decoder(model, cache, steps), Decoder(eager, expected, steps)
    torch.compiler.reset()
    decoder.forward = torch.compile(decoder.forward, fullgraph=True, backend="aot_eager")
    for _ in range(steps):
        logits = decoder(ids)
        assert torch.allclose(logits, reference(ids), atol=1e-5)
        ids = logits.argmax(-1)


@pytest.fixture
def on_kernels():
    """The emulated kernels are under the ops, each dispatched as one op."""
    emulated.ops()


class Operators(TorchDispatchMode):
    """Counts what is dispatched and does work: all but views."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in ("_unsafe_view", "detach"):
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def half_with_kernel_shapes(options):
    return tiny.tiny(options, head_dim=64, global_head_dim=128).half()


@needs_compiler
@pytest.mark.parametrize("name", tiny.ALL)
def test_step_reads_nothing_on_the_host(on_kernels, name):
    """The choice of the token is a part of it."""
    model = half_with_kernel_shapes(tiny.ALL[name])
    cache, ids = prefilled(model, (PROMPT, 3))
    options = GenerationConfig(do_sample=True, top_k=9, top_p=0.9, eos_token_id=[5])
    sampler = Sampler(options, [], 0, 2, torch.device("cpu"))
    sampler.ids.copy_(ids)
    decoder = Decoder(model, cache, 2, sampler)
    with emulated.one_schedule():
        decoder(sampler.ids)
        with NoHostReads():
            decoder(sampler.ids)


def tokens(model, choice_in_step, steps=6):
    """Of a few steps, sampled in the step or behind it from the logits of a decoder."""
    cache, ids = prefilled(model, (PROMPT, 3))
    options = GenerationConfig(do_sample=True, temperature=0.8, top_k=30)
    sampler = Sampler(options, [], 5, 2, torch.device("cpu"))
    sampler.ids.copy_(ids)
    decoder = Decoder(model, cache, steps, sampler if choice_in_step else None)
    for _ in range(steps):
        logits = decoder(sampler.ids)
        if not choice_in_step:
            sampler(ids[:, None], logits, decoder.plan.positions)
        yield sampler.ids.tolist()


@pytest.mark.parametrize("name", tiny.ALL)
def test_the_token_is_chosen_in_the_step(name):
    """Whoever looks at a part of the model that the step would pass by."""
    sizes = dict(vocab_size=104, final_logit_softcapping=0.5)
    if name == "e_series":
        sizes["vocab_size_per_layer_input"] = 104
    model = tiny.tiny(tiny.ALL[name], **sizes)
    expected = list(tokens(model, False))
    assert list(tokens(model, True)) == expected and len(set(map(tuple, expected))) > 3
    for part in ("", "model", "model.norm", "lm_head"):
        seen = []
        hook = model.get_submodule(part).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert list(tokens(model, True)) == expected
        hook.remove()
        assert len(seen) == 7  # the prompt, and six steps


MOST = {"dense": 5, "e_series": 7, "k_eq_v": 5, "moe": 5}


@needs_compiler
@pytest.mark.parametrize("name", tiny.ALL)
def test_operators_of_a_layer(on_kernels, monkeypatch, name):
    """Matrix products and fused ops alone: no copy, no cast, nothing made contiguous."""
    model = half_with_kernel_shapes(tiny.ALL[name])
    cache, ids = prefilled(model, (PROMPT, 3))
    decoder, layers = Decoder(model, cache, 2), []
    step = gemma4.decode_layers.step

    def counted(*args):
        with Operators() as operators:
            result = step(*args)
        del operators.names["set_dependent_launches"]  # the backend's, at every call
        layers.append(operators.names)
        return result

    monkeypatch.setattr(gemma4.decode_layers, "step", counted)
    with emulated.one_schedule():
        decoder(ids)
    known = {"mm", *emulated.ops_with_kernels()}
    assert len(layers) == model.config.num_hidden_layers
    for operators in layers:
        assert set(operators) <= known, operators
        assert sum(operators.values()) <= MOST[name], operators


@pytest.mark.parametrize("watched", ["mlp", "self_attn.q_norm", "post_attention_layernorm"])
@pytest.mark.parametrize("name", tiny.ALL)
def test_a_layer_that_somebody_looks_into_is_called(monkeypatch, name, watched):
    """In the midst of layers that are steps; the logits are those of all of them."""
    model = tiny.tiny(tiny.ALL[name])
    (expected, ids), (cache, _) = (prefilled(model, (PROMPT, 5)) for _ in range(2))
    logits = Decoder(model, expected, 1)(ids)
    seen, steps, step = [], [], gemma4.decode_layers.step
    monkeypatch.setattr(gemma4.decode_layers, "step", lambda *args: steps.append(1) or step(*args))
    hook = (
        model.model.layers[2]
        .get_submodule(watched)
        .register_forward_hook(lambda module, args, output: seen.append(output.shape))
    )
    assert torch.allclose(Decoder(model, cache, 1)(ids), logits, atol=1e-5)
    hook.remove()
    assert len(seen) == 1 and len(steps) == model.config.num_hidden_layers - 1


@needs_compiler
@pytest.mark.parametrize("name", tiny.ALL)
def test_a_layer_that_is_called_on_kernels(on_kernels, monkeypatch, name):
    """Hooked or adapted: the logits are those of the step's layers, up to fp16's roundings."""
    peft = pytest.importorskip("peft")
    steps, step = [], gemma4.decode_layers.step
    monkeypatch.setattr(gemma4.decode_layers, "step", lambda *args: steps.append(1) or step(*args))

    def logits_and_steps(change):
        model = half_with_kernel_shapes(tiny.ALL[name])
        cache, ids = prefilled(model, (PROMPT, 3))
        change(model)
        steps.clear()
        return Decoder(model, cache, 1)(ids).float(), len(steps)

    def hook(model):
        model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: None)

    def adapt(model):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))

    with emulated.one_schedule():
        (expected, layers), *others = map(logits_and_steps, (lambda model: None, hook, adapt))
    assert [called for _, called in others] == [layers - 1, 0]
    for logits, _ in others:
        assert torch.allclose(logits, expected, atol=0.02 * expected.abs().max())
