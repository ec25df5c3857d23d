"""Models of transformers under the plug-in: the numbers of its eager attention and experts."""

import copy
import random
import warnings

import pytest
import torch
from support import emulated
from support.marks import needs_compiler
from support.plugged import (
    GOLDEN,
    Calls,
    base,
    both,
    close,
    close_gradients,
    each,
    left_padding,
    load,
    plugin,
    some_ids,
    transformers,
    use_ops,
)
from support.plugged import way as way
from torch.nn.utils import parametrize

from gemma4_kernels import ops
from gemma4_kernels.reference.attention import FUSED_ROWS


@each
@torch.no_grad()
def test_attention_alone(name):
    """Registered, and nothing swapped; beyond the window; a batch with padding on either side."""
    plugin.register()
    theirs, ours = load(name), load(name, plugin.NAME)
    ids = some_ids(3, 40)
    close(ours(ids).logits, theirs(ids).logits)
    for mask in (left_padding(3, 40), left_padding(3, 40).flip(1)):
        real = mask.bool()
        close(
            ours(ids, attention_mask=mask).logits[real],
            theirs(ids, attention_mask=mask).logits[real],
        )


@each
@torch.no_grad()
def test_enabled(name):
    """Also layers of double width."""
    theirs, ours = both(name)
    ids, mask = some_ids(3, 40), left_padding(3, 40)
    close(ours(ids).logits, theirs(ids).logits)
    a, b = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (ours, theirs))
    close(a, b)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@each
def test_generate(name, padded, cache):
    """Past the window, over a static cache whose layers differ in length."""
    if cache == "offloaded" and not torch.cuda.is_available():
        cache = "dynamic_full"
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None)
    options |= {"disable_compile": True}
    if cache in ("static", "offloaded"):
        options["cache_implementation"] = cache
    ids = some_ids(2, 14)
    mask = left_padding(2, 14) if padded else torch.ones_like(ids)
    results = []
    for model in both(name):
        if cache == "dynamic_full":
            options["past_key_values"] = transformers.DynamicCache()
        results.append(model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=3),
        dict(do_sample=True, top_k=20, temperature=0.7),
        dict(prompt_lookup_num_tokens=3),
    ],
    ids=["beams", "sampling", "assisted by lookup"],
)
@pytest.mark.parametrize("name", ["e2b_like", "moe_like"])
def test_ways_to_generate(name, options):
    ids = some_ids(1, 9)
    results = []
    for model in both(name):
        torch.manual_seed(5)
        results.append(model.generate(ids, max_new_tokens=20, eos_token_id=None, **options))
    assert torch.equal(*results)


def test_assisted_by_a_model():
    theirs, ours = both("dense")
    assistant = copy.deepcopy(theirs)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids = some_ids(1, 9)
    results = [
        model.generate(ids, max_new_tokens=20, eos_token_id=None, assistant_model=assistant)
        for model in (theirs, ours)
    ]
    assert torch.equal(*results)


@each
@torch.no_grad()
def test_chunked_prefill(name):
    theirs, ours = both(name)
    ids = some_ids(1, 37)
    expected, cache, found = theirs(ids).logits, None, []
    for begin, end in ((0, 11), (11, 29), (29, 30), (30, 37)):
        output = ours(ids[:, begin:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    close(torch.cat(found, 1), expected)


@each
@torch.no_grad()
def test_shared_layers_with_sliced_queries(name):
    """After the last layer that makes keys, transformers keeps the wanted positions alone."""
    theirs, ours = both(name)
    ids, mask = some_ids(2, 21), left_padding(2, 21)
    for keep in (1, 4):
        a, b = (
            m(ids, attention_mask=mask, logits_to_keep=keep, use_cache=True).logits
            for m in (ours, theirs)
        )
        close(a, b)


@each
@torch.no_grad()
def test_packed_rows(name, monkeypatch):
    """position_ids that restart, in one row twice and in the other not at all; beyond the window,
    and with the last tokens alone in the layers that share keys."""
    use_ops(monkeypatch, ops)
    theirs, ours = both(name)
    ids = some_ids(2, 30)
    restarts = torch.cat([torch.arange(5), torch.arange(17), torch.arange(8)])
    positions = torch.stack([restarts, torch.arange(30)])
    found = ours(ids, position_ids=positions, use_cache=False).logits
    close(found, theirs(ids, position_ids=positions, use_cache=False).logits)
    close(found[:1, 5:22], theirs(ids[:1, 5:22]).logits)
    for keep in (3, 12):
        options = dict(position_ids=positions, use_cache=False, logits_to_keep=keep)
        close(ours(ids, **options).logits, found[:, -keep:])


@pytest.mark.parametrize("checkpointing", [False, True])
@each
def test_training(name, checkpointing):
    theirs, ours = both(name)
    ids, mask = some_ids(2, 15), left_padding(2, 15)
    # The first token is predicted at a padded position, where the two may differ.
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    losses = []
    for model in (theirs, ours):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses.append(model(ids, attention_mask=mask, labels=labels).loss)
        losses[-1].backward()
    close(losses[1], losses[0])
    close_gradients(ours, theirs)


class LowRank(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(len(weight), weight.shape[1], 2) * 0.1)
        self.b = torch.nn.Parameter(torch.randn(len(weight), 2, weight.shape[2]) * 0.1)

    def forward(self, weight):
        return weight + self.a @ self.b


def test_low_rank_adapters_on_experts():
    """One step of training changes the output, as it does there; merged, it stays."""
    ids, results = some_ids(2, 9), []
    for model in both("moe_like"):
        torch.manual_seed(3)
        model.requires_grad_(False)
        names = ("gate_up_proj", "down_proj")
        for layer in model.model.layers:
            for name in names:
                adapter = LowRank(getattr(layer.experts, name))
                parametrize.register_parametrization(layer.experts, name, adapter)
        before = model(ids).logits.detach()
        adapters = [p for p in model.parameters() if p.requires_grad]
        model(ids, labels=ids).loss.backward()
        assert all(p.grad.abs().max() > 0 for p in adapters)
        torch.optim.SGD(adapters, lr=1.0).step()
        with torch.no_grad():
            after = model(ids).logits
            for layer in model.model.layers:
                for name in names:
                    parametrize.remove_parametrizations(layer.experts, name)
            merged = model(ids).logits
        assert (after - before).abs().max() > 1e-3
        close(merged, after)
        results.append(after)
    close(*results)


@pytest.mark.parametrize("name", ["dense", "e2b_like", "moe_like"])
@torch.no_grad()
def test_bf16_is_no_further_from_fp32(name, monkeypatch):
    use_ops(monkeypatch, ops)  # grouped_mm refuses the narrow rows of these experts
    ids = some_ids(8, 60)
    exact = load(name)(ids).logits
    theirs, ours = (model.bfloat16()(ids).logits.float() for model in both(name))
    # The median token: one whose expert changes by a last bit says nothing.
    ours, theirs = ((x - exact).abs().mean(-1).median() for x in (ours, theirs))
    assert ours <= 1.25 * theirs


@pytest.mark.parametrize("name", [pytest.param("e2b_like", marks=pytest.mark.slow), "moe_like"])
@torch.no_grad()
def test_compiles_whole(name):
    """A compiler cannot tell packed rows from others, unless there is an attention_mask."""
    theirs, ours = both(name)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    ids, mask = some_ids(2, 13), left_padding(2, 13)
    expected = theirs(ids, attention_mask=mask).logits[mask.bool()]
    close(compiled(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], expected)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        close(compiled(ids, use_cache=False).logits, theirs(ids).logits)
    assert any("runs torch's attention, without a kernel: its mask" in str(w.message) for w in said)


@torch.no_grad()
def test_few_tokens_compile_whole(way):
    """In 16 bits, where one kernel closes the feed-forward and opens the per-layer gate."""
    torch.compiler.reset()
    ours = plugin.enable(load("e2b_like", dtype=torch.bfloat16))
    nodes: list[str] = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    ids = some_ids(1, 7)
    options = dict(attention_mask=torch.ones_like(ids), use_cache=False)
    assert torch.equal(compiled(ids, **options).logits, ours(ids, **options).logits)
    assert any("linear_small" in node for node in nodes) == (way == "as on a GPU")


@needs_compiler
@pytest.mark.parametrize("name", ["real_heads_bf16"])
@torch.no_grad()
def test_on_the_kernels(name, monkeypatch):
    """Head sizes 256 and 512 in bf16, under emulation; padded prefill and steps of decoding."""
    use_ops(monkeypatch, emulated.ops())  # not none, as on a CPU
    plugin.register()
    theirs = load(name, dtype=torch.bfloat16)
    # A copy: a file's tensors need not begin on multiples of 16 bytes, as memory of their own does.
    ours = plugin.enable(copy.deepcopy(load(name, plugin.NAME, dtype=torch.bfloat16)))
    exact = load(name, dtype=torch.float32)
    ids, mask = some_ids(2, 18), left_padding(2, 18)
    with emulated.one_schedule():
        a, b, e = (
            m(ids, attention_mask=mask).logits.float()[mask.bool()] for m in (ours, theirs, exact)
        )
        assert (a - e).abs().mean() <= 1.25 * (b - e).abs().mean()
        for rows, options in ((1, {}), (2, dict(attention_mask=mask[:, :16]))):
            ours_and_theirs = []
            for model in (ours, theirs):
                cache = transformers.StaticCache(model.config, max_cache_len=18)
                model(ids[:rows, :16], past_key_values=cache, **options)
                found = []
                for end in (17, 18):
                    if options:
                        options = dict(attention_mask=mask[:, :end])
                    step = model(ids[:rows, end - 1 : end], past_key_values=cache, **options)
                    found.append(step.logits)
                ours_and_theirs.append(torch.cat(found, 1).float())
            a, b = ours_and_theirs
            e = exact(ids[:rows], attention_mask=mask[:rows]).logits[:, 16:]
            assert (a - e).abs().mean() <= 1.25 * (b - e).abs().mean()


@torch.no_grad()
def test_every_op_is_called(way, monkeypatch):
    if way == "as on a CPU":
        return  # where `way` makes a call of any op an error
    calls = Calls()
    use_ops(monkeypatch, calls)
    test_chunked_prefill("e2b_like")
    dense = {"rms_norm", "add_rms_norm", "qkv_norm_rope", "ple_gate", "linear_small"}
    dense |= {"attention_prefill", "attention_decode"}
    assert calls.keys() == dense
    test_chunked_prefill("moe_like")
    assert calls.keys() == dense | {"moe_route", "moe_experts"}


@pytest.mark.parametrize("name", ["e2b_like", "moe_like"])
@torch.no_grad()
def test_long_prompts(name, way, monkeypatch):
    """Longer than a mask should be, and steps of decoding after it."""
    theirs, ours = both(name)
    calls = Calls()
    use_ops(monkeypatch, calls)
    long = FUSED_ROWS + 3
    ids, mask = some_ids(2, long + 2), left_padding(2, long + 2)
    found, cache = [], None
    for begin, end in ((0, long), (long, long + 1), (long + 1, long + 2)):
        out = ours(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        cache = out.past_key_values
        found.append(out.logits)
    difference = torch.cat(found, 1) - theirs(ids, attention_mask=mask).logits
    assert difference[mask.bool()].abs().max() < 1e-4  # of logits near 2, over so many tokens
    if way == "as on a CPU":
        assert calls.keys() == {"attention_prefill"}


@pytest.mark.parametrize("seed", range(2))
@each
@torch.no_grad()
def test_modules_need_not_agree(name, seed, monkeypatch):
    """A model may be spread over a GPU and a CPU: whatever its modules take, the numbers stay."""
    chance = random.Random(seed)
    use_ops(monkeypatch, ops)
    monkeypatch.setattr(base, "takes_ops", lambda x: chance.random() < 0.5)
    test_enabled(name)
    test_chunked_prefill(name)


def test_multimodal_class_with_text():
    plugin.register()
    text = transformers.AutoConfig.from_pretrained(GOLDEN / "e2b_like")
    config = transformers.Gemma4Config(
        text_config=text.to_dict(), vision_config=None, audio_config=None
    )
    torch.manual_seed(0)
    model = transformers.Gemma4ForConditionalGeneration._from_config(
        copy.deepcopy(config), attn_implementation="eager"
    ).eval()
    ids, mask = some_ids(2, 17), left_padding(2, 17)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        plugin.enable(model)
        close(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected)


@torch.no_grad()
def test_another_model():
    """Llama: scaled scores, no window, SiLU left alone."""
    plugin.register()
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM._from_config(
        copy.deepcopy(config), attn_implementation="eager"
    ).eval()
    ids, mask = some_ids(3, 20), left_padding(3, 20)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation(plugin.NAME)
    close(model(ids, attention_mask=mask).logits[mask.bool()], expected)
