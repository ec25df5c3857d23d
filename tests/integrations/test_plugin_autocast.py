"""fp32 models under autocast: no further from fp32 than plain transformers is under autocast."""

import functools

import pytest
import torch
from support.plugged import plugin, small, small_models, some_ids
from support.plugged import way as way

# Several, for one expert that changes by a rounding moves all of a batch.
BATCHES = [some_ids(4, 40, seed) for seed in range(4)]
DTYPES = [torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def trained(model, ids, dtype=None):
    """Logits, loss and gradients by name; fp16 with a scaler, without a dtype in fp32."""
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    optimizer = torch.optim.SGD(model.train().parameters())
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model(ids, labels=ids)
    scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    return out.logits, out.loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def generated(model, ids, dtype=None):
    """Greedy tokens, and their logits at each step."""
    options = dict(max_new_tokens=12, eos_token_id=None, output_logits=True)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model.generate(ids, return_dict_in_generate=True, do_sample=False, **options)
    return out.sequences, torch.stack(out.logits, 1).float()


def errors_of_training(name, model, dtype):
    """Means over the batches: of the median token's logits, of the loss, and of gradients,
    relative, of the mean and the worst parameter."""
    errors = []
    for ids, (logits, loss, gradients) in zip(BATCHES, trained_in_fp32(name), strict=True):
        found = trained(model, ids, dtype)
        error = [(found[2][key] - g).norm() / g.norm() for key, g in gradients.items()]
        error = torch.stack(error)
        median = (found[0] - logits).abs().mean(-1).median()
        errors.append([median, (found[1] - loss).abs(), error.mean(), error.max()])
    return torch.tensor(errors).mean(0)


@torch.no_grad()
def error_of_generation(name, model, dtype):
    errors = []
    for ids in BATCHES:
        sequences, logits = generated(model, ids, dtype)
        exact = small(name)(sequences).logits[:, ids.shape[1] - 1 : -1]
        errors.append((logits - exact).abs().mean(-1).median())
    return torch.stack(errors).mean()


@functools.cache
def trained_in_fp32(name):
    model = small(name)
    return [trained(model, ids) for ids in BATCHES]


def plain(name, attention):
    model = small(name)
    model.set_attn_implementation(attention)
    return model


@functools.cache
def errors_of_transformers(name, dtype):
    """The larger ones of its two attentions."""
    models = [plain(name, attention) for attention in ("eager", "sdpa")]
    training = [errors_of_training(name, model, dtype) for model in models]
    generation = [error_of_generation(name, model, dtype) for model in models]
    return torch.stack(training).amax(0), max(generation)


@dtypes
@small_models
def test_training(name, dtype):
    ours = errors_of_training(name, plugin.enable(small(name)), dtype)
    theirs, _ = errors_of_transformers(name, dtype)
    theirs[1] = theirs[1].clamp(min=torch.finfo(dtype).eps / 8)  # a mean, which may be 0 by luck
    assert (ours <= 1.25 * theirs).all(), (ours, theirs)


@dtypes
@small_models
def test_generation(name, dtype):
    ours = error_of_generation(name, plugin.enable(small(name)), dtype)
    _, theirs = errors_of_transformers(name, dtype)
    assert ours <= 1.25 * theirs
