"""What transformers calls for attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops, opset
from ...common import DECODE_TOKENS
from ...reference.attention import FUSED_ROWS
from . import base


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers calls for attention: query [B, H, N, C], key and value [B, G, S, C] to
    [B, N, H, C]. Raises ValueError for dropout and for a user's mask of integers."""
    if dropout:
        raise ValueError(f"{base.NAME} attention has no dropout, got attention_dropout {dropout}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = softcap or 0.0
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        return _masked(module, query, key, value, attention_mask, scale, softcap), None
    packed_rows = attention_mask is not None and attention_mask.shape[-1] > 2
    # For more queries a mask would be large, and the op leaves out the keys that none of them sees.
    short = query.shape[2] <= FUSED_ROWS
    if not base.takes_ops(query) and short and is_causal and not packed_rows and not softcap:
        seen = _seen(query, key, attention_mask, sliding_window or 0)
        return _by_torch(query, key, value, seen, scale), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    starts_at_0 = attention_mask is None or attention_mask.shape[-1] == 1
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if is_causal and starts_at_0 and q.shape[1] <= DECODE_TOKENS and not training:
        if attention_mask is None:
            seq_lens = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
        else:
            seq_lens = attention_mask[:, 0, -1, 0].contiguous()
        window = sliding_window or 0
        out, _ = ops.attention_decode(
            q, k, v, seq_lens, scale=scale, window=window, softcap=softcap, return_lse=False
        )
        return out, None
    cu_q, cu_k = _sequences(q, k, attention_mask)
    out, _ = ops.attention_prefill(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_q,
        cu_k,
        q.shape[1],
        k.shape[1],
        scale=scale,
        causal=is_causal,
        window=(sliding_window or 0) if is_causal else 0,
        softcap=softcap,
    )
    return out.view(q.shape), None


def _seen(query: Tensor, key: Tensor, bounds: Tensor | None, window: int) -> Tensor | None:
    """The keys that `bounds` let each query see, [B, 1, N, S] or [N, S]; None if it is all."""
    queries, keys = query.shape[2], key.shape[2]
    narrow = 0 < window < keys
    if bounds is None and queries == 1 and not narrow:
        return None
    places = torch.arange(keys, dtype=torch.int32, device=query.device)
    end = places[keys - queries :, None] + 1 if bounds is None else bounds[..., -1:]
    seen = places < end
    if narrow:
        seen &= places >= end - window
    if bounds is not None and bounds.shape[-1] == 2:
        seen &= places >= bounds[..., :1]
    return seen


def _sequences(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """cu_seqlens of the queries and of the keys of all rows, made on the device.

    With first and last keys a row is three sequences: its padding, its tokens, and keys that are
    still to come, which no query sees.
    """
    (batch, queries), keys = q.shape[:2], k.shape[1]
    if mask is None:
        rows = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        return rows * queries, rows * keys
    row = torch.arange(batch, dtype=torch.int32, device=q.device)
    if mask.shape[-1] > 2:
        starts_k = mask[:, 0, 0]
        starts_q = (starts_k - (keys - queries)).clamp(min=0)  # queries are the last of a row
    else:
        starts_q, starts_k = _starts_of_padded(mask, queries)

    def all_rows(starts: Tensor, length: int) -> Tensor:
        starts = (starts + row[:, None] * length).flatten()
        return F.pad(starts, (0, 1), value=batch * length).int()

    return all_rows(starts_q, queries), all_rows(starts_k, keys)


def _starts_of_padded(bounds: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    end = bounds[:, 0, -1, -1]
    begin = bounds[:, 0, 0, 0] if bounds.shape[-1] == 2 else torch.zeros_like(end)
    # Queries before the first token are padding; the last query stands at key `end` - 1.
    padding = (begin - (end - queries)).clamp(min=0, max=queries)
    zero = torch.zeros_like(end)
    return torch.stack([zero, padding, zero + queries], 1), torch.stack([zero, begin, end], 1)


@torch.compiler.assume_constant_result  # so that a compiler calls it, while it traces
def _warn(sentence: str) -> None:
    opset.warn(sentence)


def _masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention under a mask of any form, by torch."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"an attention_mask of 4 dimensions must be bool or floating-point, got {mask.dtype}"
        )
    _warn(
        f"{type(module).__name__} runs torch's attention, without a kernel: its mask is not causal "
        "with padding at the ends (one of your own, images, a bidirectional model, or what a "
        "compiler cannot tell from packed rows: then give an attention_mask)"
    )
    if softcap:
        raise ValueError(f"{base.NAME} attention with a softcap takes causal masks alone")
    return _by_torch(query, key, value, mask[..., : key.shape[2]], scale)


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    gqa = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous()
