"""The ops as PyTorch's dispatcher knows them: schema, eager twin, fake and gradient of each.

Plain `Library.define`/`impl` and not the `custom_op` decorator, which costs three times as much a
call. The compiled library implements the same schemas in a namespace of its own, and
`use_compiled` puts it under the public ops, for the calls that `covers` says it serves.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import checks, extension, reference
from .autocast import unaffected

NAMESPACE = "gemma4_kernels"
COMPILED = "gemma4_kernels_compiled"

SCHEMAS = (
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    "add_rms_norm(Tensor x, Tensor residual, Tensor post_weight, Tensor? next_weight,"
    " Tensor? scale, float eps) -> (Tensor, Tensor)",
    "qkv_norm_rope(Tensor q, Tensor? k, Tensor? v, Tensor q_weight, Tensor? k_weight,"
    " Tensor positions, Tensor inv_freq, float eps) -> (Tensor, Tensor, Tensor)",
    "qkv_norm_rope_cache(Tensor q, Tensor k, Tensor? v, Tensor q_weight, Tensor k_weight,"
    " Tensor positions, Tensor inv_freq, float eps, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor slots) -> Tensor",
    "geglu(Tensor gate_up) -> Tensor",
    "attention_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool causal, int window,"
    " int window_right, float softcap, Tensor? block_table, bool return_lse) -> (Tensor, Tensor)",
    "attention_prefill_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v,"
    " Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float scale, bool causal, int window, int window_right, float softcap)"
    " -> (Tensor, Tensor, Tensor)",
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens,"
    " Tensor? block_table, float scale, int window, bool ring, float softcap, bool return_lse)"
    " -> (Tensor, Tensor)",
    "moe_norm(Tensor x, Tensor weight, Tensor scale, float eps) -> (Tensor, Tensor)",
    "moe_route(Tensor logits, Tensor per_expert_scale, int k) -> (Tensor, Tensor)",
    "moe_experts(Tensor x, Tensor gate_up, Tensor down, Tensor experts, Tensor weights) -> Tensor",
    "moe_experts_backward(Tensor grad, Tensor x, Tensor gate_up, Tensor down, Tensor experts,"
    " Tensor weights) -> (Tensor, Tensor, Tensor, Tensor)",
    "ple_embed(Tensor ids, Tensor table, Tensor projected, Tensor weight, float eps) -> Tensor",
    "ple_gate(Tensor gate, Tensor ple, int layer) -> Tensor",
    "softcap(Tensor logits, float cap) -> Tensor",
    "softcap_argmax(Tensor logits, float cap) -> Tensor",
)

_library = torch.library.Library(NAMESPACE, "DEF")
_compiled_library = torch.library.Library(COMPILED, "DEF")
for _schema in SCHEMAS:
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    _compiled_library.define(_schema)

_public = getattr(torch.ops, NAMESPACE)
_HALF = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALF)
_HEAD_DIMS = (64, 128, 256, 512)
_MOST_ROUTED_EXPERTS, _MOST_ROUTES = 512, 32
# Where an op takes a dtype of its own beside x's.
_BESIDE = {
    "rms_norm": (1,),
    "add_rms_norm": (1, 2, 3, 4),
    "qkv_norm_rope": (3, 4),
    "qkv_norm_rope_cache": (3, 4),
    "moe_norm": (1, 2),
    "moe_route": (1,),
    "moe_experts": (4,),
    "ple_embed": (1, 3),
    "ple_gate": (1,),
}
# Ops whose kernels compute in 16-bit types alone, with their matrix products on tensor cores.
_ATTENTION = ("attention_prefill", "attention_prefill_backward", "attention_decode")
_HALF_OPS = (*_ATTENTION, "moe_experts")
_compiled_names: set[str] = set()


def use_compiled(names: Iterable[str], key: str = "CUDA") -> None:
    """Lets the compiled implementations of these ops serve the public ones."""
    for name in names:
        _compiled_names.add(name)
        _library.impl(name, _compiled_or_twin(name), key)


def main_tensor(name: str, args: tuple[Any, ...]) -> Tensor:
    """The argument whose device and dtype are the op's."""
    return args[2] if name == "ple_embed" else args[0]


def covers(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a compiled kernel serves this call of an op; else the eager twin does, and where it
    is this call that no kernel serves, a warning says why, once."""
    if name not in _compiled_names or not extension.covers(main_tensor(name, args).device):
        return False
    reason = why_eager(name, args)
    if reason is not None:
        warn(f"{name} runs eager torch, without a kernel: {reason}")
    return reason is None


def why_eager(name: str, args: tuple[Any, ...]) -> str | None:
    """What keeps the op's kernel, where there is one, from serving this call; None if nothing."""
    x = main_tensor(name, args)
    dtypes = _HALF if name in _HALF_OPS else _FLOATS
    if x.dtype not in dtypes:
        return f"it is for {', '.join(map(str, dtypes))}, got {x.dtype}"
    for i in _BESIDE.get(name, ()):
        if args[i] is not None and args[i].dtype not in _FLOATS:
            return f"it is for {', '.join(map(str, _FLOATS))}, got {args[i].dtype}"
    if name in _ATTENTION and x.shape[-1] not in _HEAD_DIMS:
        return f"it is for head_dim {_HEAD_DIMS}, got {x.shape[-1]}"
    if name == "ple_embed" and args[1].dtype not in (x.dtype, torch.float32):
        return f"the table is {args[1].dtype} beside {x.dtype}"
    if name == "ple_embed" and args[1].is_cpu and not x.is_cpu and not args[1].is_pinned():
        return "the table is in host memory that is not pinned"
    if name == "moe_route" and (x.shape[-1] > _MOST_ROUTED_EXPERTS or args[2] > _MOST_ROUTES):
        most = f"{_MOST_ROUTED_EXPERTS} experts and k = {_MOST_ROUTES}"
        return f"it is for at most {most}, got {x.shape[-1]} and {args[2]}"
    if name == "moe_experts":
        _, gate_up, down, *_ = args
        if down.shape[-2] % 8 or down.shape[-1] % 8:
            return f"it is for widths that are multiples of 8, got {tuple(down.shape[-2:])}"
        if not (gate_up.is_contiguous() and down.is_contiguous()):
            return "gate_up and down are not contiguous"
        if any(w.storage_offset() * w.itemsize % 16 for w in (gate_up, down)):
            return "gate_up and down do not begin on a multiple of 16 bytes"
    return None


@functools.cache
def warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=5)


def compiled(name: str, *args: Any) -> Any:
    """The compiled op; what it refuses is refused in the words of checks.py."""
    try:
        return getattr(getattr(torch.ops, COMPILED), name)(*args)
    except RuntimeError as error:
        refusal = error
    globals()[name](*args)  # the fake
    raise refusal


def _compiled_or_twin(name: str) -> Callable[..., Any]:
    twin = getattr(reference, name)

    def call(*args: Any) -> Any:
        if covers(name, args):
            return compiled(name, *args)
        return twin(*args)

    return call


def _new(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(shape, dtype=dtype or x.dtype)


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(function: Callable[..., Any]) -> Callable[..., Any]:
    name = function.__name__
    for namespace, library in ((NAMESPACE, _library), (COMPILED, _compiled_library)):
        torch.library.register_fake(f"{namespace}::{name}", function, lib=library)
    return function


@_fake
def rms_norm(x, weight, eps):
    checks.rms_norm(x, weight)
    return _new(x, *x.shape)


@_fake
def add_rms_norm(x, residual, post_weight, next_weight, scale, eps):
    checks.add_rms_norm(x, residual, post_weight, next_weight, scale)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    y_shape = (0,) if next_weight is None else x.shape
    return _new(x, *x.shape, dtype=dtype), _new(x, *y_shape, dtype=dtype)


@_fake
def qkv_norm_rope(q, k, v, q_weight, k_weight, positions, inv_freq, eps):
    checks.qkv_norm_rope(q, k, v, q_weight, k_weight, positions, inv_freq)
    kv_shape = (0,) if k is None else k.shape
    return _new(q, *q.shape), _new(q, *kv_shape), _new(q, *kv_shape)


@_fake
def qkv_norm_rope_cache(
    q, k, v, q_weight, k_weight, positions, inv_freq, eps, k_cache, v_cache, slots
):
    checks.qkv_norm_rope(q, k, v, q_weight, k_weight, positions, inv_freq)
    checks.cache_write(k, k_cache, v_cache, slots)
    return _new(q, *q.shape)


@_fake
def geglu(gate_up):
    checks.geglu(gate_up)
    return _new(gate_up, *gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_fake
def attention_prefill(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    causal,
    window,
    window_right,
    softcap,
    block_table,
    return_lse,
):
    checks.attention_prefill(
        q, k, v, cu_seqlens_q, cu_seqlens_k, window, window_right, causal, block_table
    )
    lse = _new(q, q.shape[1], q.shape[0] if return_lse else 0, dtype=_lse_dtype(q))
    return _new(q, *q.shape), lse


@_fake
def attention_prefill_backward(grad_out, grad_lse, q, k, v, *_):
    return _new(q, *q.shape), _new(k, *k.shape), _new(v, *v.shape)


@_fake
def attention_decode(
    q, k_cache, v_cache, seq_lens, block_table, scale, window, ring, softcap, return_lse
):
    checks.attention_decode(q, k_cache, v_cache, seq_lens, block_table, window, ring)
    batch, num_new, heads, _ = q.shape
    lse = _new(q, batch, heads, num_new if return_lse else 0, dtype=_lse_dtype(q))
    return _new(q, *q.shape), lse


@_fake
def moe_norm(x, weight, scale, eps):
    checks.moe_norm(x, weight, scale)
    router_dtype = torch.promote_types(x.dtype, scale.dtype)
    return _new(x, *x.shape), _new(x, *x.shape, dtype=router_dtype)


@_fake
def moe_route(logits, per_expert_scale, k):
    checks.moe_route(logits, per_expert_scale, k)
    shape = (logits.shape[0], k)
    weights = _new(logits, *shape, dtype=_lse_dtype(logits))
    return weights, _new(logits, *shape, dtype=torch.int32)


@_fake
def moe_experts(x, gate_up, down, experts, weights):
    checks.moe_experts(x, gate_up, down, experts, weights)
    return _new(x, *x.shape)


@_fake
def moe_experts_backward(grad, x, gate_up, down, experts, weights):
    return tuple(_new(t, *t.shape) for t in (x, gate_up, down, weights))


@_fake
def ple_embed(ids, table, projected, weight, eps):
    checks.ple_embed(ids, table, projected, weight)
    tokens, columns = projected.shape
    width = weight.shape[0]
    dtype = torch.promote_types(projected.dtype, table.dtype)
    return _new(projected, tokens, columns // width, width, dtype=dtype)


@_fake
def ple_gate(gate, ple, layer):
    checks.ple_gate(gate, ple, layer)
    return _new(gate, *gate.shape, dtype=torch.promote_types(gate.dtype, ple.dtype))


@_fake
def softcap(logits, cap):
    checks.softcap(logits, cap)
    return _new(logits, *logits.shape)


@_fake
def softcap_argmax(logits, cap):
    checks.softcap_argmax(logits, cap)
    return _new(logits, *logits.shape[:-1], dtype=torch.int64)


def _save(ctx: Any, values: tuple[Any, ...]) -> None:
    """Keeps tensors and plain values apart, as autograd wants, in their order."""
    ctx.is_tensor = [isinstance(value, Tensor) for value in values]
    ctx.plain = [None if isinstance(value, Tensor) else value for value in values]
    ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    pairs = zip(ctx.is_tensor, ctx.plain, strict=True)
    return [next(tensors) if is_tensor else plain for is_tensor, plain in pairs]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs)


def _recomputed(name: str) -> None:
    """Gradient of an op by running its eager twin again on the saved inputs."""
    twin = getattr(reference, name)

    @unaffected
    def backward(ctx, *grads):
        with torch.enable_grad():
            wanted = ctx.needs_input_grad
            inputs = [
                value.detach().requires_grad_(want) if isinstance(value, Tensor) else value
                for value, want in zip(_saved(ctx), wanted, strict=True)
            ]
            outputs = twin(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [value for value, want in zip(inputs, wanted, strict=True) if want],
                [torch.zeros_like(o) if g is None else g for o, g in pairs],
                allow_unused=True,
            )
        remaining = iter(found)
        return tuple(next(remaining) if want else None for want in wanted)

    _autograd(name, backward, _save_inputs)


def _autograd(name: str, backward: Callable, setup: Callable | None = None) -> None:
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=_library
    )


def _attention_prefill_save(ctx, inputs, output):
    q, k, v, *rest, table, lse = inputs
    if table is not None:
        raise RuntimeError("attention_prefill has no backward for K and V in pages (block_table)")
    if not lse:
        raise RuntimeError("attention_prefill needs return_lse=True to be differentiated")
    _save(ctx, (q, k, v, *output, *rest))


def _attention_prefill_backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, *rest = _saved(ctx)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grads = _public.attention_prefill_backward(grad_out, grad_lse, q, k, v, out, lse, *rest)
    return (*grads, *[None] * 11)


def _moe_experts_backward(ctx, grad):
    x, gate_up, down, experts, weights = _saved(ctx)
    grads = _public.moe_experts_backward(grad, x, gate_up, down, experts, weights)
    dx, d_gate_up, d_down, d_weights = grads
    return dx, d_gate_up, d_down, None, d_weights


def _softcap_save(ctx, inputs, output):
    # The output and not the input: the loss keeps one copy of the logits alive, not two.
    _save(ctx, (output, inputs[1]))


def _softcap_backward(ctx, grad):
    output, cap = _saved(ctx)
    return grad * (1 - (output / cap) ** 2), None


def _no_backward(name: str, reason: str) -> None:
    def backward(ctx, *grads):
        raise RuntimeError(f"{name} has no backward: {reason}")

    _autograd(name, backward)


for _name in ("rms_norm", "add_rms_norm", "qkv_norm_rope", "geglu", "moe_norm", "moe_route"):
    _recomputed(_name)
for _name in ("ple_embed", "ple_gate"):
    _recomputed(_name)
_autograd("attention_prefill", _attention_prefill_backward, _attention_prefill_save)
_autograd("moe_experts", _moe_experts_backward, _save_inputs)
_autograd("softcap", _softcap_backward, _softcap_save)
_no_backward("attention_decode", "it reads a cache; use attention_prefill for training")
_no_backward("softcap_argmax", "an index has no gradient")
_no_backward("attention_prefill_backward", "second derivatives are not offered")
_no_backward("moe_experts_backward", "second derivatives are not offered")
