"""What else computes an op, as far as it is installed: the same arithmetic by other code.

A peer prepares its layout outside the timing. What it cannot do, it raises, and that is recorded.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemma4_kernels import reference

Call = Callable[[], Any]
Prepare = Callable[[list[Any], dict[str, Any]], Call]
# Their eager twins are tensor operations alone, without values read on the host.
COMPILABLE = ("rms_norm", "add_rms_norm", "qkv_norm_rope", "geglu")
COMPILABLE += ("linear_small", "moe_norm", "moe_open", "moe_route", "ple_gate")
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
SDPA_OPS = ("attention_prefill", "attention_prefill_backward", "attention_decode")


def of(op: str, device: torch.device) -> Iterator[tuple[str, Prepare]]:
    """The peers of an op by name."""
    yield "eager", lambda args, inputs: lambda: getattr(reference, op)(*args)
    if device.type == "cuda" and op in (*COMPILABLE, "softcap_argmax"):
        yield "torch.compile", lambda args, inputs: lambda: _compiled(op)(*args)
    if op in ("attention_prefill", "attention_decode"):
        for backend in BACKENDS:
            yield f"sdpa {backend.name.lower()}", lambda a, i, b=backend: _sdpa(op, i, b)
    if op == "attention_prefill_backward":
        for backend in BACKENDS:
            yield f"sdpa {backend.name.lower()}", lambda a, i, b=backend: _sdpa_backward(i, b)
    if device.type == "cuda" and op == "attention_prefill":
        yield "flex_attention", lambda args, inputs: _flex(inputs)
        yield "flash-attn", lambda args, inputs: _flash_prefill(inputs)
    if device.type == "cuda" and op == "attention_decode":
        yield "flash-attn", lambda args, inputs: _flash_decode(inputs)
    if op == "moe_experts":
        yield "torch grouped_mm", lambda args, inputs: _grouped_mm(inputs)
    if device.type == "cuda" and op in ("rms_norm", "geglu"):
        yield "Liger", lambda args, inputs: _liger(op, inputs)


def difference(ours: Any, theirs: Any) -> float | None:
    """The largest difference of the first results, over the largest value; None for indices.

    Raises RuntimeError where it is more than roundings explain: then a time would say nothing.
    """
    ours, theirs = (x[0] if isinstance(x, tuple) else x for x in (ours, theirs))
    if not ours.is_floating_point():
        return None
    error = (ours.float().flatten() - theirs.float().flatten()).abs().max()
    relative = float(error / ours.float().abs().max())
    if not relative < 0.05:
        raise RuntimeError(f"its result differs by {relative:.2g} of the largest value")
    return round(relative, 6)


@cache
def _compiled(op: str) -> Callable[..., Any]:
    return torch.compile(getattr(reference, op), dynamic=False)


def _mask(new: int, keys: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(keys - new, keys, device=device)[:, None] - torch.arange(
        keys, device=device
    )
    return (distance >= 0) & (distance < (window or keys + 1))


def _sdpa_arguments(op: str, inputs: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Full attention without a mask of its own; a window needs one, of [tokens, tokens]. A ring
    that holds its window alone needs none, and the lengths of a batch are alike."""
    if op != "attention_decode":
        q, k, v = (inputs[name].transpose(0, 1)[None] for name in "qkv")
        window = inputs["window"]
        needs_mask = window and window < q.shape[2]
        mask = _mask(q.shape[2], k.shape[2], window, q.device) if needs_mask else None
        causal = mask is None
    else:
        keys = int(inputs["seq_lens"][0])
        q = inputs["q"].transpose(1, 2)
        k, v = (inputs[name][:, :keys].transpose(1, 2) for name in ("k_cache", "v_cache"))
        mask, causal = None, False
    return [q, k, v], dict(attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=True)


def sdpa_takes(op: str, inputs: dict[str, Any]) -> str:
    """The backend that scaled_dot_product_attention chooses where it is left the choice."""
    if op == "attention_prefill_backward":
        inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in "qkv"}
    qkv, options = _sdpa_arguments(op, inputs)
    return SDPBackend(torch._fused_sdp_choice(*qkv, **options)).name.lower()


def _sdpa(op: str, inputs: dict[str, Any], backend: SDPBackend) -> Call:
    qkv, options = _sdpa_arguments(op, inputs)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*qkv, **options)
        return out.transpose(1, 2)

    return call


def _sdpa_backward(inputs: dict[str, Any], backend: SDPBackend) -> Call:
    leaves = {name: inputs[name].detach().requires_grad_() for name in "qkv"}
    with torch.enable_grad():
        out = _sdpa("attention_prefill", inputs | leaves, backend)()
    grad = inputs["grad_out"][None]
    return lambda: torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)


@cache
def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(inputs: dict[str, Any]) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = (inputs[name].transpose(0, 1)[None] for name in "qkv")
    n, window = q.shape[2], inputs["window"] or q.shape[2]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    blocks = create_block_mask(sees, None, None, n, n, device=q.device)
    flex = _flex_attention()
    return lambda: flex(q, k, v, block_mask=blocks, scale=1.0, enable_gqa=True).transpose(1, 2)


def _flash_window(inputs: dict[str, Any]) -> tuple[int, int]:
    return (inputs["window"] - 1 if inputs["window"] else -1, 0)


def _flash_prefill(inputs: dict[str, Any]) -> Call:
    from flash_attn import flash_attn_varlen_func

    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    args = [inputs[name] for name in names]
    options = dict(softmax_scale=1.0, causal=True, window_size=_flash_window(inputs))
    return lambda: flash_attn_varlen_func(*args, **options)


def _flash_decode(inputs: dict[str, Any]) -> Call:
    """A ring of the window is a cache that holds these keys alone: nothing is left to mask."""
    from flash_attn import flash_attn_with_kvcache

    q, k, v = (inputs[name] for name in ("q", "k_cache", "v_cache"))
    lens = inputs["seq_lens"].clamp(max=k.shape[1])
    return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, softmax_scale=1.0)


def _grouped_mm(inputs: dict[str, Any]) -> Call:
    """Tokens sorted by expert, two grouped products, and a weighted sum by index_add."""
    x, gate_up, down, experts, weights = (
        inputs[name] for name in ("x", "gate_up", "down", "experts", "weights")
    )
    k, num_experts = experts.shape[1], gate_up.shape[0]
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm

    def call() -> Tensor:
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        ends = torch.searchsorted(
            flat[order], torch.arange(num_experts, device=x.device, dtype=flat.dtype), right=True
        )
        token, offs = order // k, ends.to(torch.int32)
        gate, up = grouped_mm(x[token], gate_up.transpose(1, 2), offs=offs).chunk(2, -1)
        out = grouped_mm(F.gelu(gate, approximate="tanh") * up, down.transpose(1, 2), offs=offs)
        weighed = out * weights.flatten()[order, None].to(out.dtype)
        return torch.zeros_like(x).index_add_(0, token, weighed)

    return call


def _liger(op: str, inputs: dict[str, Any]) -> Call:
    if op == "rms_norm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        x, weight = inputs["x"], inputs["weight"]
        return lambda: LigerRMSNormFunction.apply(x, weight, 1e-6)
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    gate, up = (half.contiguous() for half in inputs["gate_up"].chunk(2, -1))
    return lambda: LigerGELUMulFunction.apply(gate, up)
