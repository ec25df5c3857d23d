"""The whole model: caches, padding, packing, sharing, experts, generation and bad input."""

from pathlib import Path

import pytest
import torch
from support.tiny import ALL, DENSE, E_SERIES, K_EQ_V, MOE, F, S, ids, tiny

import gemma4.steps
from gemma4 import Cache, Gemma4ForCausalLM, Gemma4TextConfig

each = pytest.mark.parametrize("options", ALL.values(), ids=ALL)
close = torch.testing.assert_close
GREEDY = dict(do_sample=False, eos_token_id=[])


@each
@torch.no_grad()
def test_cached_prefill_longer_than_the_window(options: dict) -> None:
    model, prompt = tiny(options), ids(1, 27)
    plain = model(prompt, use_cache=False).logits
    close(model(prompt, use_cache=True).logits, plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_later_chunks_read_earlier_values() -> None:
    model, prompt = tiny(DENSE), ids(1, 31)
    changed = prompt.clone()
    changed[0, 2] = (changed[0, 2] - 3 + 1) % 94 + 3
    last = []
    for tokens in (prompt, changed):
        cache = None
        for chunk in tokens.split(5, 1):
            output = model(chunk, cache=cache, use_cache=True)
            cache = output.cache
        last.append(output.logits[:, -1])
        close(last[-1], model(tokens, use_cache=False).logits[:, -1], atol=1e-5, rtol=0)
    assert (last[0] - last[1]).abs().max() > 1e-6


@each
@torch.no_grad()
def test_decoding_past_several_wraps(options: dict) -> None:
    model, tokens = tiny(options).double(), ids(1, 48)
    cache = Cache(model.config, 1, torch.float64, torch.device("cpu"), rollback=2)
    plain = model(tokens, use_cache=False).logits
    for i in range(48):
        step = model(tokens[:, i : i + 1], cache=cache).logits
        close(step[:, 0], plain[:, i], atol=1e-10, rtol=0)


@torch.no_grad()
def test_windows_by_layer_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = gemma4.steps.ops.attention_prefill

    def spy(*args: object, **options: object) -> object:
        seen.append(options["window"])
        return real(*args, **options)

    monkeypatch.setattr(gemma4.steps.ops, "attention_prefill", spy)
    tiny(DENSE)(ids(1, 20), use_cache=False)
    assert seen == [8, 8, 8, 8, 8, 0]


@each
@torch.no_grad()
def test_trim_equals_a_straight_run(options: dict) -> None:
    model, tokens = tiny(options), ids(1, 6)
    for prefix in (4, 30):
        start = ids(1, prefix, seed=1)
        cache = model(start, use_cache=True).cache
        model(tokens[:, :1], cache=cache)
        cache.trim(1)
        assert cache.get_seq_length() == prefix
        mask = torch.ones(1, prefix + 2, dtype=torch.int64)
        found = model(tokens[:, 2:4], attention_mask=mask, cache=cache).logits
        whole = torch.cat([start, tokens[:, 2:4]], 1)
        close(found, model(whole, use_cache=False).logits[:, -2:], atol=3e-5, rtol=0)


def test_trim_refuses_what_a_ring_has_lost() -> None:
    model = tiny(DENSE)
    with torch.no_grad():
        cache = model(ids(1, 60), use_cache=True).cache
    with pytest.raises(ValueError, match="rollback"):
        cache.trim(30)
    assert cache.lengths == [60]


@each
def test_batch_rows_equal_solo_runs(options: dict) -> None:
    model = tiny(options)
    rows = [ids(1, n, seed=n) for n in (5, 17, 1)]
    batch, mask = torch.zeros(3, 17, dtype=torch.int64), torch.zeros(3, 17, dtype=torch.int64)
    for side in ("left", "right"):
        mask.zero_()
        for r, row in enumerate(rows):
            place = slice(17 - row.shape[1], 17) if side == "left" else slice(0, row.shape[1])
            batch[r, place], mask[r, place] = row[0], 1
        found = model.generate(batch, mask, max_new_tokens=12, prefill_chunk_size=6, **GREEDY)
        for r, row in enumerate(rows):
            solo = model.generate(row, max_new_tokens=12, **GREEDY)
            assert torch.equal(found[r, 17:], solo[0, row.shape[1] :])


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_padding_is_finite(options: dict, dtype: torch.dtype) -> None:
    model, batch = tiny(options).to(dtype), ids(3, 12)
    mask = torch.arange(12) >= torch.tensor([[9], [5], [0]])
    logits = model(batch, attention_mask=mask.long()).logits
    assert logits.isfinite().all()
    solo = model(batch[:1, 9:]).logits
    close(logits[:1, 9:], solo, atol=2e-5 if dtype == torch.float32 else 5e-2, rtol=0)


@each
@pytest.mark.parametrize("start", [0, 9])
@torch.no_grad()
def test_packed_segments_are_isolated(options: dict, start: int) -> None:
    # In float64: other positions are other angles, whose rounding fp32 logits show.
    model, row = tiny(options).double(), ids(1, 12)
    positions = torch.tensor([[*range(5), *range(start, start + 7)]])
    mask = torch.ones(1, 12, dtype=torch.int64)
    packed = model(row, attention_mask=mask, position_ids=positions).logits
    close(packed[:, 5:], model(row[:, 5:]).logits, atol=5e-6, rtol=0)


@torch.no_grad()
def test_masks() -> None:
    model, batch = tiny(DENSE), ids(2, 8)
    mask = torch.ones(2, 8)
    mask[0, :3] = 0
    forms = [model(batch, attention_mask=m).logits for m in (mask, mask.bool(), mask.long())]
    assert torch.equal(forms[0], forms[1]) and torch.equal(forms[0], forms[2])
    holes = mask.clone()
    holes[1, 4] = 0
    for wrong, sentence in (
        (mask[:, None, None].bool(), "4 dimensions"),
        (mask.log(), "0 and 1 alone"),
        (mask.masked_fill(mask == 0, float("nan")), "NaN"),
        (holes, "row 1 has holes"),
        (mask[:, :6], r"\[2, 8\].*got \[2, 6\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(batch, attention_mask=wrong)


def test_borrowing_layers_own_no_cache() -> None:
    model = tiny(E_SERIES)
    with torch.no_grad():
        cache = model(ids(1, 9), use_cache=True).cache
    assert sorted(cache.k) == [0, 1, 2, 3]


def test_checkpointing_leaves_donor_gradients() -> None:
    model, batch = tiny(E_SERIES).train(), ids(2, 14)
    grads = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(batch, labels=batch).loss.backward()
        grads.append([model.model.layers[i].self_attn.k_proj.weight.grad for i in (2, 3)])
    for plain, checkpointed in zip(*grads, strict=True):
        assert plain.abs().max() > 0
        close(plain, checkpointed)


def test_owners() -> None:
    config = Gemma4TextConfig(**E_SERIES)
    assert [config.kv_owner(i) for i in range(8)] == [0, 1, 2, 3, 2, 2, 2, 3]


@torch.no_grad()
def test_values_see_neither_k_norm_nor_rotation() -> None:
    model, prompt = tiny(K_EQ_V), ids(1, 9)
    before = model(prompt, use_cache=True).cache
    assert not torch.equal(before.k[5][:, :9], before.v[5][:, :9])
    model.model.layers[5].self_attn.k_norm.weight.mul_(3)
    after = model(prompt, use_cache=True).cache
    assert torch.equal(before.v[5][:, :9], after.v[5][:, :9])
    close(after.k[5][:, :9], 3 * before.k[5][:, :9])


def test_frequencies_stay_fp32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        rope = tiny(DENSE).to(dtype).model.rotary_emb
        assert rope[S].dtype == rope[F].dtype == torch.float32
        exact = (131_071 * 10_000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)).cos()
        close((131_071 * rope[S]).cos().double(), exact, atol=0.05, rtol=0)


def test_every_norm_has_a_gradient() -> None:
    model, batch = tiny(MOE), ids(1, 9)
    model(batch, labels=batch).loss.backward()
    norms = [p for n, p in model.model.layers[0].named_parameters() if "layernorm" in n]
    assert len(norms) == 7 and all(p.grad.abs().max() > 0 for p in norms)


@torch.no_grad()
def test_the_head_uses_the_unscaled_table() -> None:
    model, prompt = tiny(DENSE, final_logit_softcapping=None), ids(1, 9)
    hidden = model.model(prompt).last_hidden_state
    close(model(prompt).logits, hidden @ model.model.embed_tokens.weight.T)


@torch.no_grad()
def test_a_ple_row_changes_only_its_token() -> None:
    model = tiny(E_SERIES)
    with_token, without = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 8, 7]])
    before = [model(x).logits for x in (with_token, without)]
    model.model.embed_tokens_per_layer.weight[6] = 0
    assert not torch.equal(model(with_token).logits, before[0])
    assert torch.equal(model(without).logits, before[1])


def test_double_wide_on_borrowing_layers() -> None:
    state = tiny(E_SERIES).state_dict()
    rows = [len(state[f"model.layers.{i}.mlp.gate_proj.weight"]) for i in range(8)]
    assert rows == [96] * 4 + [192] * 4


@torch.no_grad()
def test_the_router_reads_the_raw_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chosen = tiny(MOE), []
    router = model.model.layers[0].router
    router.register_forward_hook(lambda _m, _a, out: chosen.append(out[2].clone()))
    model(ids(1, 20))
    model.model.layers[0].pre_feedforward_layernorm_2.weight.mul_(torch.randn(64))
    model(ids(1, 20))
    assert torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_train_on_the_cpu(dtype: torch.dtype) -> None:
    model, batch = tiny(MOE).to(dtype), ids(2, 9)
    model(batch, labels=batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_loss_over_the_valid_labels() -> None:
    model, batch = tiny(MOE), ids(1, 20)
    labels = torch.full_like(batch, -100)
    labels[:, -3:] = batch[:, -3:]
    loss = model(batch, labels=labels).loss
    logits = model(batch).logits[0, -4:-1].double()
    expected = -logits.log_softmax(-1)[range(3), batch[0, -3:]].mean()
    close(loss.double(), expected, atol=1e-5, rtol=0)
    loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


@each
@torch.no_grad()
def test_logits_to_keep(options: dict) -> None:
    model, prompt = tiny(options), ids(1, 13)
    kept = model(prompt, logits_to_keep=1).logits
    assert kept.shape == (1, 1, 97)
    close(kept, model(prompt).logits[:, -1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [E_SERIES, MOE], ids=["e_series", "moe"])
@torch.no_grad()
def test_one_graph_for_all_routings(options: dict) -> None:
    torch._dynamo.reset()
    model = tiny(options)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(5):
        prompt = ids(1, 9, seed)
        found = compiled(prompt, use_cache=False).logits
        close(found, model(prompt, use_cache=False).logits, atol=1e-5, rtol=0)
    assert len(graphs) == 1


def test_width_from_the_layer_kind() -> None:
    state = tiny(DENSE).state_dict()
    rows = [len(state[f"model.layers.{i}.self_attn.q_proj.weight"]) for i in (0, 5)]
    assert rows == [64, 128]


def test_every_eos_stops() -> None:
    model, prompt = tiny(DENSE), ids(1, 9)
    free = model.generate(prompt, max_new_tokens=8, **GREEDY)[0, 9:].tolist()
    for at in (1, 4):
        eos = [96, free[at], 95]
        found = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=eos)
        assert found[0, 9:].tolist() == free[: free.index(free[at]) + 1]


@torch.no_grad()
def test_speculation_equals_plain_greedy() -> None:
    model, prompt = tiny(E_SERIES), ids(1, 9)
    plain = model.generate(prompt, max_new_tokens=40, **GREEDY)
    cache = model(prompt[:, :-1], use_cache=True).cache
    generator, tokens = torch.Generator().manual_seed(0), prompt
    while tokens.shape[1] < plain.shape[1]:
        # Half of the drafts begin well, so that both acceptance and rejection happen.
        at = tokens.shape[1]
        draft = torch.randint(3, 97, (1, 3), generator=generator)
        draft[:, : at % 3] = plain[:, at : at + at % 3][:, :3]
        given = torch.cat([tokens[:, -1:], draft], 1)
        best = model(given, cache=cache).logits.argmax(-1)
        agree = int((best[:, :-1] == draft).long().cumprod(1).sum())
        cache.trim(3 - agree)
        tokens = torch.cat([tokens, best[:, : agree + 1]], 1)
    assert torch.equal(tokens[:, : plain.shape[1]], plain)


@torch.no_grad()
def test_bidirectional_sees_the_last_token() -> None:
    prompt = ids(1, 9)
    changed = prompt.clone()
    changed[0, -1] = (changed[0, -1] - 3 + 1) % 94 + 3
    for mode, differs in (("all", True), (None, False)):
        model = tiny(DENSE, use_bidirectional_attention=mode)
        same = torch.equal(model(prompt).logits[:, 0], model(changed).logits[:, 0])
        assert same != differs


def test_sampling_row_by_row() -> None:
    model, prompt = tiny(DENSE), ids(2, 7)
    options = dict(max_new_tokens=9, do_sample=True, top_k=20, top_p=0.9, eos_token_id=[])
    batch = model.generate(prompt, seed=3, **options)
    assert torch.equal(batch, model.generate(prompt, seed=3, **options))
    assert torch.equal(batch[1:], model.generate(prompt[1:], seed=4, **options))
    assert not torch.equal(batch, model.generate(prompt, seed=9, **options))


def test_bad_input() -> None:
    model, other = tiny(DENSE), tiny(MOE)
    with torch.no_grad():
        cache = other(ids(1, 4), use_cache=True).cache
    batch = ids(1, 16)
    for call, sentence in (
        (lambda: model(torch.tensor([[5, 97]])), r"0\.\.96, got 97"),
        (lambda: model(torch.tensor([[-1, 5]])), "got -1"),
        (lambda: model(batch[:, :0]), "at least one token"),
        (lambda: model.generate(batch[:, :0]), "prompt is empty"),
        (lambda: model(batch, position_ids=torch.arange(13)[None]), "16.*13"),
        (lambda: model(batch, cache=cache), "another shape"),
        (lambda: model.generate(batch, temperature=-1.0), "temperature"),
        (lambda: model.generate(batch, top_p=1.5), "top_p"),
        (lambda: model(), "exactly one"),
        (lambda: model(batch, logits_to_keep=-1), "logits_to_keep.*-1"),
        (lambda: model.generate(batch[0]), r"\[B, S\].*\[16\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(sliding_window=(8, 8)), "pair"),
        (dict(num_attention_heads=5), "multiple"),
        (dict(layer_types=[S, F]), "one entry per layer"),
        (dict(layer_types=[S] * 5 + ["linear"]), "layer_types"),
        (dict(num_kv_shared_layers=1), "borrows"),
        (dict(num_kv_shared_layers=6), "drafter"),
        (dict(hidden_activation="silu"), "hidden_activation"),
        (dict(enable_moe_block=True), "num_experts"),
        (dict(use_bidirectional_attention="yes"), "use_bidirectional_attention"),
        (dict(rope_parameters={S: {"rope_type": "yarn"}}), "rope_type"),
        (dict(rope_parameters={S: {"rope_theta": -1.0}}), "rope_theta"),
        (dict(rope_parameters={F: {"rope_type": "proportional", "factor": 0}}), "factor"),
        (dict(num_global_key_value_heads=-1), "num_global_key_value_heads"),
        (dict(rms_norm_eps=-1.0), "rms_norm_eps"),
        (dict(num_kv_shared_layers=1.0), "num_kv_shared_layers"),
        (dict(final_logit_softcapping="30"), "final_logit_softcapping"),
        (dict(hidden_size_per_layer_input=-3), "hidden_size_per_layer_input"),
        (dict(MOE, num_experts=True), "num_experts"),
    ],
)
def test_impossible_configs(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Gemma4TextConfig(**{**DENSE, **change})


def test_odd_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="per_layer_config"):
        Gemma4TextConfig.from_dict(dict(DENSE, per_layer_config={"x": 1}))
    tiny(DENSE).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json must hold a JSON object"):
        Gemma4ForCausalLM.from_pretrained(tmp_path)
