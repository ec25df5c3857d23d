"""These ops under transformers' own models: the numbers of its eager attention and experts.

Longer than 400 lines because all of it runs on one set of small models.
"""

import copy
import random
from pathlib import Path

import emulated
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler
from torch.nn.utils import parametrize

from gemma4_kernels import library, ops, reference

transformers = pytest.importorskip("transformers", minversion="5.24")

from transformers import masking_utils  # noqa: E402

from gemma4_kernels.integrations import transformers as plugin  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["dense", "e2b_like", "e4b_like", "moe_like", "k_eq_v", "attention_bias"]
each = pytest.mark.parametrize("name", NAMES)


def load(name, attention="eager", **options):
    if name == "moe_like":
        options["experts_implementation"] = "eager" if attention == "eager" else plugin.NAME
    return transformers.Gemma4ForCausalLM.from_pretrained(
        GOLDEN / name, attn_implementation=attention, **options
    ).eval()


def both(name):
    """Under transformers' eager attention, and with everything on these ops."""
    plugin.register()
    return load(name), plugin.enable(load(name, plugin.NAME))


def some_ids(batch, width, seed=0):
    return torch.randint(3, 96, (batch, width), generator=torch.Generator().manual_seed(seed))


def left_padding(batch, width):
    mask = torch.ones(batch, width, dtype=torch.long)
    for row in range(batch):
        mask[row, : 3 * row] = 0
    return mask


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


A_CPU_TAKES_OPS = plugin._takes_ops


@pytest.fixture(autouse=True)
def swapped(monkeypatch):
    """The models here are on a CPU, and the tests are of the arithmetic that GPUs get."""
    monkeypatch.setattr(plugin, "_takes_ops", lambda x: True)


@pytest.fixture
def as_on_a_cpu(swapped, monkeypatch):
    """As without these tests: a CPU is left to transformers."""
    monkeypatch.setattr(plugin, "_takes_ops", A_CPU_TAKES_OPS)


@pytest.fixture(autouse=True)
def no_other_attention(recwarn):
    """Whatever a test does here, no layer of it takes torch's attention unseen."""
    library.warn.cache_clear()
    yield
    fallen = [str(w.message) for w in recwarn if "without a kernel" in str(w.message)]
    assert not fallen


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
def test_e10_enabled(name):
    """Also layers of double width."""
    theirs, ours = both(name)
    ids, mask = some_ids(3, 40), left_padding(3, 40)
    close(ours(ids).logits, theirs(ids).logits)
    a, b = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (ours, theirs))
    close(a, b)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@each
@torch.no_grad()
def test_enable_and_disable(name):
    model = load(name)
    ids = some_ids(2, 12)
    before, classes = model(ids).logits, [type(m) for m in model.modules()]
    plugin.enable(model)
    copied = copy.deepcopy(model)
    assert "gemma4_kernels" in plugin.explain(model) or "eager twins" in plugin.explain(model)
    plugin.disable(model)
    assert [type(m) for m in model.modules()] == classes
    model.set_attn_implementation("eager")
    if name == "moe_like":
        model.set_experts_implementation("eager")
    assert torch.equal(model(ids).logits, before)
    close(copied(ids).logits, before)


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@each
def test_a10_generate(name, padded, cache):
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
@pytest.mark.parametrize("name", ["e4b_like", "moe_like"])
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
def test_packed_rows(name):
    """position_ids that restart, in one row twice and in the other not at all; beyond the window,
    and with the last tokens alone in the layers that share keys."""
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
    pairs = zip(theirs.named_parameters(), ours.named_parameters(), strict=True)
    for (key, a), (_, b) in pairs:
        scale = a.grad.abs().max().item()
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5 * max(scale, 1), rtol=1e-4, msg=key)


class LowRank(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(len(weight), weight.shape[1], 2) * 0.1)
        self.b = torch.nn.Parameter(torch.randn(len(weight), 2, weight.shape[2]) * 0.1)

    def forward(self, weight):
        return weight + self.a @ self.b


def test_m11_low_rank_adapters_on_experts():
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


@pytest.mark.parametrize("name", ["dense", "e4b_like", "moe_like"])
@torch.no_grad()
def test_bf16_is_no_further_from_fp32(name):
    ids = some_ids(4, 40)
    exact = load(name)(ids).logits
    theirs, ours = (model.bfloat16()(ids).logits.float() for model in both(name))
    # The median token: one whose expert changes by a last bit says nothing.
    ours, theirs = ((x - exact).abs().mean(-1).median() for x in (ours, theirs))
    assert ours <= 1.25 * theirs


@pytest.mark.parametrize("name", ["e4b_like", "moe_like"])
@torch.no_grad()
def test_compiles_whole(name):
    """A compiler cannot tell packed rows from others, unless there is an attention_mask."""
    theirs, ours = both(name)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    ids, mask = some_ids(2, 13), left_padding(2, 13)
    expected = theirs(ids, attention_mask=mask).logits[mask.bool()]
    close(compiled(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], expected)
    with pytest.warns(UserWarning, match="runs torch's attention, without a kernel: its mask"):
        close(compiled(ids, use_cache=False).logits, theirs(ids).logits)


@needs_compiler
@pytest.mark.parametrize("name", ["real_heads_bf16"])
@torch.no_grad()
def test_on_the_kernels(name, monkeypatch):
    """Head sizes 256 and 512 in bf16, under emulation; padded prefill and steps of decoding."""
    monkeypatch.setattr(plugin, "ops", emulated.ops())
    plugin.register()
    theirs = load(name, dtype=torch.bfloat16)
    ours = plugin.enable(load(name, plugin.NAME, dtype=torch.bfloat16))
    exact = load(name, dtype=torch.float32)
    ids, mask = some_ids(2, 18), left_padding(2, 18)
    with emulated.one_schedule():
        a, b, e = (
            m(ids, attention_mask=mask).logits.float()[mask.bool()] for m in (ours, theirs, exact)
        )
        assert (a - e).abs().mean() <= 1.25 * (b - e).abs().mean()
        output = ours(ids[:1], use_cache=True)
        step = ours(ids[1:, :1], past_key_values=output.past_key_values).logits.float()
    whole = torch.cat([ids[:1], ids[1:, :1]], 1)
    assert (step[:, -1] - exact(whole).logits[:, -1]).abs().mean() <= 0.1


@each
def test_cpu_calls_no_op(name, as_on_a_cpu, monkeypatch):
    """Prompts, padding, chunks, shared layers, caches and training without a single op."""
    monkeypatch.setattr(plugin, "ops", None)
    test_attention_alone(name)
    test_e10_enabled(name)
    test_chunked_prefill(name)
    test_shared_layers_with_sliced_queries(name)
    test_training(name, checkpointing=True)
    for cache in ("dynamic", "static"):
        for padded in (False, True):
            test_a10_generate(name, padded, cache)


class Calls:
    """The ops, and the names of those that were asked for."""

    def __init__(self):
        self.names = set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(ops, name)


@torch.no_grad()
def test_elsewhere_every_op_is_called(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(plugin, "ops", calls)
    test_chunked_prefill("e4b_like")
    dense = {"rms_norm", "add_rms_norm", "qkv_norm_rope", "ple_gate"}
    dense |= {"attention_prefill", "attention_decode"}
    assert calls.names == dense
    test_chunked_prefill("moe_like")
    assert calls.names == dense | {"moe_route", "moe_experts"}


@each
@torch.no_grad()
def test_cpu_with_packed_rows_and_long_prompts(name, as_on_a_cpu, monkeypatch):
    """What the attention op still does on a CPU, and steps of decoding after it."""
    test_packed_rows(name)
    theirs, ours = both(name)
    calls = Calls()
    monkeypatch.setattr(plugin, "ops", calls)
    long = reference.FUSED_ROWS + 3
    ids, mask = some_ids(2, long + 2), left_padding(2, long + 2)
    found, cache = [], None
    for begin, end in ((0, long), (long, long + 1), (long + 1, long + 2)):
        out = ours(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        cache = out.past_key_values
        found.append(out.logits)
    difference = torch.cat(found, 1) - theirs(ids, attention_mask=mask).logits
    assert difference[mask.bool()].abs().max() < 1e-4  # of logits near 2, over so many tokens
    assert calls.names == {"attention_prefill"}


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
def test_cpu_attention(options, bounds, queries, monkeypatch):
    """It is the same function of masks, windows and softcaps with the ops and without."""
    q, k, v = torch.randn(2, 4, queries, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask, results = BOUNDS[bounds], []
    if mask is not None:
        mask = mask.int()[:, None, None].repeat(1, 1, queries, 1)
        mask[..., -1] += torch.arange(1 - queries, 1)
    for takes in (True, False):
        monkeypatch.setattr(plugin, "_takes_ops", lambda x, takes=takes: takes)
        results.append(plugin.attention(torch.nn.Module(), q, k, v, mask, **options)[0])
    close(*results)


def test_cpu_attention_that_is_not_causal(as_on_a_cpu):
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
    found, _ = plugin.attention(torch.nn.Module(), q, k, v, None, is_causal=False)
    close(found.transpose(1, 2), F.scaled_dot_product_attention(q, k, v))


def test_cpu_compiles_whole(as_on_a_cpu):
    test_compiles_whole("moe_like")


@pytest.mark.parametrize("seed", range(3))
@each
@torch.no_grad()
def test_modules_need_not_agree(name, seed, monkeypatch):
    """A model may be spread over a GPU and a CPU: whatever its modules take, the numbers stay."""
    chance = random.Random(seed)
    monkeypatch.setattr(plugin, "_takes_ops", lambda x: chance.random() < 0.5)
    test_e10_enabled(name)
    test_chunked_prefill(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_cpu_experts_that_grouped_mm_refuses(dtype, as_on_a_cpu):
    """float64, and in bf16 rows that are no multiple of 16 bytes, run on the op."""
    model = load("moe_like").to(dtype)
    layer = model.model.layers[0].experts
    assert layer.down_proj.shape[-1] % 8, "bf16 rows that grouped_mm would take test nothing"
    x = torch.randn(9, layer.hidden_dim, dtype=dtype)
    weights, index = torch.rand(9, layer.num_experts, dtype=dtype).topk(2)
    expected = layer(x, index, weights)
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    plugin.enable(model)
    found = layer(x, index, weights)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    says = "experts: eager torch (no kernels for cpu)"
    assert (says in plugin.explain(model)) == (dtype != torch.float32)


def test_explain_on_a_cpu(as_on_a_cpu, monkeypatch):
    _, ours = both("moe_like")
    monkeypatch.setattr(plugin.extension, "BUILD", plugin.extension.Build())
    says = (
        "attention: eager torch (no kernels for cpu); experts: grouped_mm; "
        "norms, MLP, rotary: transformers"
    )
    assert all(line.endswith(says) for line in plugin.explain(ours).splitlines())


def test_multimodal_class_with_text():
    plugin.register()
    text = transformers.AutoConfig.from_pretrained(GOLDEN / "e4b_like")
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


def test_masks():
    """None where a layer needs none; else a few numbers a query, however many the keys."""
    pure = dict(batch_size=2, q_length=5, dtype=torch.float32)
    ones, padded = torch.ones(2, 9).bool(), torch.tensor([[1] * 9, [0, 0] + [1] * 7]).bool()
    assert plugin.mask(kv_length=9, q_offset=4, attention_mask=ones, **pure) is None
    static = plugin.mask(kv_length=20, q_offset=torch.tensor(4), **pure)
    assert static[:, 0, :, 0].tolist() == [[5, 6, 7, 8, 9]] * 2
    bounds = plugin.mask(kv_length=9, q_offset=4, attention_mask=padded, **pure)
    assert bounds[:, 0, 0].tolist() == [[0, 5], [2, 5]]
    sequences = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    packed = masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(
            masking_utils.sliding_window_causal_mask_function(4), torch.zeros(2, 5)
        ),
        masking_utils.packed_sequence_mask_function(sequences),
    )
    starts = plugin.mask(kv_length=5, mask_function=packed, allow_is_causal_skip=False, **pure)
    assert starts.shape == (2, 1, 5, 2) and starts[:, 0, 4].tolist() == [[0, 2], [0, 5]]
    holes = padded.clone()
    holes[0, 3] = False
    with pytest.raises(ValueError, match="one run of ones per row"):
        plugin.mask(kv_length=9, q_offset=4, attention_mask=holes, **pure)


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
    made = plugin.mask(**sizes, dtype=torch.float32)
    assert torch.equal(made, masking_utils.eager_mask(**sizes, dtype=torch.float32))
    assert made.shape == (2, 1, 9, 9) and made.is_floating_point()


def test_without_the_mask_function_padding_is_lost():
    """The trap this registers against: transformers then hands every layer None."""
    transformers.AttentionInterface.register("unmasked", plugin.attention)
    theirs, ours = load("dense"), load("dense", "unmasked")
    ids, mask = some_ids(2, 14), left_padding(2, 14)
    with torch.no_grad():
        a, b = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (ours, theirs))
    assert (a - b).abs().max() > 1e-2


def test_refusals():
    _, ours = both("dense")
    attn = ours.model.layers[0].self_attn
    q, k = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match=r"has no dropout, got attention_dropout 0\.1"):
        plugin.attention(attn, q, k, k, None, dropout=0.1)
    with pytest.raises(ValueError, match="enable needs a Gemma 4 text model, got Linear"):
        plugin.enable(torch.nn.Linear(2, 2))
    moe = load("moe_like")
    moe.model.layers[0].experts.act_fn = torch.nn.SiLU()
    with pytest.raises(ValueError, match=r"experts must have a tanh-GELU gate.*\(SiLU\)"):
        plugin.experts(moe.model.layers[0].experts, q, k, k)


def test_wrong_version_is_named(monkeypatch):
    monkeypatch.setattr(plugin.transformers, "__version__", "5.23.1")
    with pytest.raises(RuntimeError, match=r"needs transformers >= 5\.24, < 6, got 5\.23\.1"):
        plugin.register()
