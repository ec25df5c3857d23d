"""Gradients in 16 bits, on the eager twins and on the emulated kernels as a GPU would run them: no
further from the fp32 model's than those of plain transformers in the same 16 bits."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from support import emulated, tiny
from support.marks import needs_compiler
from support.pairs import gradients, left_padded, pair
from torch import Tensor, nn

from gemma4_kernels import opset
from gemma4_kernels.integrations import transformers as plugin
from gemma4_kernels.integrations.transformers import base

pytestmark = needs_compiler
# Head sizes that have kernels; all experts chosen, for another expert is another model.
OPTIONS: dict[str, dict[str, Any]] = {
    "e_series": {},
    "k_eq_v": {},
    "moe": dict(num_experts=4, top_k_experts=4),
}
HEADS = dict(head_dim=64, global_head_dim=128)
each = pytest.mark.parametrize("name", OPTIONS)
LORA = peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=3,
    lora_alpha=6,
    target_modules=["q_proj", "v_proj", "o_proj", "up_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)
ROUNDED = torch.bfloat16


@contextlib.contextmanager
def on_kernels() -> Iterator[set[str]]:
    """Gives the names of the ops that ran in them."""
    kernels, names = emulated.kernels(), set[str]()
    call = kernels.call

    def counted(op: Any, args: Any) -> Any:
        names.add(op.name)
        return call(op, args)

    with pytest.MonkeyPatch.context() as patch, emulated.one_schedule(), opset.using(kernels):
        patch.setattr(kernels, "call", counted)
        yield names


def models(name: str) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours, in fp32, of weights that 16 bits hold."""
    theirs, ours = pair(name, **OPTIONS[name], **HEADS)
    return theirs.to(ROUNDED).float(), ours.to(ROUNDED).float()


def padded() -> dict[str, Tensor]:
    return left_padded(13, 4)


def packed() -> dict[str, Tensor]:
    """Three sequences in a row; the first token of each is predicted by none of its own."""
    lengths, ids = (5, 10, 2), tiny.ids(1, 17)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return dict(input_ids=ids, position_ids=positions, labels=labels)


def trained(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(**batch, use_cache=False).loss.backward()
    return gradients(model)


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Over all parameters, the root of the mean square of each gradient's relative error."""
    assert found.keys() == exact.keys()
    each = [(found[n].double() - g).norm() / g.double().norm() for n, g in exact.items()]
    return float(torch.stack(each).square().mean().sqrt())


def is_as_close_as_plain(
    name: str, ours: nn.Module, theirs: nn.Module, batch: dict[str, Tensor], *, kernels: bool
) -> set[str]:
    """Returns the names of the ops that ran in kernels."""
    exact = {n: g.clone() for n, g in trained(theirs, batch).items()}
    plain = error(trained(theirs.to(ROUNDED), batch), exact)
    with on_kernels() if kernels else contextlib.nullcontext(set()) as names:
        found = error(trained(ours.to(ROUNDED), batch), exact)
    print(f"{name}: {found / plain:.3f}")
    assert found <= 1.05 * plain
    return names


@pytest.mark.parametrize("kernels", [False, True], ids=["eager", "emulated"])
@each
def test_packed_rows(name: str, kernels: bool) -> None:
    theirs, ours = models(name)
    names = is_as_close_as_plain(name, ours, theirs, packed(), kernels=kernels)
    if kernels:
        assert {"attention_prefill_backward", "add_rms_norm_backward"} <= names


@each
def test_an_enabled_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On kernels, its rows padded."""
    theirs, _ = models(name)
    enabled, _ = models(name)
    plugin.enable(enabled)
    monkeypatch.setattr(base, "takes_ops", lambda x: True)
    names = is_as_close_as_plain(name, enabled, theirs, padded(), kernels=True)
    assert {"attention_prefill_backward", "add_rms_norm_backward"} <= names


def test_lora_on_experts() -> None:
    theirs, ours = (peft.get_peft_model(model, LORA) for model in models("moe"))
    generator = torch.Generator().manual_seed(5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if mine.requires_grad:
            drawn = 0.1 * torch.randn(mine.shape, generator=generator)
            mine.data, other.data = drawn.to(ROUNDED).float(), drawn.to(ROUNDED).float()
    names = is_as_close_as_plain("LoRA on experts", ours, theirs, padded(), kernels=True)
    assert {"moe_experts", "attention_prefill_backward"} <= names


def same_bits(name: str, *changes: Callable[[nn.Module], object]) -> None:
    """After each change of the model the gradients that are left have the same bits, on kernels."""
    _, ours = models(name)
    with on_kernels():
        before = {n: g.clone() for n, g in trained(ours.to(ROUNDED), packed()).items()}
        for change in changes:
            change(ours)
            after = trained(ours, packed())
            assert list(after) == [n for n, p in ours.named_parameters() if p.requires_grad]
            for n, gradient in after.items():
                assert torch.equal(gradient, before[n]), n


def freeze(model: nn.Module) -> None:
    """All but the queries' projections and norms: every op is asked for a part alone."""
    for n, parameter in model.named_parameters():
        parameter.requires_grad_("q_" in n or "layernorm" in n)


@pytest.mark.parametrize("name", ["e_series", pytest.param("moe", marks=pytest.mark.slow)])
def test_checkpoints_and_frozen_weights(name: str) -> None:
    def checkpointing(reentrant: bool) -> Callable[[nn.Module], object]:
        options = {"use_reentrant": reentrant}
        return lambda model: model.gradient_checkpointing_enable(options)

    same_bits(name, checkpointing(False), checkpointing(True), freeze)
