"""The same tiny model twice: transformers' own class, and this one's, with the same weights."""

import torch
import transformers
from torch import Tensor, nn

from gemma4 import Gemma4ForCausalLM

from . import tiny

S, F = tiny.S, tiny.F
# A layer of each kind is enough: sliding and full, owning keys and (e_series) borrowing them.
TWO = dict(num_hidden_layers=2, layer_types=[S, F])
OPTIONS = {
    "dense": tiny.DENSE | TWO | dict(attention_bias=True),
    "k_eq_v": tiny.K_EQ_V | TWO,
    "moe": tiny.MOE | TWO,
    "e_series": tiny.E_SERIES
    | dict(num_hidden_layers=4, layer_types=[S, F, S, F], num_kv_shared_layers=2),
}
NAMES = list(OPTIONS)


def pair(name: str, **overrides: object) -> tuple[nn.Module, Gemma4ForCausalLM]:
    """(theirs, ours), both in eval mode, theirs with nothing but eager torch in it."""
    options = {**OPTIONS[name], **overrides}
    ours = tiny.tiny(options)
    config = transformers.Gemma4TextConfig(**options)
    config._attn_implementation = config._experts_implementation = "eager"
    theirs = transformers.Gemma4ForCausalLM(config).eval()
    theirs.load_state_dict({"lm_head.weight": ours.lm_head.weight, **ours.state_dict()})
    return theirs, ours


def left_padded(width: int, padding: int) -> dict[str, Tensor]:
    """ids, mask, positions and labels of two rows; the second begins with so much padding."""
    mask = torch.ones(2, width, dtype=torch.long)
    mask[1, :padding] = 0
    input_ids = tiny.ids(2, width)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # The first token of a row is predicted where there is none; its label is not to be counted.
    labels = input_ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    return dict(input_ids=input_ids, attention_mask=mask, position_ids=positions, labels=labels)


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Within `tolerance` of the largest value (at least 1): what a sum in another order changes."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, atol=tolerance * scale, rtol=0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def close_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-4) -> None:
    """The same parameters have gradients, and each is close to the other model's."""
    actual, expected = gradients(ours), gradients(theirs)
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            actual[name],
            gradient,
            atol=tolerance * max(scale, 1e-3),
            rtol=0,
            msg=lambda m, name=name: f"{name}: {m}",
        )
