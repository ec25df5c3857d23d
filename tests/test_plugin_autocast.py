"""fp32 models under autocast: no further from fp32 than plain transformers is under autocast."""

import functools

import pytest
import torch
from plugged import plugin, small, small_models, some_ids
from plugged import way as way

IDS = some_ids(8, 40)
DTYPES = [torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def trained(model, dtype=None):
    """Logits, loss and gradients by name; fp16 with a scaler, without a dtype in fp32."""
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    optimizer = torch.optim.SGD(model.train().parameters())
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model(IDS, labels=IDS)
    scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    return out.logits, out.loss, {name: p.grad for name, p in model.named_parameters()}


def generated(model, dtype=None):
    """Greedy tokens, and their logits at each step."""
    options = dict(max_new_tokens=12, eos_token_id=None, output_logits=True)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model.generate(IDS, return_dict_in_generate=True, do_sample=False, **options)
    return out.sequences, torch.stack(out.logits, 1).float()


def errors_of_training(name, found):
    """Of the median token, of the loss, and of gradients, relative, their mean and the worst."""
    logits, loss, gradients = trained_in_fp32(name)
    error = [(g - found[2][key]).norm() / g.norm() for key, g in gradients.items()]
    error = torch.stack(error)
    median = (found[0] - logits).abs().mean(-1).median()
    return torch.stack([median, error.mean(), error.max(), (found[1] - loss).abs()]).detach()


@torch.no_grad()
def error_of_generation(name, found):
    sequences, logits = found
    exact = small(name)(sequences).logits[:, IDS.shape[1] - 1 : -1]
    return (logits - exact).abs().mean(-1).median()


@functools.cache
def trained_in_fp32(name):
    return trained(small(name))


def plain(name, attention):
    model = small(name)
    model.set_attn_implementation(attention)
    return model


@functools.cache
def errors_of_transformers(name, dtype):
    """The larger ones of its two attentions."""
    models = [plain(name, attention) for attention in ("eager", "sdpa")]
    training = [errors_of_training(name, trained(model, dtype)) for model in models]
    generation = [error_of_generation(name, generated(model, dtype)) for model in models]
    return torch.stack(training).amax(0), max(generation)


@dtypes
@small_models
def test_training(name, dtype):
    ours = errors_of_training(name, trained(plugin.enable(small(name)), dtype))
    theirs, _ = errors_of_transformers(name, dtype)
    # A loss is a mean, whose error may be 0 by luck.
    theirs[-1] = theirs[-1].clamp(min=torch.finfo(dtype).eps / 8)
    assert (ours <= 1.25 * theirs).all(), (ours, theirs)


@dtypes
@small_models
def test_generation(name, dtype):
    ours = error_of_generation(name, generated(plugin.enable(small(name)), dtype))
    _, theirs = errors_of_transformers(name, dtype)
    assert ours <= 1.25 * theirs
