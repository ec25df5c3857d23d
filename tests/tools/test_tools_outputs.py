"""The models' outputs are used as transformers' outputs are: by place, by name, as a tree."""

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from gemma4.outputs import CausalLMOutput, ModelOutput

transformers = pytest.importorskip("transformers", minversion="5.24")
from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: E402

LOSS, LOGITS, STATES = torch.tensor(0.5), torch.ones(1, 2), (torch.ones(1), torch.zeros(1))
CACHE = ["a cache"]
GIVEN = [
    dict(logits=LOGITS),
    dict(loss=LOSS, logits=LOGITS, hidden_states=STATES),
    dict(hidden_states=STATES, cache=CACHE, logits=LOGITS, loss=None),
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(given))
def test_reads_as_transformers_output(given: dict) -> None:
    ours, theirs = CausalLMOutput(**given), CausalLMOutputWithPast(**given)
    assert list(ours) == list(theirs) and ours.keys() == theirs.keys()
    assert isinstance(ours, dict) and {**ours}.keys() == {**theirs}.keys()
    assert len(ours.to_tuple()) == len(theirs.to_tuple())
    for place, value in enumerate(theirs.to_tuple()):
        assert ours[place] is value and ours.to_tuple()[place] is value
    for name, value in theirs.items():
        assert ours[name] is value and getattr(ours, name) is value
    for name in ("loss", "logits", "cache", "past_key_values", "hidden_states"):
        assert getattr(ours, name) is getattr(theirs, name)
        assert ours.get(name) is theirs.get(name) and (name in ours) == (name in theirs)
    assert len(ours[:2]) == len(theirs[:2]) and ours[-1] is theirs[-1]


def test_what_is_absent_is_said() -> None:
    ours = CausalLMOutput(logits=LOGITS)
    with pytest.raises(KeyError):
        ours["loss"]
    with pytest.raises(IndexError):
        ours[1]
    with pytest.raises(AttributeError):
        ours.attentions  # noqa: B018
    with pytest.raises(TypeError, match=r"ModelOutput holds last_hidden_state, .*, got logits"):
        ModelOutput(logits=LOGITS)


def test_entries_can_be_set() -> None:
    ours = CausalLMOutput(logits=LOGITS, cache=CACHE)
    ours.loss = LOSS
    ours["logits"] = 2 * LOGITS
    assert ours["loss"] is LOSS and torch.equal(ours.logits, 2 * LOGITS)
    ours.past_key_values = None
    assert ours.cache is None and ours.keys() == {"loss", "logits"}


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies(copied) -> None:
    ours = copied(CausalLMOutput(loss=LOSS, logits=LOGITS, hidden_states=STATES))
    assert type(ours) is CausalLMOutput and list(ours) == ["loss", "logits", "hidden_states"]
    assert torch.equal(ours.logits, LOGITS) and ours[2][0].item() == 1


def test_is_a_tree() -> None:
    ours = CausalLMOutput(loss=LOSS, logits=LOGITS, hidden_states=STATES)
    leaves, spec = pytree.tree_flatten(ours)
    expected = pytree.tree_leaves(CausalLMOutputWithPast(**ours))
    assert all(a is b for a, b in zip(leaves, expected, strict=True))
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    doubled = pytree.tree_map(lambda x: 2 * x, ours)
    assert type(doubled) is CausalLMOutput and doubled.hidden_states[0].item() == 2
    # The way of accelerate and DataParallel, which make a new one out of names and values.
    again = type(ours)(dict(ours.items()))
    assert again.keys() == ours.keys() and again.logits is LOGITS


class Halves(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> CausalLMOutput:
        inner = ModelOutput(last_hidden_state=x / 2)
        return CausalLMOutput(
            loss=inner[0].sum(), logits=inner.last_hidden_state, cache=inner.cache
        )


def test_compilers_take_it(tmp_path) -> None:
    x = torch.ones(2)
    compiled = torch.compile(Halves(), backend="eager", fullgraph=True)(x)
    exported = torch.export.export(Halves(), (x,))
    torch.export.save(exported, tmp_path / "halves.pt2")
    loaded = torch.export.load(tmp_path / "halves.pt2").module()(x)
    for output in (compiled, exported.module()(x), loaded):
        assert type(output) is CausalLMOutput and list(output) == ["loss", "logits"]
        assert output.loss.item() == 1 and output.cache is None
