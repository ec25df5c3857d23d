"""The decoder layers for a few tokens, in as few launches as there are ops for.

A branch is not added to the residual where it ends, but where the next product reads the sum (see
`gemma4_kernels.residual`). Numbers are those of `DecoderLayer.packed`, up to the order of the
kernels' sums.

Launches of an E model's layer: q, k, v | their norms, rotation and cache, and attention | o | gate,
up | down | PLE gate | PLE projection. With experts, after o: gate, up and router | the experts'
gate, up and dense down | the experts' down. What is left apart reads what only all blocks of the
kernel before it make: a head's norm needs its whole row.
"""

from collections.abc import Iterable, Iterator
from functools import partial

from torch import Tensor, nn

from gemma4_kernels import ops
from gemma4_kernels.ops.linear import linear_small_pays
from gemma4_kernels.packed import Weight
from gemma4_kernels.residual import Branches, Residual, Two

from .layers import DecoderLayer, call_layer
from .modules import RMSNorm
from .steps import DecodePlan


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
    if not layer.has_experts:
        return True
    branches = _branches(layer, plan)
    return branches is not None and branches.pay(x_TD)


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


def _branches(layer: DecoderLayer, plan: DecodePlan) -> Branches | None:
    mlp = layer.mlp
    gate_up, down = _joined(plan, mlp.gate_proj, mlp.up_proj), _joined(plan, mlp.down_proj)
    router = _joined(plan, layer.router.proj)
    if gate_up is None or down is None or not isinstance(router, Tensor):
        return None
    experts = layer.experts.weights
    return Branches(layer, gate_up, down, router, experts, layer.router.top_k)


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
    branch: Tensor | Two
    if layer.has_experts:
        branches = _branches(layer, plan)
        assert branches is not None  # the layer fits
        x_TD, branch = branches.of(out, x_TD)
    else:
        gate_up = weight(mlp.gate_proj, mlp.up_proj)
        hidden, x_TD = residual.times(layer.pre_feedforward_layernorm, gate_up, gated=True)
        branch, _ = ops.linear_small(hidden, weight(mlp.down_proj))

    if ple is None:
        return Residual(x_TD, branch, layer.post_feedforward_layernorm, layer.layer_scalar)
    residual = Residual(x_TD, branch, layer.post_feedforward_layernorm)
    ple_TLP, index = ple
    gated, x_TD = residual.times(None, weight(layer.per_layer_input_gate), factor=ple_TLP[:, index])
    out, _ = ops.linear_small(gated, weight(layer.per_layer_projection))
    return Residual(x_TD, out, layer.post_per_layer_input_norm, layer.layer_scalar)
