"""What the models that run on these ops have in common, and what is no op."""

import torch
from torch import Tensor

from . import ops

# New tokens a sequence up to which a model attends by `attention_decode`, which splits the keys
# over blocks. The op takes more, but longer runs keep a card busy with `attention_prefill` alone.
DECODE_TOKENS = 16


def gelu_mul(gate: Tensor, other: Tensor) -> Tensor:
    """gelu_tanh(gate) · other, of any leading shape, as one op."""
    product = ops.ple_gate(gate.flatten(0, -2), other.flatten(0, -2).unsqueeze(1), 0)
    return product.view(gate.shape)


def cosines_and_sines(
    positions: Tensor, inv_freq: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[..., C] each, of positions [...] and frequencies [C / 2] or [..., C / 2]; fp32 angles."""
    angles = positions[..., None].float() * inv_freq
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
