"""A layer whose activations the backward makes again (activation checkpointing)."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import wraps
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Tail
from .steps import Keys, PackedPlan

# `DecoderLayer.packed`, or what stands for it.
RunLayer: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
# Of torch.utils.checkpoint.checkpoint.
CheckpointOptions: TypeAlias = dict[str, Any]


def recomputing(run: RunLayer, layer: int, owner: int, options: CheckpointOptions) -> RunLayer:
    """`run`, the forward of a layer that reads the keys of layer `owner`, under a checkpoint.

    Shared keys go in and out as tensors, for a reentrant checkpoint finds no others. The plan goes
    on to other layers and changes on its way: the backward is given it as it was.
    """

    @wraps(run)
    def checkpointed(
        x_TD: Tensor,
        y_TD: Tensor | None,
        ple: tuple[Tensor, int] | None,
        plan: PackedPlan,
        next_norm: nn.Module | None,
        tail: Tail | None,
    ) -> tuple[Tensor, Tensor | None]:
        before, made = copy(plan), list[Keys | None]()
        ple_TLP, index = (None, 0) if ple is None else ple
        shared = () if owner == layer else (plan.keys[owner].k, plan.keys[owner].v)

        def recomputed(
            x_TD: Tensor, y_TD: Tensor | None, ple_TLP: Tensor | None, *kv: Tensor
        ) -> tuple[Tensor | None, ...]:
            inner = copy(before)
            inner.keys = {owner: replace(before.keys[owner], k=kv[0], v=kv[1])} if kv else {}
            ple = None if ple_TLP is None else (ple_TLP, index)
            x_TD, y_TD = run(x_TD, y_TD, ple, inner, next_norm, tail)
            own = None if kv else inner.keys.get(layer)
            made.append(own)
            return (x_TD, y_TD) if own is None else (x_TD, y_TD, own.k, own.v)

        x_TD, y_TD, *kv = checkpoint(recomputed, x_TD, y_TD, ple_TLP, *shared, **options)
        if (own := made[0]) is not None:
            plan.keys[layer] = replace(own, k=kv[0], v=kv[1])
        return x_TD, y_TD

    return checkpointed
