"""Parameters, states and optimizers carry transformers' names; projections that lie side by side
in memory stay exact through whatever moves, copies or loads them."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from support import tiny
from support.pairs import NAMES, close, close_gradients, left_padded, pair
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp

from gemma4 import Gemma4ForCausalLM

each = pytest.mark.parametrize("name", NAMES)
# AdamW's first step is a sign: where a gradient is a last bit from 0, two models go apart.
STEP = 1e-3
PACKED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny.ids(2, 9)).logits


def packs(model: nn.Module) -> list[list[nn.Linear]]:
    """The projections of one input, layer by layer."""
    found = []
    for layer in model.model.layers:
        for parent, names in PACKED.items():
            parts = [getattr(getattr(layer, parent), name, None) for name in names]
            found.append([part for part in parts if part is not None])
    return found


def lie_side_by_side(parts: list[nn.Linear]) -> bool:
    weights = [part.weight for part in parts]
    ends = [w.data_ptr() + w.numel() * w.element_size() for w in weights]
    one = {w.untyped_storage().data_ptr() for w in weights}
    return len(one) == 1 and ends[:-1] == [w.data_ptr() for w in weights[1:]]


def held_bytes(model: nn.Module) -> int:
    """All memory that the model's tensors keep alive, views and twins counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for value in vars(module).values():
            tensors += [value] if isinstance(value, Tensor) else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def needed_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@each
def test_names_and_shapes(name: str) -> None:
    found = []
    for model in pair(name):
        tensors = {
            "parameters": model.named_parameters(),
            "with twins": model.named_parameters(remove_duplicate=False),
            "state": model.state_dict().items(),
        }
        found.append({kind: {n: t.shape for n, t in named} for kind, named in tensors.items()})
        # A tied head is the embedding: a state may hold it twice or leave it out.
        found[-1]["state"].pop("lm_head.weight", None)
        found[-1]["linears"] = {n for n, m in model.named_modules() if type(m) is nn.Linear}
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert found[1] == found[0]


@each
def test_gradients_and_a_step(name: str) -> None:
    theirs, ours = pair(name)
    batch, states = left_padded(11, 3), []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
        model(**batch).loss.backward()
        optimizer.step()
        names = optimizer.state_dict()["param_groups"][0]["param_names"]
        moments = optimizer.state_dict()["state"].values()
        states.append(dict(zip(names, moments, strict=True)))
    close_gradients(ours, theirs)
    assert states[1].keys() == states[0].keys()
    for key, state in states[0].items():
        close(states[1][key]["exp_avg"], state["exp_avg"])
    close(logits(ours), logits(theirs), STEP)


@each
def test_distributed_state_dicts(name: str) -> None:
    """Both ways between the two models, with the optimizer's moments."""
    theirs, ours = pair(name)
    batch = left_padded(11, 3)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (theirs, ours)]
    theirs(**batch).loss.backward()
    optimizers[0].step()
    optimizers[0].zero_grad()
    states, moments = copy.deepcopy(dcp.get_state_dict(theirs, optimizers[0]))
    dcp.set_state_dict(ours, optimizers[1], model_state_dict=states, optim_state_dict=moments)
    close(logits(ours), logits(theirs))
    assert dcp.get_model_state_dict(ours).keys() | {"lm_head.weight"} == states.keys()
    again = dcp.get_optimizer_state_dict(ours, optimizers[1])
    assert again["state"].keys() == moments["state"].keys()
    for key, state in moments["state"].items():
        assert torch.equal(again["state"][key]["exp_avg"], state["exp_avg"])
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        model(**batch).loss.backward()
        optimizer.step()
    close(logits(ours), logits(theirs), STEP)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(assign: bool) -> Callable[[nn.Module], nn.Module]:
    def load(model: nn.Module) -> nn.Module:
        state = {n: t.clone() for n, t in model.state_dict().items()}
        fresh = type(model)(model.config).eval().to(model.dtype)
        logits(fresh)
        fresh.load_state_dict(state, assign=assign)
        fresh.tie_weights()
        return fresh

    return load


def from_empty(model: nn.Module) -> nn.Module:
    """Made on meta, then filled, as tools do that must not hold a model twice."""
    with torch.device("meta"):
        fresh = type(model)(model.config).eval().to(model.dtype)
    fresh = fresh.to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    return fresh


def each_filled(model: nn.Module) -> nn.Module:
    """Parameter by parameter, as FSDP's and accelerate's loaders do it."""
    fresh = type(model)(model.config).eval().to(model.dtype)
    logits(fresh)
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        new = nn.Parameter(parameter.detach().clone())
        setattr(fresh.get_submodule(module), leaf, new)
    for name, buffer in model.named_buffers():
        fresh.get_buffer(name).copy_(buffer)
    fresh.tie_weights()
    return fresh


MOVES = {
    "to the same": lambda model: model.to("cpu"),
    "to and fro": lambda model: model.double().float(),
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "load": loaded(assign=False),
    "load by assigning": loaded(assign=True),
    "from empty": from_empty,
    "each parameter set": each_filled,
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("move", MOVES)
@each
def test_packing_survives(name: str, move: str, used: bool) -> None:
    """Before and after: the same numbers, one matrix a pack, nothing held twice."""
    theirs, ours = pair(name)
    if used:
        logits(ours)
    ours = MOVES[move](ours)
    close(logits(ours), logits(theirs))
    assert all(lie_side_by_side(parts) for parts in packs(ours))
    assert held_bytes(ours) <= 1.01 * needed_bytes(ours)
    batch = left_padded(11, 3)
    for model in (theirs, ours):
        model(**batch).loss.backward()
    close_gradients(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@each
def test_packing_survives_a_cast(name: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(name)
    logits(ours)
    exact = logits(theirs)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    assert all(p.dtype == dtype for p in ours.parameters())
    # The median token: one whose expert changes by a last bit says nothing.
    found, bound = ((logits(m) - exact).abs().mean(-1).median() for m in (ours, theirs))
    assert found <= 1.25 * bound + 1e-6
    assert all(lie_side_by_side(parts) for parts in packs(ours))
    assert held_bytes(ours) <= 1.01 * needed_bytes(ours)


@each
def test_written_weights_are_seen(name: str) -> None:
    """In place, through `.data`, by an optimizer, or by putting another parameter there."""
    theirs, ours = pair(name)
    logits(ours)

    def scale(linear: nn.Linear) -> None:
        with torch.no_grad():
            linear.weight.mul_(1.5)

    def data(linear: nn.Linear) -> None:
        linear.weight.data = 0.5 * linear.weight.data

    def other(linear: nn.Linear) -> None:
        linear.weight = nn.Parameter(linear.weight.detach() * 1.25)

    for write in (scale, data, other):
        for model in (theirs, ours):
            for parts in packs(model):
                write(parts[-1])
                write(parts[0])
        close(logits(ours), logits(theirs))
    assert all(lie_side_by_side(parts) for parts in packs(ours))


@each
def test_weights_that_others_hold(name: str) -> None:
    """In one flat buffer, as optimizers that step over all weights at once keep them."""
    theirs, ours = pair(name)
    logits(ours)
    buffers = []
    for model in (theirs, ours):
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        parts = flat.split([p.numel() for p in model.parameters()])
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.data = part.view(parameter.shape)
        buffers.append(flat)
        logits(model)
    noise = 0.05 * torch.randn_like(buffers[0])
    for flat in buffers:
        flat += noise
    close(logits(ours), logits(theirs))


@each
def test_frozen_and_trained_parts_of_one_pack(name: str) -> None:
    theirs, ours = pair(name)
    logits(ours)
    for model in (theirs, ours):
        model.requires_grad_(False)
        for parts in packs(model):
            parts[0].requires_grad_(True)
        model(**left_padded(11, 3)).loss.backward()
    close_gradients(ours, theirs)


@each
def test_clones_and_their_models_are_apart(name: str) -> None:
    theirs, ours = pair(name)
    logits(ours)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    close(logits(ours), logits(theirs))


def test_a_head_trained_apart_stays_apart() -> None:
    """Nothing but loading and tie_weights() ties it again."""
    theirs, ours = pair("dense")
    head = torch.randn_like(ours.lm_head.weight)
    for model in (theirs, ours):
        model.lm_head.weight = nn.Parameter(head.clone())
    for move in (
        lambda m: m.to("cpu"),
        lambda m: m.double().float(),
        lambda m: m._apply(torch.clone),
        copy.deepcopy,
        lambda m: m.train().eval(),
        lambda m: m.requires_grad_(True),
    ):
        ours = move(ours)
        assert torch.equal(ours.lm_head.weight, head)
        close(logits(ours), logits(theirs))
    for model in (theirs, ours):
        model.zero_grad()
        model(**left_padded(11, 3)).loss.backward()
    close_gradients(ours, theirs)
    ours.tie_weights()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.parametrize("move", ["to", "half", "deepcopy", "pickle"])
def test_a_tied_head_stays_tied(move: str) -> None:
    _, ours = pair("dense")
    ours = {
        "to": lambda m: m.to(torch.float64),
        "half": lambda m: m.half(),
        "deepcopy": copy.deepcopy,
        "pickle": pickled,
    }[move](ours)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_a_head_trained_apart_is_saved(tmp_path) -> None:
    """With the flag that fits, so that both classes load it again."""
    import transformers

    _, ours = pair("dense")
    ours.lm_head.weight = nn.Parameter(torch.randn_like(ours.lm_head.weight))
    expected = logits(ours)
    ours.save_pretrained(tmp_path)
    for cls in (Gemma4ForCausalLM, transformers.Gemma4ForCausalLM):
        again = cls.from_pretrained(tmp_path).eval()
        close(logits(again), expected)
        assert again.config.tie_word_embeddings is False


@pytest.mark.parametrize("name", ["dense", "e_series"])
def test_resize_token_embeddings(name: str) -> None:
    theirs, ours = pair(name)
    for options in (dict(new_num_tokens=101, pad_to_multiple_of=8), dict(new_num_tokens=90)):
        theirs.resize_token_embeddings(**options, mean_resizing=False)
        table = ours.resize_token_embeddings(*options.values())
        assert table is ours.get_input_embeddings()
        for a, b in ((theirs, ours),):
            assert b.get_input_embeddings().weight.shape == a.get_input_embeddings().weight.shape
            assert b.get_output_embeddings().weight.shape == a.get_output_embeddings().weight.shape
            assert b.config.vocab_size == a.config.vocab_size
        assert ours.lm_head.out_features == ours.config.vocab_size
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
    _, ours = pair(name)
    before = logits(ours)
    ours.resize_token_embeddings(new_num_tokens=None, pad_to_multiple_of=64)
    assert ours.config.vocab_size == 128
    close(logits(ours)[..., :97], before)
