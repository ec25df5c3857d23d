"""The decoder layers for a few tokens, in as few launches as there are ops for.

At one token a row a layer is its weights' bytes and what it costs to start its kernels. Each linear
layer is one op here with all that stands between it and the one before: a branch is not added to
the residual where it ends, but where the next product reads the sum. Numbers are those of
`DecoderLayer.packed`, up to the order of the kernels' sums.

Launches of an E model's layer: q, k, v | their norms, rotation and cache, and attention | o | gate,
up | down | PLE gate | PLE projection. What is left apart reads what only all blocks of the kernel
before it make: a head's norm needs its whole row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from gemma4_kernels import ops
from gemma4_kernels.ops.linear import linear_small_pays

from .layers import DecoderLayer, call_layer
from .modules import RMSNorm
from .steps import DecodePlan


@dataclass(frozen=True)
class Residual:
    """x [T, D] and the branch that is to be added to it: x = (x + norm(branch)) scale."""

    x: Tensor
    branch: Tensor | None = None
    norm: RMSNorm | None = None
    scale: Tensor | None = None

    def times(
        self,
        norm: RMSNorm | None,
        weight: Tensor,
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
        y, x_TD = ops.linear_small(
            self.branch,
            weight,
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

    def closed(self, norm: RMSNorm | None = None) -> tuple[Tensor, Tensor | None]:
        """x, and norm(x) if a norm is given."""
        if self.branch is None or self.norm is None:
            return self.x, None if norm is None else norm(self.x)
        next_weight = None if norm is None else norm.weight
        return ops.add_rms_norm(
            self.branch, self.x, self.norm.weight, next_weight, self.scale, self.norm.eps
        )


def run(
    layers: Iterable[nn.Module],
    norm: nn.Module,
    x_TD: Tensor,
    ple_TLP: Tensor | None,
    plan: DecodePlan,
) -> Tensor:
    """norm(x) [T, D] behind the layers; those that somebody looks into are called."""
    residual = Residual(x_TD)
    for index, layer in enumerate(layers):
        ple = None if ple_TLP is None else (ple_TLP, index)
        if isinstance(layer, DecoderLayer) and fits(layer, plan, x_TD):
            residual = step(layer, residual, ple, plan)
            continue
        x_TD, _ = residual.closed()
        one = layer.packed if plan.plain(layer, DecoderLayer) else partial(call_layer, layer)
        residual = Residual(one(x_TD, None, ple, plan)[0])
    if plan.plain(norm, RMSNorm):
        _, y_TD = residual.closed(norm)
        assert y_TD is not None  # as a norm was given
        return y_TD
    return plan.call(norm, RMSNorm, residual.closed()[0])


def fits(layer: DecoderLayer, plan: DecodePlan, x_TD: Tensor) -> bool:
    """Whether all of the layer's parts are plain and its products pay; asked in the first step."""
    if id(layer) not in plan.fitting:
        plan.fitting[id(layer)] = _fits(layer, plan, x_TD)
    return plan.fitting[id(layer)]


def _fits(layer: DecoderLayer, plan: DecodePlan, x_TD: Tensor) -> bool:
    if plan.rotation is not None or not plan.whole(layer, DecoderLayer):
        return False
    eps = {module.eps for module in layer.modules() if isinstance(module, RMSNorm)}
    floats = {x.dtype for x in layer.parameters()} | {layer.layer_scalar.dtype}
    if len(eps) > 1 or floats != {x_TD.dtype}:
        return False
    for weight, norm, gated in _products(layer, plan):
        if weight is None:
            return False
        like = x_TD.new_empty(x_TD.shape[0], weight.shape[1])
        if not linear_small_pays(like, weight, None if norm is None else norm.weight, gated):
            return False
    return True


def _products(
    layer: DecoderLayer, plan: DecodePlan
) -> Iterator[tuple[Tensor | None, RMSNorm | None, bool]]:
    """Weight, norm before it, whether it is gated; no weight where one product cannot be made."""
    attention, mlp = layer.self_attn, layer.mlp
    yield _joined(plan, *attention.linears), layer.input_layernorm, False
    yield _joined(plan, attention.o_proj), None, False
    yield _joined(plan, mlp.gate_proj, mlp.up_proj), layer.pre_feedforward_layernorm, True
    yield _joined(plan, mlp.down_proj), None, False
    if layer.ple_width:
        # It reads the raw residual, of which the norm that closes the branch makes as much.
        closing = layer.post_feedforward_layernorm
        yield _joined(plan, layer.per_layer_input_gate), closing, False
        yield _joined(plan, layer.per_layer_projection), None, False


def _joined(plan: DecodePlan, *linears: nn.Linear) -> Tensor | None:
    one = plan.joined(*linears)
    return None if one is None or one[1] is not None else one[0]


def step(
    layer: DecoderLayer, residual: Residual, ple: tuple[Tensor, int] | None, plan: DecodePlan
) -> Residual:
    """The layer, which `fits`; ple: the per-layer inputs [T, L, P] and which of them it takes."""
    attention, mlp = layer.self_attn, layer.mlp

    def weight(*linears: nn.Linear) -> Tensor:
        one = _joined(plan, *linears)
        assert one is not None  # the layer fits
        return one

    qkv, x_TD = residual.times(layer.input_layernorm, weight(*attention.linears))
    attended = attention.attend(attention.split(qkv), qkv.dtype, plan)
    out, _ = ops.linear_small(attended.flatten(1), weight(attention.o_proj))

    residual = Residual(x_TD, out, layer.post_attention_layernorm)
    gate_up = weight(mlp.gate_proj, mlp.up_proj)
    hidden, x_TD = residual.times(layer.pre_feedforward_layernorm, gate_up, gated=True)
    out, _ = ops.linear_small(hidden, weight(mlp.down_proj))
    if layer.has_experts:
        out = layer.with_experts(x_TD, out, plan)

    if ple is None:
        return Residual(x_TD, out, layer.post_feedforward_layernorm, layer.layer_scalar)
    residual = Residual(x_TD, out, layer.post_feedforward_layernorm)
    ple_TLP, index = ple
    gated, x_TD = residual.times(None, weight(layer.per_layer_input_gate), factor=ple_TLP[:, index])
    out, _ = ops.linear_small(gated, weight(layer.per_layer_projection))
    return Residual(x_TD, out, layer.post_per_layer_input_norm, layer.layer_scalar)
