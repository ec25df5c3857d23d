"""What hangs on a module acts as it does in transformers: hooks of every kind, and wrappers.

Each test goes over every submodule, changes it in both models alike, and compares what comes out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import tiny
from support.pairs import NAMES, close, close_gradients, left_padded, pair
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from gemma4.modules import RMSNorm

each = pytest.mark.parametrize("name", NAMES)
WIDTH, PADDING = 11, 3


def changed(x: Tensor) -> Tensor:
    if x.is_floating_point():
        return x + 0.5 * torch.arange(x.shape[-1], dtype=x.dtype).cos()
    return (x + 1) % 97


def changed_output(output: Any) -> Any:
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = changed(output.last_hidden_state)
        return output
    if isinstance(output, tuple):
        return tuple(
            changed(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in output
        )
    return changed(output)


def changed_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The first floating-point tensor; ids where there is none, positions for rotary tables."""
    args, rotary = list(args), type(module).__name__.endswith(("RotaryEmbedding", "Frequencies"))
    for wanted in [False] if rotary else [True, False]:
        for values in (args, kwargs):
            for key, x in enumerate(values) if values is args else list(values.items()):
                if isinstance(x, Tensor) and x.is_floating_point() == wanted:
                    values[key] = 2 * x if rotary else changed(x)
                    return tuple(args), kwargs
    raise AssertionError("called without a tensor")


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return changed_output(self.inner(*args, **kwargs))


@contextmanager
def replaced(model: nn.Module, name: str, new: nn.Module) -> Iterator[None]:
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    setattr(model.get_submodule(parent), child, new)
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), child, old)


@contextmanager
def under(change: str, model: nn.Module, name: str) -> Iterator[None]:
    module = model.get_submodule(name)
    if change == "wrapper":
        active = replaced(model, name, Wrapper(module))
    elif change == "hook":
        active = module.register_forward_hook(lambda _, args, output: changed_output(output))
    elif change == "pre-hook":
        active = module.register_forward_pre_hook(changed_input, with_kwargs=True)
    else:
        active = module.register_full_backward_pre_hook(
            lambda _, grads: tuple(None if g is None else 3 * g for g in grads)
        )
    with active:
        yield


def prefill(model: nn.Module) -> Tensor:
    """Logits of the real tokens of a padded batch."""
    batch = left_padded(WIDTH, PADDING)
    del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def decode(model: nn.Module) -> Tensor:
    """Logits of a prompt and of two steps over its cache."""
    ids, positions = tiny.ids(2, WIDTH), torch.arange(WIDTH).repeat(2, 1)
    cache, logits = None, []
    with torch.no_grad():
        for begin, end in ((0, WIDTH - 2), (WIDTH - 2, WIDTH - 1), (WIDTH - 1, WIDTH)):
            place = positions[:, begin:end]
            output = model(ids[:, begin:end], position_ids=place, cache=cache, use_cache=True)
            cache = output.cache
            logits.append(output.logits)
    return torch.cat(logits, 1)


def train(model: nn.Module) -> Tensor:
    """The loss; gradients are left in the model."""
    model.zero_grad()
    loss = model(**left_padded(WIDTH, PADDING), use_cache=False).loss
    loss.backward()
    return loss.detach()


RUNS = {"prefill": prefill, "decode": decode, "train": train}


def submodules(theirs: nn.Module, ours: nn.Module) -> list[str]:
    names = [n for n, m in theirs.named_modules() if n and not isinstance(m, nn.ModuleList)]
    missing = set(names) - {n for n, _ in ours.named_modules()}
    assert not missing, f"modules of transformers that are not here: {sorted(missing)}"
    return names


def over_all_modules(names: list[str], check: Callable[[str], None]) -> None:
    """Every module is tried before the test fails, so that it names all that are wrong."""
    wrong = {}
    for name in names:
        try:
            check(name)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    assert not wrong, "\n".join(
        [f"{len(wrong)} of {len(names)} modules:", *map(str, wrong.items())]
    )


@each
def test_module_tree(name: str) -> None:
    theirs, ours = pair(name)
    submodules(theirs, ours)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("change", ["hook", "pre-hook", "wrapper"])
@each
def test_a_change_of_any_module(name: str, change: str, run: str) -> None:
    theirs, ours = pair(name)
    plain, before = RUNS[run](theirs), RUNS[run](ours)

    def check(module: str) -> None:
        with under(change, theirs, module), under(change, ours, module):
            expected = RUNS[run](theirs)
            close(RUNS[run](ours), expected)
            if run == "train":
                close_gradients(ours, theirs)
        if run == "prefill":
            assert (expected - plain).abs().max() > 1e-4, "this change tests nothing"

    over_all_modules(submodules(theirs, ours), check)
    assert torch.equal(RUNS[run](ours), before), "a change outlives its end"


@each
def test_backward_hooks_of_any_module(name: str) -> None:
    theirs, ours = pair(name)

    def check(module: str) -> None:
        for model in (theirs, ours):
            with under("backward hook", model, module):
                train(model)
        close_gradients(ours, theirs)

    over_all_modules(submodules(theirs, ours), check)


def tensors(module: nn.Module, output: Any) -> list[Tensor]:
    """What both models give; eager attention alone also has a matrix of weights."""
    if hasattr(output, "last_hidden_state"):
        return [output.last_hidden_state]
    if type(module).__name__.endswith("Attention"):
        return [output[0]]
    return list(output) if isinstance(output, tuple) else [output]


@pytest.mark.parametrize("run", ["prefill", "decode"])
@each
def test_hooks_see_what_they_see_there(name: str, run: str) -> None:
    """The same shapes, [B, S, ...], and where there are tokens the same values."""
    seen: list[list[Tensor]] = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        seen[-1] += [x.clone() for x in tensors(module, output)]

    theirs, ours = pair(name)
    real = left_padded(WIDTH, PADDING)["attention_mask"].bool()

    def check(module: str) -> None:
        seen.clear()
        for model in (theirs, ours):
            seen.append([])
            with model.get_submodule(module).register_forward_hook(record):
                RUNS[run](model)
        if module == "model.rotary_emb":  # called for one kind of layer and the other, in any order
            seen[:] = [sorted(found, key=lambda x: (x.shape, x.sum())) for found in seen]
        expected, actual = seen
        assert [x.shape for x in actual] == [x.shape for x in expected]
        for a, b in zip(actual, expected, strict=True):
            if run == "prefill" and a.shape[:2] == real.shape:
                a, b = a[real], b[real]
            elif run == "prefill" and a.shape[0] == real.numel():
                a, b = a[real.flatten()], b[real.flatten()]
            close(a, b)

    # An expert's activation sees the tokens that came to it, in any order, and padding with them.
    over_all_modules([n for n in submodules(theirs, ours) if "experts.act" not in n], check)


@pytest.mark.parametrize("run", ["prefill", "decode"])
@each
def test_hooks_that_choose_a_column(name: str, run: str) -> None:
    """In place, as activation patching does it: the last column of a left-padded batch."""

    def patch(module: nn.Module, args: tuple, output: Any) -> None:
        x = tensors(module, output)[0]
        if x.ndim > 2:  # the router and the experts see tokens [B S, D]
            x[:, -1] += torch.arange(x.shape[-1], dtype=x.dtype).cos()

    theirs, ours = pair(name)

    def check(module: str) -> None:
        results = []
        for model in (theirs, ours):
            with model.get_submodule(module).register_forward_hook(patch):
                results.append(RUNS[run](model))
        close(results[1], results[0])

    floating = [n for n in submodules(theirs, ours) if "rotary" not in n]
    over_all_modules(floating, check)


@each
def test_steering_a_layer(name: str) -> None:
    """A vector added to what a layer gives: through the prompt, its cache and every new token."""
    theirs, ours = pair(name)
    batch = left_padded(WIDTH, PADDING)
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    plain = theirs.generate(**batch, max_new_tokens=12, do_sample=False)
    vector = 4 * torch.randn(theirs.config.hidden_size)
    results = []
    for model in (theirs, ours):
        with model.model.layers[1].register_forward_hook(lambda _, args, x: x + vector):
            results.append(model.generate(**batch, max_new_tokens=12, do_sample=False))
    assert not torch.equal(plain, results[0]), "the vector changes nothing"
    assert torch.equal(*results)
    assert torch.equal(ours.generate(**batch, max_new_tokens=12, do_sample=False), plain)


@each
def test_hooks_of_all_modules(name: str) -> None:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        return changed_output(output) if type(module) is nn.Linear else None

    theirs, ours = pair(name)
    for run in RUNS.values():
        plain = run(ours)
        with register_module_forward_hook(hook):
            expected, actual = run(theirs), run(ours)
        close(actual, expected)
        assert (actual - plain).abs().max() > 1e-2


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@each
def test_parametrized_weights(name: str) -> None:
    theirs, ours = pair(name)
    weights = [
        n.removesuffix(".weight")
        for n, _ in theirs.model.layers.named_parameters()
        if n.endswith(".weight")
    ]

    def check(module: str) -> None:
        results = []
        for model in (theirs, ours):
            module_ = model.model.layers.get_submodule(module)
            parametrize.register_parametrization(module_, "weight", Doubled())
            results.append([RUNS[run](model) for run in ("prefill", "train")])
        for actual, expected in zip(*results[::-1], strict=True):
            close(actual, expected)
        close_gradients(ours, theirs)
        for model in (theirs, ours):
            module_ = model.model.layers.get_submodule(module)
            parametrize.remove_parametrizations(module_, "weight", leave_parametrized=False)

    over_all_modules(weights, check)


@each
def test_modules_of_another_class(name: str) -> None:
    """Another activation, no norm, a projection with a bias."""
    theirs, ours = pair(name)
    bias = torch.randn(theirs.config.intermediate_size)
    for model in (theirs, ours):
        first, last = model.model.layers[0], model.model.layers[-1]
        first.mlp.act_fn = nn.SiLU()
        first.post_attention_layernorm = nn.Identity()
        last.self_attn.q_norm = nn.Identity()
        last.input_layernorm = nn.Identity()
        first.mlp.up_proj.bias = nn.Parameter(bias.clone())
        if name == "moe":
            first.experts.act_fn = nn.ReLU()
        if name == "e_series":
            last.act_fn = nn.SiLU()
    for run in RUNS.values():
        close(run(ours), run(theirs))
    close_gradients(ours, theirs)


def scaled(cls: type[nn.Module], width: int) -> nn.Module:
    norm = cls(width, eps=1e-6)
    nn.init.uniform_(norm.weight, 0.5, 2.0, torch.Generator().manual_seed(3))
    return norm


@each
def test_norms_with_a_scale_where_there_was_none(name: str) -> None:
    """No fused op reads a weight there, so the norm has to be called."""
    theirs, ours = pair(name)
    for model, cls in ((theirs, Gemma4RMSNorm), (ours, RMSNorm)):
        layer = model.model.layers[0]
        layer.self_attn.v_norm = scaled(cls, layer.self_attn.head_dim)
        if name == "moe":
            layer.router.norm = scaled(cls, model.config.hidden_size)
    for run in RUNS.values():
        close(run(ours), run(theirs))
    close_gradients(ours, theirs)
