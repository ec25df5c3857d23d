"""Building blocks of the model: norms, embedding, activation, rotary embedding, joined linears."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_kernels import ops
from gemma4_kernels.common import cosines_and_sines
from gemma4_kernels.fusion import is_plain
from gemma4_kernels.packed import PackedWeight
from gemma4_kernels.packed_linear import (
    LINEAR,
    PackedEmbedding,
    PackedLinear,
    PackedParameter,
    has_kernels,
)

from .config import FULL, SLIDING, Gemma4TextConfig

# On a CPU one product in place of two or three saves calls and no bytes: measured, it is worth a
# copy of weights up to about this size. A GPU is saved launches, whatever the size.
CPU_JOIN_BYTES = 4 << 20

Weight: TypeAlias = Tensor | PackedWeight


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class UnscaledRMSNorm(nn.Module):
    """Without a weight: of values, and of what the router reads."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, None, self.eps)


class ScaledEmbedding(nn.Embedding):
    """A table whose rows come out times `scale`, rounded to the table's dtype first."""

    def __init__(self, rows: int, width: int, scale: float, std: float):
        super().__init__(rows, width)
        nn.init.normal_(self.weight, std=std)
        self.scale = scale

    @property
    def embed_scale(self) -> Tensor:
        """Under transformers' name: adapters of an embedding look for it."""
        return torch.tensor(self.scale)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(self.scale, dtype=self.weight.dtype)


# What an embedding of the model may be.
EMBEDDING: tuple[type[nn.Embedding], ...] = (ScaledEmbedding, PackedEmbedding)


class GELUTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class RotaryEmbedding(nn.Module):
    """inv_freq [C / 2] of each layer kind: fp32 whatever the model's dtype, in no state dict.

    default: theta^(-2i / C). proportional: the same for the first partial_rotary_factor · C / 2
    pairs (the exponent divides by the whole head size), 0 for the rest, which do not turn.
    """

    def __init__(self, config: Gemma4TextConfig):
        super().__init__()
        self.config = config
        self._fill(torch.get_default_device())

    def _fill(self, device: torch.device) -> None:
        self.tables = {kind: self._table(kind).to(device) for kind in (SLIDING, FULL)}

    def _table(self, kind: str) -> Tensor:
        rope, size = self.config.rope_parameters[kind], self.config.head_size(kind)
        pairs = size // 2
        if rope["rope_type"] == "proportional":
            pairs = int(rope.get("partial_rotary_factor", 1.0) * size // 2)
        # In fp32 from the start, as the reference does: the last bit decides far positions.
        exponent = torch.arange(0, 2 * pairs, 2, dtype=torch.float32, device="cpu") / size
        turning = 1.0 / rope["rope_theta"] ** exponent / rope.get("factor", 1.0)
        return F.pad(turning, (0, size // 2 - pairs))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        # A cast or a move of the model: follow the device, never the dtype.
        self._fill(fn(torch.empty(0, device=self.tables[FULL].device)).device)
        return self

    def __getitem__(self, kind: str) -> Tensor:
        return self.tables[kind]

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, S, C] in x's dtype; fused ops take inv_freq and positions."""
        return cosines_and_sines(position_ids, self.tables[layer_type], x.dtype)


def rotated(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Each pair (i, i + C/2) of a head turned by its angle."""
    first, second = x_THC.chunk(2, -1)
    return x_THC * cos_TC[:, None] + torch.cat([-second, first], -1) * sin_TC[:, None]


def joined(*linears: nn.Linear) -> tuple[Weight, Tensor | None] | None:
    """Weight and bias of the linears as one matrix, if one product may take their place now.

    That is a matter of inference: they are plain, no gradient is wanted, no autocast (which keeps
    a cast of each weight) and no compiler (which cannot see addresses) is at work. The first call
    lays the weights side by side in one piece of memory, one group at a time, and so does every
    call after something has moved them; the parameters stay who they are and become views. Packed
    weights of one form are joined like dense ones.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not all(is_plain(linear, LINEAR) for linear in linears)
    ):
        return None
    weights = [linear.weight for linear in linears]
    if torch.is_autocast_enabled(weights[0].device.type):
        return None
    weight = _weight_as_one(linears)
    if weight is None or linears[0].bias is None:
        return None if weight is None else (weight, None)
    bias = _as_one([linear.bias for linear in linears])
    return None if bias is None else (weight, bias)


def _weight_as_one(linears: Sequence[nn.Linear]) -> Weight | None:
    held = [linear.weight for linear in linears if isinstance(linear, PackedLinear)]
    if not held:
        return _as_one([linear.weight for linear in linears])
    # Where there are no kernels, a module knows better than an op how to multiply its weight.
    if len(held) < len(linears) or not has_kernels(held[0].device):
        return None
    if not all(is_plain(weight, PackedParameter) for weight in held):
        return None
    weights = [weight() for weight in held]
    made: list[Tensor | None] = []
    for parts in zip(*(weight.parts for weight in weights), strict=True):
        there = [part for part in parts if part is not None]
        one = _as_one(there) if len(there) == len(parts) else None
        if there and one is None:
            return None
        made.append(one)
    codes, scales, row_scales = made
    assert codes is not None  # every weight has them
    return PackedWeight(codes, scales, row_scales)


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensors joined along dimension 0: a view of their memory, laid out anew if need be."""
    first, rows = parts[0], 0
    size, end = first.element_size(), first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.dtype != first.dtype or not part.is_contiguous():
            return _lay_side_by_side(parts)
        rows += part.shape[0]
        end += part.numel() * size
    whole = (rows, *first.shape[1:])
    # Neighbours by chance lie in two storages; then the first one's ends before the last row.
    begin = first.untyped_storage().data_ptr()
    if end - begin > first.untyped_storage().nbytes():
        return _lay_side_by_side(parts)
    return first.as_strided(whole, first.stride())


def _lay_side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    first, total = parts[0], sum(part.nbytes for part in parts)
    if first.is_meta or (first.is_cpu and total > CPU_JOIN_BYTES):
        return None
    begin = 0
    for part in parts:
        # Memory that somebody else looks at (an optimizer's flat buffer, another process, a tied
        # module) must stay where it is: what is moved has a storage to itself. Pickle gives each
        # part a copy of what was one storage.
        held, offset = part.untyped_storage().nbytes(), part.storage_offset() * part.element_size()
        alone = held == part.nbytes or (held == total and offset == begin)
        if not alone or (part.is_cpu and part.is_shared()):
            return None
        if part.dtype != first.dtype or part.device != first.device:
            return None
        begin += part.nbytes
    if len({part.untyped_storage().data_ptr() for part in parts}) < len(parts):
        return None
    with torch.inference_mode(False):  # else the parameters could never be trained again
        # As bytes, for torch joins no scales of eight bits.
        whole = torch.cat([part.detach().view(torch.uint8) for part in parts]).view(first.dtype)
    for part, view in zip(parts, whole.split([p.shape[0] for p in parts]), strict=True):
        part.data = view
    return whole


def linear(inputs: int, outputs: int, config: Gemma4TextConfig, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(linear.weight, std=config.initializer_range)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
