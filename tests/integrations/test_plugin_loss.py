"""The loss of an enabled model of transformers, and the gradient of its per-layer inputs."""

import copy
import pickle

import pytest
import torch
from support.plugged import close, plugin, small, small_models, some_ids
from support.plugged import way as way
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from gemma4_kernels.integrations.transformers.loss import causal_lm_loss

IDS = some_ids(2, 9)
LABELS = IDS.masked_fill(torch.arange(9) < 3, -100)


def gradients(model: torch.nn.Module, **options) -> tuple[Tensor, dict[str, Tensor]]:
    model.train().zero_grad()
    loss = model(IDS, labels=LABELS, use_cache=False, **options).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}], ids=["mean", "items"])
@small_models
def test_loss_and_gradients(name, options, way):
    theirs, ours = small(name), plugin.enable(small(name))
    (loss, grads), (expected_loss, expected) = (gradients(m, **options) for m in (ours, theirs))
    close(loss, expected_loss)
    assert grads.keys() == expected.keys()
    for n, grad in expected.items():
        torch.testing.assert_close(grads[n], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    """Which run a layer twice; a reentrant one gives it inputs of another graph."""
    options = {"use_reentrant": reentrant}
    models = small("ple"), plugin.enable(small("ple"))
    for model in models:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    (expected_loss, expected), (loss, found) = map(gradients, models)
    close(loss, expected_loss)
    for n, grad in expected.items():
        torch.testing.assert_close(found[n], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


def test_shifted_labels_and_another_sentinel():
    logits = torch.randn(2, 9, 50, dtype=torch.bfloat16)
    labels = torch.randint(50, (2, 9))
    shifted = labels.roll(1, 1)
    for options in (
        dict(labels=labels),
        dict(labels=None, shift_labels=shifted),
        dict(labels=labels.masked_fill(labels < 20, -1), ignore_index=-1),
        dict(labels=labels, num_items_in_batch=torch.tensor(5)),
    ):
        found = causal_lm_loss(logits, vocab_size=50, **options)
        close(found, ForCausalLMLoss(logits, vocab_size=50, **options))
        assert found.dtype == torch.float32


def own_loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: object) -> Tensor:
    return logits.sum()


def test_disable_takes_it_back_and_a_loss_of_somebody_stays():
    ours = plugin.enable(small("ple"))
    assert ours.loss_function is causal_lm_loss
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.loss_function is causal_lm_loss
    plugin.disable(ours)
    assert ours.loss_function is ForCausalLMLoss and "_loss_function" not in vars(ours)
    ours.loss_function = own_loss
    plugin.enable(ours)
    assert ours.loss_function is own_loss
    plugin.disable(ours)
    assert ours.loss_function is own_loss


class Copies(TorchDispatchMode):
    """Counts what is made as large as all layers' per-layer inputs, but by arithmetic."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.made = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copies = ("stack", "new_zeros", "zeros", "select_backward", "slice_backward")
        if isinstance(result, Tensor) and result.shape == self.shape:
            self.made += [func.overloadpacket.__name__] * (func.overloadpacket.__name__ in copies)
        return result


def test_layers_share_one_gradient_of_their_inputs(way):
    ours = plugin.enable(small("ple"))
    config = ours.config
    shape = (2, 9, config.num_hidden_layers, config.hidden_size_per_layer_input)
    loss = ours.train()(IDS, labels=LABELS, use_cache=False).loss
    with Copies(shape) as seen:
        loss.backward()
    if way == "as on a GPU":
        assert seen.made == ["stack"]
    else:
        assert seen.made.count("select_backward") == config.num_hidden_layers
