"""The decoder layers for a few tokens, in as few launches as there are ops for.

At one token a row a layer is its weights' bytes and what it costs to start its kernels. Each linear
layer is one op here with all that stands between it and the one before: a branch is not added to
the residual where it ends, but where the next product reads the sum. Numbers are those of
`DecoderLayer.packed`, up to the order of the kernels' sums.

Launches of an E model's layer: q, k, v | their norms, rotation and cache, and attention | o | gate,
up | down | PLE gate | PLE projection. With experts, after o: gate, up and router | the experts'
gate, up and dense down | the experts' down. What is left apart reads what only all blocks of the
kernel before it make: a head's norm needs its whole row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from gemma4_kernels import ops
from gemma4_kernels.ops.linear import linear_small_pays
from gemma4_kernels.ops.moe import moe_small_pays

from .layers import DecoderLayer, call_layer
from .modules import RMSNorm, Weight
from .steps import DecodePlan


@dataclass(frozen=True)
class Two:
    """The branches of a layer with experts, which close as one: x_norm(x) + other_norm(other)."""

    x: Tensor
    x_norm: RMSNorm
    other: Tensor
    other_norm: RMSNorm

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
    norm: RMSNorm | None = None
    scale: Tensor | None = None

    def times(
        self,
        norm: RMSNorm | None,
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

    def closed(self, norm: RMSNorm | None = None) -> tuple[Tensor, Tensor | None]:
        """x, and norm(x) if a norm is given."""
        if self.branch is None or self.norm is None:
            return self.x, None if norm is None else norm(self.x)
        next_weight = None if norm is None else norm.weight
        branch = self.branch.closed() if isinstance(self.branch, Two) else self.branch
        return ops.add_rms_norm(
            branch, self.x, self.norm.weight, next_weight, self.scale, self.norm.eps
        )


def run(
    layers: Iterable[nn.Module], x_TD: Tensor, ple_TLP: Tensor | None, plan: DecodePlan
) -> Residual:
    """x behind the layers; those that somebody looks into are called."""
    residual = Residual(x_TD)
    for index, layer in enumerate(layers):
        ple = None if ple_TLP is None else (ple_TLP, index)
        if isinstance(layer, DecoderLayer) and fits(layer, plan, x_TD):
            residual = step(layer, residual, ple, plan)
            continue
        x_TD, _ = residual.closed()
        one = layer.packed if plan.plain(layer, DecoderLayer) else partial(call_layer, layer)
        residual = Residual(one(x_TD, None, ple, plan)[0])
    return residual


def head(residual: Residual, norm: nn.Module, linear: nn.Linear, plan: DecodePlan) -> Tensor:
    """norm(x) through a plain linear layer, in one launch where that pays."""
    weight = _joined(plan, linear)
    if id(linear) not in plan.fitting:
        plan.fitting[id(linear)] = weight is not None and _head_fits(residual, norm, weight, plan)
    if plan.fitting[id(linear)]:
        assert isinstance(norm, RMSNorm) and weight is not None  # the head fits
        return residual.times(norm, weight)[0]
    logits: Tensor = linear(normed(residual, norm, plan))
    return logits


def _head_fits(residual: Residual, norm: nn.Module, weight: Weight, plan: DecodePlan) -> bool:
    if not plan.plain(norm, RMSNorm):
        return False
    alike = residual.norm is None or residual.norm.eps == norm.eps
    dense = {weight.dtype} if isinstance(weight, Tensor) else set()
    same = {residual.x.dtype} == {norm.weight.dtype} | dense
    return alike and same and linear_small_pays(residual.x, weight, norm.weight, False)


def normed(residual: Residual, norm: nn.Module, plan: DecodePlan) -> Tensor:
    """norm(x) [T, D]."""
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
    return not layer.has_experts or _experts_fit(layer, plan, x_TD)


def _products(
    layer: DecoderLayer, plan: DecodePlan
) -> Iterator[tuple[Weight | None, RMSNorm | None, bool]]:
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


def _experts_fit(layer: DecoderLayer, plan: DecodePlan, x_TD: Tensor) -> bool:
    mlp, experts = layer.mlp, layer.experts
    gate_up, down = _joined(plan, mlp.gate_proj, mlp.up_proj), _joined(plan, mlp.down_proj)
    router = _joined(plan, layer.router.proj)
    if gate_up is None or down is None or not isinstance(router, Tensor):
        return False
    opening = _opening(layer, x_TD, x_TD, gate_up, router)
    return moe_small_pays(opening, experts.weights, layer.router.top_k, down)


def _opening(
    layer: DecoderLayer, branch_TD: Tensor, x_TD: Tensor, gate_up: Weight, router: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Weight, Tensor, Tensor, Tensor]:
    """What `ops.moe_open` is given."""
    norms = layer.post_attention_layernorm, layer.pre_feedforward_layernorm
    expert_norm = layer.pre_feedforward_layernorm_2
    before, after = (norm.weight for norm in norms)
    scale = layer.router.scale
    return branch_TD, x_TD, before, after, gate_up, expert_norm.weight, scale, router


def _with_experts(
    layer: DecoderLayer,
    branch_TD: Tensor,
    x_TD: Tensor,
    gate_up: Weight,
    down: Weight,
    router: Weight,
) -> tuple[Tensor, Two]:
    """x after attention, whose output comes as the branch, and what is to be added to it."""
    assert isinstance(router, Tensor)  # the experts fit
    opening = _opening(layer, branch_TD, x_TD, gate_up, router)
    eps = layer.post_attention_layernorm.eps
    dense_x, logits_TE, expert_x, x_TD = ops.moe_open(*opening, eps)
    experts, scale, k = layer.experts, layer.router.per_expert_scale, layer.router.top_k
    routed_TD, dense_TD = ops.moe_experts_small(
        expert_x, *experts.weights, logits_TE, scale, k, dense_x, down
    )
    norms = layer.post_feedforward_layernorm_1, layer.post_feedforward_layernorm_2
    return x_TD, Two(dense_TD, norms[0], routed_TD, norms[1])


def _joined(plan: DecodePlan, *linears: nn.Linear) -> Weight | None:
    one = plan.joined(*linears)
    return None if one is None or one[1] is not None else one[0]


def step(
    layer: DecoderLayer, residual: Residual, ple: tuple[Tensor, int] | None, plan: DecodePlan
) -> Residual:
    """The layer, which `fits`; ple: the per-layer inputs [T, L, P] and which of them it takes."""
    attention, mlp = layer.self_attn, layer.mlp

    def weight(*linears: nn.Linear) -> Weight:
        one = _joined(plan, *linears)
        assert one is not None  # the layer fits
        return one

    qkv, x_TD = residual.times(layer.input_layernorm, weight(*attention.linears))
    attended = attention.attend(attention.split(qkv), qkv.dtype, plan)
    out, _ = ops.linear_small(attended.flatten(1), weight(attention.o_proj))

    residual = Residual(x_TD, out, layer.post_attention_layernorm)
    gate_up = weight(mlp.gate_proj, mlp.up_proj)
    down = weight(mlp.down_proj)
    branch: Tensor | Two
    if layer.has_experts:
        x_TD, branch = _with_experts(layer, out, x_TD, gate_up, down, weight(layer.router.proj))
    else:
        hidden, x_TD = residual.times(layer.pre_feedforward_layernorm, gate_up, gated=True)
        branch, _ = ops.linear_small(hidden, down)

    if ple is None:
        return Residual(x_TD, branch, layer.post_feedforward_layernorm, layer.layer_scalar)
    residual = Residual(x_TD, branch, layer.post_feedforward_layernorm)
    ple_TLP, index = ple
    gated, x_TD = residual.times(None, weight(layer.per_layer_input_gate), factor=ple_TLP[:, index])
    out, _ = ops.linear_small(gated, weight(layer.per_layer_projection))
    return Residual(x_TD, out, layer.post_per_layer_input_norm, layer.layer_scalar)
