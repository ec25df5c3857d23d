"""torch's own tools around the model: export, compile, functional calls."""

from pathlib import Path

import pytest
import torch
from support import tiny
from support.pairs import NAMES, close, close_gradients, gradients, left_padded, pair
from torch import Tensor, nn
from torch.func import functional_call

from gemma4.outputs import CausalLMOutput

each = pytest.mark.parametrize("name", NAMES)
IDS = tiny.ids(2, 9)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@each
def test_export(name: str, strict: bool, tmp_path: Path) -> None:
    theirs, ours = pair(name)
    with torch.no_grad():
        expected = theirs(IDS).logits
        program = torch.export.export(ours, (), dict(input_ids=IDS, use_cache=False), strict=strict)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
        other = tiny.ids(2, 9, seed=1)
        for exported in (program.module(), loaded.module()):
            output = exported(input_ids=IDS, use_cache=False)
            assert type(output) is CausalLMOutput
            close(output.logits, expected)
            close(exported(input_ids=other, use_cache=False).logits, theirs(other).logits)
    names = {n for n, _ in theirs.named_parameters()}
    assert names == {n for n in program.state_dict if n in names}


@each
@torch.no_grad()
def test_export_with_a_batch_of_any_width(name: str) -> None:
    theirs, ours = pair(name)
    program = torch.export.export(
        ours,
        (),
        dict(input_ids=IDS, use_cache=False),
        dynamic_shapes=dict(input_ids={1: torch.export.Dim.DYNAMIC}, use_cache=None),
    )
    for other in (tiny.ids(2, 5), tiny.ids(2, 21)):
        found = program.module()(input_ids=other, use_cache=False).logits
        close(found, theirs(other).logits)


@pytest.mark.slow
@each
def test_compiled_training(name: str) -> None:
    theirs, ours = pair(name)
    batch = left_padded(11, 3)
    del batch["attention_mask"], batch["position_ids"]
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    losses = []
    for called in (theirs, compiled):
        losses.append(called(**batch, use_cache=False).loss)
        losses[-1].backward()
    close(losses[1], losses[0])
    close_gradients(ours, theirs)


def other_weights(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        name: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
    }


@each
def test_functional_call(name: str) -> None:
    """With other weights; and its gradient, as a function of them."""
    theirs, ours = pair(name)
    weights = other_weights(theirs)

    def loss(model: nn.Module, weights: dict[str, Tensor]) -> Tensor:
        options = dict(input_ids=IDS, labels=IDS, use_cache=False)
        return functional_call(model, weights, kwargs=options).loss

    for inference in (False, True):
        with torch.inference_mode(inference):
            expected = functional_call(theirs, weights, (IDS,)).logits
            close(functional_call(ours, weights, (IDS,)).logits, expected)
            close(ours(IDS).logits, theirs(IDS).logits)  # and are its own again
    weights = {n: w.requires_grad_() for n, w in weights.items()}
    found, expected = (
        torch.autograd.grad(loss(model, weights), weights.values()) for model in (ours, theirs)
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-4)
    assert not gradients(ours)
