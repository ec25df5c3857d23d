"""fp32 weights under autocast: as close to fp32 as transformers is there."""

from collections.abc import Callable

import pytest
import torch
from support import tiny
from support.pairs import NAMES, close, gradients, pair
from torch import Tensor, nn

each = pytest.mark.parametrize("name", NAMES)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Ours may be off by as much as transformers is, and a quarter more.
SLACK = 1.25


def batch(rows: int = 8, width: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Enough tokens that the mean error says something."""
    mask = torch.ones(rows, width, dtype=torch.long)
    mask[rows // 2 :, :7] = 0
    ids = tiny.ids(rows, width, seed)
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def no_further(run: Callable[[nn.Module], Tensor], name: str, dtype: torch.dtype) -> None:
    """The median error of `run` under autocast, against that of transformers."""
    theirs, ours = pair(name)
    exact = run(theirs)
    with torch.autocast("cpu", dtype=dtype):
        results = [run(ours), run(theirs)]
    # The median: a token whose expert changes by a last bit says nothing.
    found, bound = ((x.double() - exact).abs().flatten(0, -2).mean(-1).median() for x in results)
    assert 0 < bound < 0.1 * exact.abs().mean(), "this bound says nothing"
    assert found <= SLACK * bound


@dtypes
@each
@torch.no_grad()
def test_logits(name: str, dtype: torch.dtype) -> None:
    inputs = batch()
    real = inputs["attention_mask"].bool()
    no_further(lambda model: model(**inputs).logits[real], name, dtype)


@dtypes
@each
@torch.no_grad()
def test_decoding_over_a_cache(name: str, dtype: torch.dtype) -> None:
    ids = tiny.ids(6, 24)

    def run(model: nn.Module) -> Tensor:
        cache, logits = None, []
        for part in ids.split((18, 1, 1, 1, 1, 2), dim=1):
            output = model(part, cache=cache, use_cache=True)
            cache = output.cache
            logits.append(output.logits)
        return torch.cat(logits, 1)

    no_further(run, name, dtype)


def train(
    model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, under autocast if a dtype is given."""
    model.train().zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(**inputs, use_cache=False).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(g.dtype == torch.float32 for g in gradients(model).values())
    return loss.detach(), gradients(model)


@dtypes
@each
def test_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    """Means over several batches: a token whose expert changes moves all gradients of one."""
    theirs, ours = pair(name)
    errors: dict[str, list[float]] = {"loss": [], "their loss": [], "grads": [], "their grads": []}
    for seed in range(6):
        inputs = batch(seed=seed)
        exact_loss, exact = train(theirs, inputs, None)
        for whose, model in (("their ", theirs), ("", ours)):
            loss, grads = train(model, inputs, dtype)
            assert grads.keys() == exact.keys()
            errors[f"{whose}loss"].append((loss - exact_loss).abs().item())
            errors[f"{whose}grads"].append(error(grads, exact))
    mean = {what: sum(found) / len(found) for what, found in errors.items()}
    assert 0 < mean["grads"] <= SLACK * mean["their grads"], mean
    # A loss is one number, whose rounding errors may cancel in either model.
    assert 0 < mean["loss"] <= SLACK * mean["their loss"] + 1e-3 * exact_loss, mean


@each
def test_checkpointing_computes_the_same_again(name: str) -> None:
    _, ours = pair(name)
    loss, grads = train(ours, batch(), torch.bfloat16)
    ours.gradient_checkpointing_enable()
    again, recomputed = train(ours, batch(), torch.bfloat16)
    close(again, loss)
    for key, gradient in grads.items():
        close(recomputed[key], gradient, 1e-3)


def error(grads: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The median over parameters of |error| / |gradient|."""
    each = [(grads[n] - g).norm() / g.norm().clamp(min=1e-12) for n, g in exact.items()]
    return torch.stack(each).median().item()


@each
def test_gradient_scaler(name: str) -> None:
    """fp16 with a scaler takes the steps that fp32 takes, and skips the one that overflows."""
    inputs, results = batch(), []
    for enabled in (False, True):
        _, ours = pair(name)
        optimizer = torch.optim.SGD(ours.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
                loss = ours(**inputs, use_cache=False).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        results.append(torch.stack(losses))
    assert results[0].diff().abs().max() > 1e-3
    close(results[1], results[0], 1e-2)  # in MoE models some tokens go to other experts
    before = [p.detach().clone() for p in ours.parameters()]
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = ours(**inputs, use_cache=False).loss
    scaler.scale(loss * float("inf")).backward()
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


@each
def test_generate(name: str) -> None:
    """Each token is a best one, up to what 16 bits blur, by fp32's logits of the same text."""
    theirs, ours = pair(name)
    ids = tiny.ids(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = ours.generate(ids, max_new_tokens=10, do_sample=False)
        with torch.no_grad():
            blurred = theirs(made).logits.float()
    with torch.no_grad():
        exact = theirs(made).logits
    logits = exact[:, 8:-1]
    chosen = logits.gather(-1, made[:, 9:, None]).squeeze(-1)
    assert made.shape == (2, 19)
    assert (logits.amax(-1) - chosen).max() <= 2 * (blurred - exact).abs().max()


@each
@torch.no_grad()
def test_weights_are_not_cast_anew(name: str) -> None:
    """16-bit weights under autocast of their dtype: the numbers without it, at no more casts."""
    _, ours = pair(name)
    ours = ours.bfloat16()
    ids = tiny.ids(2, 9)
    plain = ours(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(ids).logits
    assert found.dtype == plain.dtype
    close(found.float(), plain.float(), 0.05)
