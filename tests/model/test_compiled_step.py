"""Decoding steps compiled for a CPU: the numbers of the others, and compiled once."""

import warnings

import pytest
import torch
from support import tiny
from support.marks import needs_compiler

import gemma4.compiled
from gemma4.cache import Cache
from gemma4.decode import Decoder

PROMPT, WIDTH = (13, 1, 8), 13  # longer than the window of 8, and shorter


def decoder(model, lengths=PROMPT, steps=20, **options):
    """After the prompt, with the ids to go on with; what no token was put in is NaN."""
    width = max(lengths)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    cache = Cache(model.config, len(lengths), model.dtype, "cpu", width + steps)
    for store in (*cache.k.values(), *cache.v.values()):
        store.fill_(float("nan"))
    with torch.no_grad():
        logits = model(tiny.ids(len(lengths), width), attention_mask=mask, cache=cache).logits
    return Decoder(model, cache, steps, **options), logits[:, -1].argmax(-1)


def differences(model, steps, lengths=PROMPT):
    """Of the logits of both ways, fed the same ids: the largest of each step."""
    (plain, ids), (compiled, _) = (
        decoder(model, lengths, compile=given) for given in (False, True)
    )
    found = []
    for _ in range(steps):
        want = plain(ids)
        found.append(float((compiled(ids) - want).abs().max()))
        ids = want.argmax(-1)
    assert compiled.cache.lengths == plain.cache.lengths
    return found


@pytest.fixture
def graphs(monkeypatch):
    """Steps are traced but run as they were; the graphs that would be compiled."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    traced = torch.compile(Decoder.forward, fullgraph=True, backend=backend)
    monkeypatch.setattr(gemma4.compiled, "_compiled", lambda: traced)
    torch._dynamo.reset()
    return made


# One of them here: the compiler's own import takes seconds.
ALL = ["e_series", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dense", "k_eq_v", "moe"))]


@pytest.mark.parametrize("name", ALL)
def test_a_traced_step_has_the_numbers_of_the_others(graphs, name):
    """Rings that fill and wrap, rows of unequal length; all ops but the experts are looked into."""
    found = differences(tiny.tiny(tiny.ALL[name]), 12)
    assert found[0] == 0  # which runs as it is
    assert max(found) < 2e-5
    assert len(graphs) == 1
    targets = {str(node.target) for node in graphs[0].graph.nodes}
    called = {target for target in targets if "gemma4_kernels" in target}
    assert called == ({"gemma4_kernels.moe_experts"} if name == "moe" else set())


def test_what_was_compiled_serves_the_next_decoder(graphs):
    """Of the model, whatever it decodes; another batch takes another."""
    model = tiny.tiny(tiny.E_SERIES)
    for lengths in (PROMPT, (3, 9, 30), (2,), (70,)):
        differences(model, 2, lengths)
    assert len(graphs) == 2


def test_a_hooked_model_is_not_compiled(graphs):
    model = tiny.tiny(tiny.DENSE)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"is not compiled: model\.layers\.1\.mlp has hooks"):
        found = differences(model, 3)
    handle.remove()
    assert max(found) == 0 and not graphs


def test_refusals():
    model = tiny.tiny(tiny.DENSE)
    named = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with named, pytest.raises(RuntimeError, match=r"C\+\+ compiler, and there is no no-such-comp"):
        decoder(model, compile=True)
    cache = Cache(model.config, 1, model.dtype, "meta")
    with pytest.raises(ValueError, match="compile is for a CPU, got meta"):
        gemma4.compiled.prepare(cache)


def test_generate_compiles_its_steps(graphs):
    model = tiny.tiny(tiny.E_SERIES)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=[])
    expected = model.generate(tiny.ids(2, 5), **options)
    assert torch.equal(model.generate(tiny.ids(2, 5), compile=True, **options), expected)
    assert len(graphs) == 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["e_series", "moe"])
def test_a_compiled_step_has_the_numbers_of_the_others(name):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert max(differences(tiny.tiny(tiny.ALL[name]), 12)) < 2e-5
