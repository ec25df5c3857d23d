"""The residual of decoding steps: a branch is added to it where the next product reads the sum.

At one token a row a layer is its weights' bytes and what it costs to start its kernels. Each linear
layer is one op here with all that stands between it and the one before.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from . import ops
from .ops.moe_small import moe_small_pays
from .packed import Weight


class Norm(Protocol):
    """An RMS norm with a weight."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def eps(self) -> float: ...

    def __call__(self, x: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Two:
    """The branches of a layer with experts, which close as one: x_norm(x) + other_norm(other)."""

    x: Tensor
    x_norm: Norm
    other: Tensor
    other_norm: Norm

    def closed(self) -> Tensor:
        sum_TD, _ = ops.add_rms_norm(
            self.other, self.x_norm(self.x), self.other_norm.weight, eps=self.other_norm.eps
        )
        return sum_TD


@dataclass(frozen=True)
class Residual:
    """x [T, D] and the branch that is to be added to it: x = (x + norm(branch)) scale."""

    x: Tensor
    branch: Tensor | Two | None = None
    norm: Norm | None = None
    scale: Tensor | None = None

    def times(
        self,
        norm: Norm | None,
        weight: Weight,
        *,
        factor: Tensor | None = None,
        gated: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """norm(x) weightᵀ as `ops.linear_small` makes it, and x, for which nothing waits."""
        norm_weight = None if norm is None else norm.weight
        if self.branch is None or self.norm is None:
            eps = 0.0 if norm is None else norm.eps
            y, _ = ops.linear_small(
                self.x, weight, norm_weight=norm_weight, factor=factor, gated=gated, eps=eps
            )
            return y, self.x
        two = self.branch if isinstance(self.branch, Two) else None
        branch = self.branch.x if isinstance(self.branch, Two) else self.branch
        y, x_TD = ops.linear_small(
            branch,
            weight,
            x_weight=None if two is None else two.x_norm.weight,
            other=None if two is None else two.other,
            other_weight=None if two is None else two.other_norm.weight,
            residual=self.x,
            post_weight=self.norm.weight,
            scale=self.scale,
            norm_weight=norm_weight,
            factor=factor,
            gated=gated,
            eps=self.norm.eps,
        )
        assert x_TD is not None  # as a residual was given
        return y, x_TD

    def closed(self, norm: Norm | None = None) -> tuple[Tensor, Tensor | None]:
        """x, and norm(x) if a norm is given."""
        if self.branch is None or self.norm is None:
            return self.x, None if norm is None else norm(self.x)
        next_weight = None if norm is None else norm.weight
        branch = self.branch.closed() if isinstance(self.branch, Two) else self.branch
        return ops.add_rms_norm(
            branch, self.x, self.norm.weight, next_weight, self.scale, self.norm.eps
        )


class ExpertsLayer(Protocol):
    """A layer with experts, its parts under transformers' names."""

    router: Any
    post_attention_layernorm: Any
    pre_feedforward_layernorm: Any
    pre_feedforward_layernorm_2: Any
    post_feedforward_layernorm_1: Any
    post_feedforward_layernorm_2: Any


@dataclass(frozen=True)
class Branches:
    """The feed-forward of such a layer for a few tokens, of k experts each; weights as in
    `ops.moe_open` and `ops.moe_experts_small`."""

    layer: ExpertsLayer
    gate_up: Weight
    down: Weight
    router: Tensor
    experts: tuple[Weight, Weight]
    k: int

    def pay(self, x_TD: Tensor) -> bool:
        """Whether the two ops are no slower than their parts."""
        return moe_small_pays(self._opening(x_TD, x_TD), self.experts, self.k, self.down)

    def of(self, branch_TD: Tensor, x_TD: Tensor) -> tuple[Tensor, Two]:
        """x after attention, whose output comes as the branch, and what is to be added to it."""
        layer = self.layer
        eps = layer.post_attention_layernorm.eps
        dense_x, logits_TE, expert_x, x_TD = ops.moe_open(*self._opening(branch_TD, x_TD), eps)
        scale = layer.router.per_expert_scale
        routed_TD, dense_TD = ops.moe_experts_small(
            expert_x, *self.experts, logits_TE, scale, self.k, dense_x, self.down
        )
        norms = layer.post_feedforward_layernorm_1, layer.post_feedforward_layernorm_2
        return x_TD, Two(dense_TD, norms[0], routed_TD, norms[1])

    def _opening(
        self, branch_TD: Tensor, x_TD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Weight, Tensor, Tensor, Tensor]:
        """What `ops.moe_open` is given."""
        layer = self.layer
        norms = layer.post_attention_layernorm, layer.pre_feedforward_layernorm
        before, after = (norm.weight for norm in norms)
        expert_weight, scale = layer.pre_feedforward_layernorm_2.weight, layer.router.scale
        return branch_TD, x_TD, before, after, self.gate_up, expert_weight, scale, self.router
