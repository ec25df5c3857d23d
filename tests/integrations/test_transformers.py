"""Live comparison with transformers: weights both ways, loss, gradients, generation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma4 import Gemma4ForCausalLM

transformers = pytest.importorskip("transformers", minversion="5.24")

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["dense", "e2b_like", "e4b_like", "moe_like", "k_eq_v", "attention_bias", "untied"]


def both(name: str, attention: str = "eager") -> tuple[torch.nn.Module, torch.nn.Module]:
    theirs = transformers.Gemma4ForCausalLM.from_pretrained(
        GOLDEN / name, attn_implementation=attention
    )
    return Gemma4ForCausalLM.from_pretrained(GOLDEN / name), theirs.eval()


def some_ids(batch: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (batch, width), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_our_save_loads_there(name: str, tmp_path: Path) -> None:
    ours, _ = both(name)
    ours.save_pretrained(tmp_path, max_shard_size="40KB")
    theirs, info = transformers.Gemma4ForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    ids = some_ids(2, 9)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name: str, checkpointing: bool) -> None:
    """From ids and labels alone, in training mode."""
    ours, theirs = both(name)
    ours.train()
    if checkpointing:
        ours.gradient_checkpointing_enable()
    ids = some_ids(2, 17)
    labels = ids.clone()
    labels[0, :12] = -100
    losses = [model(input_ids=ids, labels=labels).loss for model in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    found = dict(ours.named_parameters())
    assert found.keys() == dict(theirs.named_parameters()).keys()
    for key, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        difference = (found[key].grad - parameter.grad).abs().max().item()
        # A dozen layers of fp32 sums in two orders.
        assert difference <= 5e-5 * max(scale, 1e-3), key


@pytest.mark.parametrize("silent", ["experts", "mlp"])
@torch.no_grad()
def test_each_branch_alone(silent: str) -> None:
    """The dense branch without the experts', and the other way round."""
    models, ids = both("moe_like"), some_ids(2, 11)
    whole = models[0](ids).logits
    for model in models:
        for layer in model.model.layers:
            down = getattr(layer, silent).down_proj
            getattr(down, "weight", down).zero_()  # a linear layer's, or the experts' own
    ours, theirs = (model(ids).logits for model in models)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert (ours - whole).abs().max() > 0.01


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_prompt_beyond_the_window(name: str, attention: str) -> None:
    ours, theirs = both(name, attention)
    ids = some_ids(1, 70)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["dense", "e2b_like"])
@torch.no_grad()
def test_packed_rows(name: str) -> None:
    ours, theirs = both(name)
    ids = some_ids(1, 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    expected = theirs(input_ids=ids, position_ids=positions, use_cache=False).logits
    actual = ours(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["dense", "e4b_like", "moe_like"])
def test_generation_stops_on_each_eos(name: str) -> None:
    ours, theirs = both(name)
    ids = some_ids(2, 9)
    free = ours.generate(ids, max_new_tokens=12, eos_token_id=[])
    eos = [int(free[0, 12]), int(free[1, 14])]
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours.generate(ids, **options), expected)


@torch.no_grad()
def test_embeddings_in_place_of_ids() -> None:
    ours, theirs = both("e2b_like")
    ids = some_ids(2, 11)
    per_layer = theirs.model.get_per_layer_inputs(ids)
    embeds = theirs.model.embed_tokens(ids)
    given = dict(inputs_embeds=embeds, per_layer_inputs=per_layer)
    expected = theirs(**given, use_cache=False).logits
    torch.testing.assert_close(ours(**given).logits, expected, atol=2e-5, rtol=0)
    ids_alone = ours.generate(ids, max_new_tokens=5, eos_token_id=[])
    assert torch.equal(ours.generate(**given, max_new_tokens=5, eos_token_id=[]), ids_alone[:, 11:])


@torch.no_grad()
def test_resized_tables_load_there(tmp_path: Path) -> None:
    ours, _ = both("e4b_like")
    ours.resize_token_embeddings(101)
    ours.save_pretrained(tmp_path)
    theirs = transformers.Gemma4ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.tensor([[5, 100, 7]])
    assert theirs.config.vocab_size_per_layer_input == 101
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=0)


@torch.no_grad()
def test_multimodal_layout(tmp_path: Path) -> None:
    ours, theirs = both("e4b_like")
    tensors = load_file(GOLDEN / "e4b_like" / "model.safetensors")
    names = {k: k.replace("model.", "model.language_model.", 1) for k in tensors}
    multimodal = {names[k]: v for k, v in tensors.items()}
    multimodal["model.vision_tower.patch.linear.weight"] = torch.ones(2, 2)
    save_file(multimodal, tmp_path / "model.safetensors")
    text = (GOLDEN / "e4b_like" / "config.json").read_text(encoding="utf-8")
    whole = '{"model_type": "gemma4", "text_config": ' + text + "}"
    (tmp_path / "config.json").write_text(whole, encoding="utf-8")
    loaded = Gemma4ForCausalLM.from_pretrained(tmp_path)
    assert loaded.skipped == ["model.vision_tower.patch.linear.weight"]
    ids = some_ids(1, 9)
    torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits, atol=2e-5, rtol=0)
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
