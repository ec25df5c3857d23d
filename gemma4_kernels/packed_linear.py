"""Modules whose weights stay packed: linear layer, embedding, and what holds a weight in them.

They take the places of nn.Linear and nn.Embedding, and are that to isinstance, so that adapters and
hooks find them. Their `weight` is a module of buffers: under its names the parts stand in a state
dict and move with the model, and what asks for a tensor there finds none rather than a copy.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, opset
from .packed import PackedWeight
from .packed_cpu import TorchProduct, torch_product

NAMES = ("codes", "scales", "row_scales")


class PackedParameter(nn.Module):
    """A packed weight as buffers `codes`, `scales` and `row_scales`, as far as it has them.

    They follow the model to a device, but never into another dtype: codes are not numbers, and
    their scales are what they are. A call gives the weight, so that what brings weights in at calls
    (offloading) brings these.
    """

    codes: Tensor
    scales: Tensor | None
    row_scales: Tensor | None

    def __init__(self, weight: PackedWeight):
        super().__init__()
        self._on_cpu: list[TorchProduct | None] = []
        for name, part in zip(NAMES, weight.parts, strict=True):
            self.register_buffer(name, part)

    def forward(self) -> PackedWeight:
        return PackedWeight(self.codes, self.scales, self.row_scales)

    @property
    def shape(self) -> torch.Size:
        """Of the weight: (..., N, D)."""
        return torch.Size(self.forward().shape)

    @property
    def nbytes(self) -> int:
        return self.forward().nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """Of bytes: nothing should be cast to what codes are."""
        return torch.uint8

    @property
    def on_cpu(self) -> TorchProduct | None:
        """What torch multiplies by on a CPU, made when it is asked for first and as large again."""
        if not self._on_cpu:
            self._on_cpu.append(torch_product(self.forward()))
        return self._on_cpu[0]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_on_cpu": []}

    def _load_from_state_dict(self, *args: object) -> None:
        self._on_cpu = []
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedParameter":
        self._on_cpu = []
        for name, part in self._buffers.items():
            if part is not None:
                self._buffers[name] = fn(part.view(torch.uint8)).view(part.dtype)
        return self


def has_kernels(device: torch.device) -> bool:
    """Whether compiled kernels run on this device."""
    kernels = opset.kernels
    return bool(kernels.names) and kernels.covers(device)


def product(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., D] times the transpose of a weight [N, D], dense or packed, plus the bias."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    y = ops.linear_packed(x.reshape(-1, x.shape[-1]), weight)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)


class PackedLinear(nn.Linear):
    """y = x Wᵀ + b of a packed weight W [N, D]; x [..., D] of any floating dtype gives y in it.

    x has a gradient, the weight none.
    """

    weight: PackedParameter  # type: ignore[assignment]
    PARTS: ClassVar = {"weight": PackedParameter}

    def __init__(
        self, weight: PackedWeight | PackedParameter, bias: nn.Parameter | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        # Another module may hold the same one: a tied head.
        self.weight = weight if isinstance(weight, PackedParameter) else PackedParameter(weight)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or torch.is_grad_enabled() or has_kernels(x.device):
            return product(x, self.weight(), self.bias)
        multiplied = self.weight.on_cpu if x.is_cpu and self.weight.codes.is_cpu else None
        if multiplied is None:
            return product(x, self.weight(), self.bias)
        y = multiplied(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# What a linear layer may be.
LINEAR: tuple[type[nn.Linear], ...] = (nn.Linear, PackedLinear)


class PackedEmbedding(nn.Embedding):
    """Rows of a packed table W [N, D], in `dtype`, times `scale`; only these rows are unpacked."""

    weight: PackedParameter  # type: ignore[assignment]
    like: Tensor
    PARTS: ClassVar = {"weight": PackedParameter}

    def __init__(
        self, weight: PackedWeight | PackedParameter, dtype: torch.dtype, scale: float = 1.0
    ):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = weight if isinstance(weight, PackedParameter) else PackedParameter(weight)
        self.scale = scale
        # The dtype follows the model's.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def embed_scale(self) -> Tensor:
        """Under transformers' name: adapters of an embedding look for it."""
        return torch.tensor(self.scale)

    def rows(self, ids: Tensor) -> Tensor:
        """[..., D] without the scale."""
        found = self.weight().at(ids.flatten()).to(self.like.dtype)
        return found.view(*ids.shape, -1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids) * torch.tensor(self.scale, dtype=self.like.dtype)
