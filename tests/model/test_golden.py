"""The model against what transformers recorded (tests/support/make_golden.py made the data)."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = sorted(folder.name for folder in GOLDEN.iterdir())
BF16 = [name for name in VARIANTS if name.endswith("_bf16")]
FP32 = [name for name in VARIANTS if name not in BF16]
CAUSAL = [name for name in FP32 if name != "bidirectional_all"]


def load(name: str) -> tuple[Gemma4ForCausalLM, dict[str, Tensor]]:
    return (
        Gemma4ForCausalLM.from_pretrained(GOLDEN / name),
        load_file(GOLDEN / name / "golden.safetensors"),
    )


def close(name: str, actual: Tensor, expected: Tensor) -> None:
    tolerance = 5e-5 if name == "moe_like" else 2e-5
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_every_variant_is_here() -> None:
    assert len(VARIANTS) == 12 and len(BF16) == 2


@pytest.mark.parametrize("name", FP32)
@torch.no_grad()
def test_states_and_logits(name: str) -> None:
    model, golden = load(name)
    output = model(golden["ids"], use_cache=False, output_hidden_states=True)
    close(name, output.logits, golden["logits"])
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    for i, state in enumerate(output.hidden_states):
        close(name, state, golden[f"state.{i}"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FP32)
@torch.no_grad()
def test_padding(name: str, side: str) -> None:
    model, golden = load(name)
    mask = golden[f"{side}.mask"]
    logits = model(golden[f"{side}.ids"], attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    close(name, logits[real], golden[f"{side}.logits"][real])
    assert not logits[~real].any()


@pytest.mark.parametrize("chunks", [[22], [10, 9, 1, 1, 1], [1] * 22, [5] * 4 + [2], [17, 5]])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_cached_chunks(name: str, chunks: list[int]) -> None:
    model, golden = load(name)
    cache, parts = None, []
    for ids in golden["ids"].split(chunks, 1):
        output = model(ids, cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    close(name, torch.cat(parts, 1), golden["logits"])


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_logits_to_keep(name: str) -> None:
    model, golden = load(name)
    for use_cache in (False, True):
        for keep in (1, 3):
            output = model(golden["ids"], logits_to_keep=keep, use_cache=use_cache)
            close(name, output.logits, golden["logits"][:, -keep:])
    indices = torch.tensor([4, 0, 21])
    kept = model(golden["ids"], logits_to_keep=indices, use_cache=False).logits
    close(name, kept, golden["logits"][:, indices])


@pytest.mark.parametrize("chunk", [2048, 7])
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy(name: str, chunk: int) -> None:
    model, golden = load(name)
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=[], prefill_chunk_size=chunk)
    assert torch.equal(model.generate(golden["ids"], **options), golden["greedy"])
    batch = model.generate(golden["left.ids"], golden["left.mask"], **options)
    assert torch.equal(batch, golden["left.greedy"])


@pytest.mark.parametrize("name", BF16)
@torch.no_grad()
def test_bf16_is_as_exact_as_the_recorded_run(name: str) -> None:
    model, golden = load(name)
    assert model.dtype == torch.bfloat16
    exact = golden["logits_fp32"]
    ours = (model(golden["ids"], use_cache=False).logits.float() - exact).abs()
    theirs = (golden["logits"].float() - exact).abs()
    assert ours.mean() <= 1.5 * theirs.mean() and ours.max() <= 1.5 * theirs.max()


@pytest.mark.parametrize("name", VARIANTS)
def test_both_config_spellings(name: str, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / name / "config_flat.json", tmp_path / "config.json")
    written = Gemma4TextConfig.from_pretrained(GOLDEN / name)
    flat = Gemma4TextConfig.from_pretrained(tmp_path)
    assert written == flat
    flat.save_pretrained(tmp_path)
    assert Gemma4TextConfig.from_pretrained(tmp_path) == flat
