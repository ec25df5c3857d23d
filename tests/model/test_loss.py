"""The loss: of chunks of tokens, with and without logits, under every kind of head."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.marks import emulated_backend
from support.tiny import DENSE, E_SERIES, MOE, ids, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4 import Gemma4ForCausalLM

LABELS = ids(2, 13)
LABELS[0, :5] = -100
SMALL = dict(DENSE, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])


@pytest.fixture(params=[5, 2048], ids=["chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("gemma4.loss.LOSS_TOKENS", request.param)
    return request.param


def plain_loss(model: Gemma4ForCausalLM, labels: Tensor = LABELS, items: int | None = None):
    """As transformers computes it, in fp32 of all logits that the model gives."""
    logits = model(ids(2, 13)).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    reduction = "mean" if items is None else "sum"
    loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction=reduction)
    return loss if items is None else loss / items


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm())


def assert_no_worse(
    model: Gemma4ForCausalLM, loss: Tensor, items: int | None = None, times: float = 1.05
) -> None:
    """Loss and gradients are as near to float64's as those of the plain loss."""
    exact_model = copy.deepcopy(model).double()
    exact_loss = plain_loss(exact_model, items=items)
    exact = gradients(exact_model, exact_loss)
    found = gradients(model, loss)
    plain = gradients(model, plain_loss(model, items=items))
    assert abs(loss.item() - exact_loss.item()) < 2e-2 * exact_loss.item()
    assert found.keys() == plain.keys() == exact.keys()
    for name, expected in exact.items():
        least = torch.finfo(found[name].dtype).eps / 2 * float(expected.norm())
        bound = times * error(plain[name], expected) + least
        assert error(found[name], expected) <= bound, name


@pytest.mark.parametrize("skip", [False, True], ids=["logits", "no logits"])
@pytest.mark.parametrize("items", [None, 100], ids=["mean", "items"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["eager", "emulated"])
def test_gradients(chunk: int, where: str, dtype: torch.dtype, items: int | None, skip: bool):
    if where == "emulated":
        emulated_backend()
    model = tiny(SMALL).to(dtype)
    options = dict(num_items_in_batch=items, skip_logits=skip)
    output = model(ids(2, 13), labels=LABELS, **options)
    assert ("logits" in output) != skip
    # In fp32 the order of sums decides, which is theirs to choose.
    assert_no_worse(model, output.loss, items, 1.5 if dtype == torch.float32 else 1.05)


def test_logits_are_those_without_labels(chunk: int) -> None:
    model = tiny(SMALL).bfloat16()
    output = model(ids(2, 13), labels=LABELS)
    logits = output.logits.detach().clone()
    assert torch.equal(logits, model(ids(2, 13)).logits)
    output.loss.backward()
    assert torch.equal(output.logits, logits), "the gradient was written over what is returned"
    with torch.no_grad():
        output = model(ids(2, 13), labels=LABELS)
        assert torch.equal(output.logits, model(ids(2, 13)).logits)


def test_logits_have_a_gradient_of_their_own(chunk: int) -> None:
    """Of another loss beside ours, and alone."""
    model = tiny(SMALL)
    weights = torch.randn(2, 13, 97, generator=torch.Generator().manual_seed(1))
    for share in (1.0, 0.0):
        output = model(ids(2, 13), labels=LABELS)
        other = (output.logits * weights).sum()
        found = gradients(model, share * output.loss + other if share else other)
        expected = gradients(
            model, share * plain_loss(model) + (model(ids(2, 13)).logits * weights).sum()
        )
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4, msg=name)


def test_skipping_by_attribute() -> None:
    """As trainers need it, which pass no options; without labels there are logits all the same."""
    model = tiny(SMALL)
    model.skip_logits = True
    output = model(ids(2, 13), labels=LABELS)
    assert output.logits is None and list(output) == ["loss", "cache"]
    assert model(ids(2, 13), labels=LABELS, skip_logits=False).logits is not None
    assert model(ids(2, 13)).logits is not None


class Largest(TorchDispatchMode):
    """Remembers by dtype the most rows of any tensor of so many columns; but the weight's."""

    def __init__(self, columns: int, width: int):
        super().__init__()
        self.columns, self.width, self.most = columns, width, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == self.columns:
                rows = 0 if len(x) == self.width else len(x)
                self.most[x.dtype] = max(self.most.get(x.dtype, 0), rows)
        return made


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_no_logits_of_all_tokens(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 26 tokens no more than 5 at once, or 20 where more chunks would have sums; in fp32 one."""
    monkeypatch.setattr("gemma4.loss.LOSS_TOKENS", 5)
    monkeypatch.setattr("gemma4_kernels.reference.logits.LOSS_ELEMENTS", 1)
    model = tiny(SMALL).bfloat16()
    model.lm_head.weight.requires_grad_(trained)
    with Largest(97, 64) as seen:
        model(ids(2, 13), labels=LABELS, skip_logits=True).loss.backward()
    assert seen.most == {torch.bfloat16: 20 if trained else 5, torch.float32: 1}


def hooked(model: Gemma4ForCausalLM) -> None:
    """Only its shape matters: [B, S, V], as hooks see it elsewhere."""

    def check(module: nn.Module, args: tuple, output: Tensor) -> None:
        assert output.shape == (2, 13, 97)

    model.lm_head.register_forward_hook(check)


def biased(model: Gemma4ForCausalLM) -> None:
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 97).to(model.lm_head.weight.dtype))


def frozen(model: Gemma4ForCausalLM) -> None:
    model.lm_head.weight.requires_grad_(False)


def headless(model: Gemma4ForCausalLM) -> None:
    """All but the head."""
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)


HEADS = {"hook": hooked, "bias": biased, "frozen": frozen, "head alone": headless}


@pytest.mark.parametrize("cap", [30.0, None], ids=["cap", "no cap"])
@pytest.mark.parametrize("head", HEADS)
def test_heads(chunk: int, head: str, cap: float | None) -> None:
    model = tiny(SMALL, final_logit_softcapping=cap, tie_word_embeddings=False)
    HEADS[head](model)
    assert_no_worse(model, model(ids(2, 13), labels=LABELS).loss, times=1.5)


def test_a_loss_can_be_differentiated_twice(chunk: int) -> None:
    """The graph once more, with another factor: what the forward made is still there."""
    model = tiny(SMALL)
    loss = model(ids(2, 13), labels=LABELS).loss
    weight = model.lm_head.weight
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(3 * loss, weight)
    torch.testing.assert_close(again, 3 * once)


def test_fp16_holds_the_gradients_of_many_labels() -> None:
    """1 / num_items_in_batch times a probability is below fp16's range; the loss's scale is not."""
    model = tiny(SMALL).half()
    count = 1 << 20
    loss = model(ids(2, 13), labels=LABELS, num_items_in_batch=count).loss * count
    assert_no_worse(model, loss, items=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(chunk: int, dtype: torch.dtype) -> None:
    model = tiny(SMALL)
    with torch.autocast("cpu", dtype):
        loss = model(ids(2, 13), labels=LABELS).loss
    assert loss.dtype == torch.float32
    found = gradients(model, loss)
    expected = gradients(model, plain_loss(model))
    for name, grad in expected.items():
        assert found[name].dtype == torch.float32
        assert error(found[name], grad.double()) < 0.1 * float(grad.norm()), name


def test_labels_that_are_all_ignored(chunk: int) -> None:
    model = tiny(MOE)
    loss = model(ids(2, 13), labels=torch.full_like(LABELS, -100)).loss
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in gradients(model, loss).values())


@pytest.mark.parametrize("kind", [DENSE, E_SERIES, MOE], ids=["dense", "e_series", "moe"])
def test_a_batch_of_padding(kind: dict[str, object]) -> None:
    model = tiny(kind)
    output = model(ids(2, 13), attention_mask=torch.zeros(2, 13), labels=LABELS)
    assert output.loss == 0 and output.logits.shape == (2, 13, model.config.vocab_size)
    assert all((grad == 0).all() for grad in gradients(model, output.loss).values())


def test_a_label_that_is_no_token() -> None:
    model, labels = tiny(SMALL), LABELS.clone()
    labels[1, 3] = 97
    with pytest.raises(ValueError, match=r"targets must lie in 0..96, or be -100 for none, got 97"):
        model(ids(2, 13), labels=labels)


def test_layers_share_one_gradient_of_their_inputs() -> None:
    """No layer's gate makes zeros of all layers' inputs: gradients are put together once."""
    model = tiny(E_SERIES)
    layers, width = model.config.num_hidden_layers, model.config.hidden_size_per_layer_input

    copies = ("stack", "new_zeros", "select_backward", "slice_backward")

    class Stacks(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape == (26, layers, width):
                self.made += func.overloadpacket.__name__ in copies
            return result

    loss = model(ids(2, 13), labels=LABELS).loss
    with Stacks() as seen:
        loss.backward()
    assert seen.made == 1
