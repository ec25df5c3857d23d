"""The parts of a layer for a few tokens, each in as few launches as there are ops for.

Attention, feed-forward and per-layer projection stand alone: where the modules of one are not
plain, they are called and the others are as they were. A layer hands its residual to the next one
as it is, the last branch not yet added, while nobody looks at what goes from layer to layer.

One new token a row over transformers' static cache attends by `qkv_attention_decode`, which writes
its key; whatever else is given attends as transformers calls attention.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from ... import ops
from ...fusion import is_plain, why_called
from ...joined import joined
from ...ops.decode import MOST_GROUP
from ...ops.linear import MOST_TOKENS, linear_small_pays
from ...packed import Weight
from ...packed_linear import LINEAR, PackedLinear, has_kernels
from ...reference.decode import COUNTERS
from ...residual import Branches, Norm, Residual, Two
from . import base, modules
from .cache import RingLayer, as_pages, make_ring, pages_of, stored
from .experts import instead_of_op

if TYPE_CHECKING:
    from .layer import DecoderLayer

# The keyword by which the layers of one forward are given their Step.
STEP = "gemma4_kernels_step"
_FORWARD = gemma4.Gemma4TextModel.forward


@dataclass(frozen=True)
class Keys:
    """What a layer attends to: a static cache's keys and values, and how many of each row."""

    k: Tensor
    v: Tensor
    seq_lens: Tensor
    block_table: Tensor | None
    window: int  # of a ring; 0: none
    counters: Tensor


class Step:
    """What the layers of one forward have in common."""

    def __init__(self, model: gemma4.Gemma4TextModel):
        self.layers = model.layers
        # Who else could look at what goes from layer to layer is a text model of another make.
        self.ours = type(model) is gemma4.Gemma4TextModel and "forward" not in model.__dict__
        self.ours = self.ours and gemma4.Gemma4TextModel.forward is _FORWARD
        self.pending: tuple[Tensor, Residual] | None = None
        # By layer kind, to layers that make none; and by how many slots a ring of these is turned.
        self.lent: dict[str, Keys] = {}
        self.turned: dict[str, int] = {}
        self.wrote: list[tuple[StaticLayer, int | None]] = []
        self._made: dict[Hashable, Tensor] = {}

    def once(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def take(self, hidden_states: Tensor) -> Residual:
        """What the layer before has handed on as `hidden_states`."""
        if self.pending is None:
            return Residual(hidden_states.flatten(0, 1))
        given, residual = self.pending
        self.pending = None
        if not torch.compiler.is_compiling() and given is not hidden_states:
            raise RuntimeError("a layer must be given what the layer before it returned")
        return residual

    def hands_on(
        self,
        layer: "DecoderLayer",
        branch: Tensor | Two,
        x: Tensor,
        closing: gemma4.Gemma4RMSNorm,
    ) -> bool:
        """Whether the next layer may be given x before the last branch is added to it: nobody looks
        at what goes from one to the other."""
        index = layer.layer_idx
        eps = branch.x_norm.eps if isinstance(branch, Two) else None
        if x.shape[1] != 1 or modules.why_not_read(closing, x.device, eps) is not None:
            return False
        if not self.ours or index + 1 >= min(len(self.layers), layer.config.num_hidden_layers):
            return False
        called = (why_called(self.layers[number]) for number in (index, index + 1))
        return self.layers[index] is layer and not any(called)

    def hand_on(
        self, branch: Tensor | Two, x: Tensor, closing: gemma4.Gemma4RMSNorm, scale: Tensor
    ) -> Tensor:
        """What the layer is to return, for `take`."""
        if isinstance(branch, Tensor):
            branch = branch.flatten(0, 1)
        self.pending = x, Residual(x.flatten(0, 1), branch, closing, scale)
        return x

    def keys(self, kind: str, layer: StaticLayer, mask: Tensor | None, q: Tensor) -> Keys | None:
        """Of one new token of each row; None where a cache is yet to be made, or is another's."""
        if not layer.is_initialized:
            return None
        k, v = stored(layer)
        alike = k.dtype == q.dtype and k.device == q.device and k.shape == v.shape
        if not alike or k.shape[0] != q.shape[0]:
            return None
        state = (layer.since, "ring") if isinstance(layer, RingLayer) else ()
        padded = mask is not None and mask.shape[-1] == 2
        lengths = ("lengths", kind if padded else k.shape[2], *state)
        table, window = None, k.shape[2] if state and not padded else 0
        if mask is not None and padded:
            seq_lens = self.once(lengths, lambda: (mask[:, 0, 0, 1] - mask[:, 0, 0, 0]).clamp(0))
            pages = ("pages", k.shape[1:3], *lengths)
            table = self.once(pages, lambda: pages_of(layer, seq_lens))
            k, v = as_pages(k), as_pages(v)
        else:
            past, rows = layer.cumulative_length, k.shape[:1]
            seq_lens = self.once(lengths, lambda: (past + 1).int().expand(rows).contiguous())
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return Keys(k, v, seq_lens, table, window, self._counters(q.shape[0], k.shape[2], k.device))

    def _counters(self, rows: int, kv_heads: int, device: torch.device) -> Tensor:
        shape = rows, kv_heads, COUNTERS
        return self.once(shape, lambda: torch.zeros(shape, dtype=torch.int32, device=device))

    def count(self, layer: StaticLayer) -> None:
        """A key was written into this layer of a cache."""
        if isinstance(layer, RingLayer):
            layer.wrote_one()
        self.wrote.append((layer, getattr(layer, "since", None)))

    def lend(self, kind: str, layer: StaticLayer, keys: Keys, shared: dict[str, Any]) -> None:
        """To the layers of this kind that make no keys."""
        self.lent[kind], shared[kind] = keys, stored(layer)
        if isinstance(layer, RingLayer) and layer.since is not None:
            self.turned[kind] = layer.cumulative_length_int - layer.since

    def in_order(self, kind: str, shared: dict[str, Any]) -> None:
        """Turns back, in a copy, what was lent of a ring: transformers' attention is to read it."""
        turned = self.turned.pop(kind, 0)
        if turned:
            shared[kind] = tuple(x.roll(-turned, 2) for x in shared[kind])

    def for_modules(
        self, residual: Residual, layer: "DecoderLayer", kwargs: dict[str, Any]
    ) -> Tensor:
        """x [T, D] for a layer whose modules are called, and what these layers share, in order."""
        kinds = layer.config.layer_types
        if kinds is not None and self.turned:
            self.in_order(kinds[layer.layer_idx], kwargs["shared_kv_states"])
        return residual.closed()[0]

    def finish(self) -> None:
        """All layers have run. A ring that was put in order since is counted already."""
        lengths = [
            layer.cumulative_length
            for layer, since in self.wrote
            if getattr(layer, "since", None) == since
        ]
        if lengths:
            torch._foreach_add_(lengths, 1)


def static_layer(attn: modules.Attention, kwargs: dict[str, Any]) -> StaticLayer | None:
    """The keys and values of a layer that was given transformers' static cache."""
    # The cache's name until transformers 5.23, and from then on.
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if type(cache) is not StaticCache or getattr(cache, "offloading", False):
        return None
    layer: StaticLayer = cache.layers[attn.layer_idx]  # type: ignore[assignment]
    if type(layer) is StaticSlidingWindowLayer and not torch.compiler.is_compiling():
        make_ring(layer)
    return layer if type(layer) in (StaticLayer, RingLayer) else None


def are_few(x: Tensor) -> bool:
    """Whether x [B, N, D] is of so few tokens, outside of training and autocast."""
    few = x.shape[0] * x.shape[1] <= MOST_TOKENS
    return few and not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))


def projected(x: Tensor, linear: nn.Module) -> Tensor:
    """linear(x) [B, N, ...]; a linear that is not plain is called."""
    weights, flat = _weights(linear) if are_few(x) else [], x.flatten(0, 1)
    if not weights or not linear_small_pays(flat, weights[0], None, False):
        return linear(x)
    y, _ = ops.linear_small(flat, weights[0])
    return y.view(*x.shape[:2], -1)


def _weights(*linears: nn.Module) -> list[Weight]:
    """Of all the linears as one where they lie so, else of each; none where a module is no plain
    linear without a bias, or is packed where no kernel multiplies it."""
    plain: list[nn.Linear] = []
    for linear in linears:
        if not is_plain(linear, LINEAR) or linear.bias is not None:
            return []
        if isinstance(linear, PackedLinear) and not has_kernels(linear.weight.device):
            return []
        plain.append(linear)
    one = joined(*plain) if len(plain) > 1 else None
    if one is not None:
        return [one[0]]
    return [x.weight() if isinstance(x, PackedLinear) else x.weight for x in plain]


def _pay(x_TD: Tensor, norm: Norm, weights: Sequence[Weight], gated: bool = False) -> bool:
    pay = [linear_small_pays(x_TD, weight, norm.weight, gated) for weight in weights]
    return all(pay) and bool(pay)


def _are_read(device: torch.device, eps: float, *norms: gemma4.Gemma4RMSNorm) -> bool:
    return all(modules.why_not_read(norm, device, eps) is None for norm in norms)


def attention(
    layer: "DecoderLayer", residual: Residual, step: Step, shape: torch.Size, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """What attention gives and the residual that it is to be added to, each [B, N, D]; None where
    modules are to be called."""
    attn, norm, x_TD = layer.self_attn, layer.input_layernorm, residual.x
    if not is_plain(attn, modules.Attention) or attn.why_unfused(x_TD.device) is not None:
        return None
    eps = None if residual.norm is None else residual.norm.eps
    if modules.why_not_read(norm, x_TD.device, eps) is not None:
        return None
    weights = _weights(*attn.linears)
    if not _pay(x_TD, norm, weights):
        return None
    made = [residual.times(norm, weight) for weight in weights]
    parts = [y.unflatten(1, (-1, attn.head_dim)) for y, _ in made]
    if len(parts) < len(attn.linears):
        heads = [linear.out_features // attn.head_dim for linear in attn.linears]
        parts = list(parts[0].split(heads, 1))
    q, k, v, *_ = *parts, None, None
    assert q is not None
    out = _attend(attn, (q, k, v), step, shape, kwargs)
    return projected(out.reshape(*shape[:2], -1), attn.o_proj), made[0][1].view(shape)


def _attend(
    attn: modules.Attention,
    parts: tuple[Tensor, Tensor | None, Tensor | None],
    step: Step,
    shape: torch.Size,
    kwargs: dict[str, Any],
) -> Tensor:
    """What is between the projections and `o_proj`, whose input it gives."""
    kind, shared, (q, k, v) = attn.layer_type, kwargs["shared_kv_states"], parts
    assert kind is not None
    layer, keys = None if k is None else static_layer(attn, kwargs), None
    if shape[1] == 1 and _by_one_op(attn, kwargs):
        if k is None:
            keys = step.lent.get(kind)
        elif layer is not None:
            keys = step.keys(kind, layer, kwargs["attention_mask"], q)
    if keys is None or q.shape[1] > MOST_GROUP * keys.k.shape[2]:
        step.in_order(kind, shared)
        return attn.attend(parts, shape, **kwargs)[0]
    positions, inv_freq = kwargs["position_embeddings"]
    out = ops.qkv_attention_decode(
        q,
        k,
        v,
        attn.q_norm.weight,
        None if k is None else attn.k_norm.weight,
        step.once("positions", lambda: positions.expand(*shape[:2], 1).flatten()),
        inv_freq[0, 0],
        keys.k,
        keys.v,
        keys.seq_lens,
        keys.block_table,
        counters=keys.counters,
        eps=attn.q_norm.eps,
        scale=attn.scaling,
        window=keys.window,
        ring=keys.window > 0,
    )
    if layer is not None:
        step.count(layer)
        if attn.store_full_length_kv:
            step.lend(kind, layer, keys, shared)
    return out


def _by_one_op(attn: modules.Attention, kwargs: dict[str, Any]) -> bool:
    mask = kwargs["attention_mask"]
    bounds = mask is None or (mask.dtype == torch.int32 and mask.shape[-1] <= 2)
    usual = attn.is_causal and not (attn.training and attn.attention_dropout)
    ours = attn.config._attn_implementation == base.NAME
    return bounds and usual and ours and not kwargs.get("return_shared_kv_states")


def feed_forward(
    layer: "DecoderLayer", branch: Tensor, x: Tensor
) -> tuple[Tensor | Two, Tensor] | None:
    """What the feed-forward gives and the residual that it is to be added to, after attention's
    branch and residual; None where modules are to be called."""
    closing, opening = layer.post_attention_layernorm, layer.pre_feedforward_layernorm
    mlp, shape = layer.mlp, x.shape
    if modules.why_not_read(closing, x.device) or not _are_read(x.device, closing.eps, opening):
        return None
    if not is_plain(mlp, modules.MLP) or not is_plain(mlp.act_fn, base.TanhGELU):
        return None
    branch_TD, x_TD = branch.flatten(0, 1), x.flatten(0, 1)
    if layer.enable_moe_block:
        branches = _branches(layer, x_TD)
        if branches is None:
            return None
        x_TD, two = branches.of(branch_TD, x_TD)
        return two, x_TD.view(shape)
    residual, weights = Residual(x_TD, branch_TD, closing), _weights(mlp.gate_proj, mlp.up_proj)
    if not _pay(x_TD, opening, weights, gated=len(weights) == 1):
        return None
    if len(weights) == 1:
        hidden, x_TD = residual.times(opening, weights[0], gated=True)
    else:
        up, x_TD = residual.times(opening, weights[1])
        hidden, _ = residual.times(opening, weights[0], factor=up)
    return projected(hidden.view(*shape[:2], -1), mlp.down_proj), x_TD.view(shape)


def _branches(layer: "DecoderLayer", x_TD: Tensor) -> Branches | None:
    """Of a layer with experts, the dense one and theirs; None where modules are to be called."""
    mlp, router, experts = layer.mlp, layer.router, layer.experts
    norms = (
        layer.pre_feedforward_layernorm_2,
        layer.post_feedforward_layernorm_1,
        layer.post_feedforward_layernorm_2,
    )
    eps = layer.post_attention_layernorm.eps
    plain = is_plain(router, modules.Router) and is_plain(experts, gemma4.Gemma4TextExperts)
    if not plain or not _are_read(x_TD.device, eps, *norms):
        return None
    if modules.why_not_read(router.norm, x_TD.device, eps, scaled=False) is not None:
        return None
    chosen = layer.config._experts_implementation == base.NAME and instead_of_op(experts) is None
    gate_up, down = _weights(mlp.gate_proj, mlp.up_proj), _weights(mlp.down_proj)
    logits, k = _weights(router.proj), layer.config.top_k_experts
    if not chosen or len(gate_up) != 1 or not down or not logits or k is None:
        return None
    if not isinstance(logits[0], Tensor):
        return None
    weights = experts.gate_up_proj, experts.down_proj
    branches = Branches(layer, gate_up[0], down[0], logits[0], weights, k)
    return branches if branches.pay(x_TD) else None


def gate(
    branch: Tensor, x: Tensor, closing: gemma4.Gemma4RMSNorm, linear: nn.Module, ple: Tensor
) -> tuple[Tensor, Tensor] | None:
    """x + closing(branch), and gelu(linear(that)) ple; None where modules are to be called."""
    if not are_few(x) or modules.why_not_read(closing, x.device) is not None:
        return None
    weights, x_TD = _weights(linear), x.flatten(0, 1)
    if not _pay(x_TD, closing, weights):
        return None
    residual = Residual(x_TD, branch.flatten(0, 1), closing)
    gated, x_TD = residual.times(None, weights[0], factor=ple.flatten(0, 1))
    return x_TD.view(x.shape), gated.view(ple.shape)
