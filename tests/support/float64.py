"""The formula of each op in float64, as the documentation states it: no blocks, no tricks.

With a `dtype`, every value that the Gemma 4 reference keeps in its own dtype is rounded to it;
the result then differs from the exact one by the error nobody can avoid. `wide` is the dtype of
what is promoted, where x meets another.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma4_kernels.packed import PackedWeight

from . import packed


def _formula(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the formula its tensors on the CPU, the floating ones in float64, packed ones dense."""

    def convert(value: Any) -> Any:
        if isinstance(value, PackedWeight):
            return packed.dense(value.to("cpu"))
        if not isinstance(value, Tensor):
            return value
        return (value.double() if value.is_floating_point() else value).cpu()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(
            *[convert(value) for value in args],
            **{name: convert(value) for name, value in kwargs.items()},
        )

    return call


def _round(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype).double()


@_formula
def rms_norm(x, weight, eps, dtype=None):
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    y = x / (mean_square + eps).sqrt()
    return _round(y if weight is None else y * weight, dtype)


@_formula
def add_rms_norm(x, residual, post_weight, next_weight, scale, eps, dtype=None, wide=None):
    wide = wide or dtype
    residual = _round(residual + rms_norm(x, post_weight, eps, dtype), wide)
    if scale is not None:
        residual = _round(residual * scale, wide)
    y = None if next_weight is None else rms_norm(residual, next_weight, eps, wide)
    return residual, y


@_formula
def moe_norm(x, weight, scale, eps, dtype=None, wide=None):
    wide = wide or dtype
    router_x = _round(rms_norm(x, None, eps, dtype) * scale, wide)
    return rms_norm(x, weight, eps, dtype), _round(router_x / x.shape[-1] ** 0.5, wide)


@_formula
def rope(x, positions, inv_freq, dtype=None):
    """x [T, H, C]; turns the pair (i, i + C/2) of token t by positions[t] inv_freq[i]."""
    out = x.clone()
    half = x.shape[-1] // 2
    for i in range(half):
        angle = positions * inv_freq[i]
        if dtype is not None:
            angle = angle.float().double()
        cos, sin = (_round(f(angle), dtype)[:, None] for f in (torch.cos, torch.sin))
        a, b = x[:, :, i], x[:, :, i + half]
        out[:, :, i] = _round(_round(a * cos, dtype) - _round(b * sin, dtype), dtype)
        out[:, :, i + half] = _round(_round(b * cos, dtype) + _round(a * sin, dtype), dtype)
    return out


@_formula
def qkv_norm_rope(q, k, v, q_weight, k_weight, positions, inv_freq, eps, dtype=None):
    new_q = rope(rms_norm(q, q_weight, eps, dtype), positions, inv_freq, dtype)
    if k is None:
        return new_q, None, None
    new_k = rope(rms_norm(k, k_weight, eps, dtype), positions, inv_freq, dtype)
    return new_q, new_k, rms_norm(k if v is None else v, None, eps, dtype)


@_formula
def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@_formula
def geglu(gate_up, dtype=None):
    width = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :width], gate_up[..., width:]
    return _round(_round(gelu_tanh(gate), dtype) * up, dtype)


@_formula
def linear_packed(x, weight, dtype=None):
    return _round(x @ _round(weight, dtype).T, dtype)


@_formula
def linear_small(
    x, weight, residual, post_weight, scale, norm_weight, factor, x_weight, other, other_weight,
    eps, gated, dtype=None, wide=None,
):  # fmt: skip
    if other is not None:
        x = rms_norm(x, x_weight, eps, dtype) + rms_norm(other, other_weight, eps, dtype)
        x = _round(x, dtype)
    a = new_residual = x
    if residual is not None:
        a, _ = add_rms_norm(x, residual, post_weight, None, scale, eps, dtype, wide)
        new_residual = a
    if norm_weight is not None:
        a = rms_norm(a, norm_weight, eps, wide or dtype)
    y = _round(_round(a, dtype) @ _round(weight, dtype).T, dtype)
    if gated:
        y = geglu(y, dtype)
    elif factor is not None:
        y = _round(_round(gelu_tanh(y), dtype) * factor, dtype)
    return y, new_residual


def sees(query: int, key: int, causal: bool, window: int, window_right: int) -> bool:
    """Whether the query at position `query` sees the key at position `key`."""
    if causal and key > query:
        return False
    if not causal and window_right >= 0 and key > query + window_right:
        return False
    return window == 0 or key > query - window


@_formula
def attention(
    q,
    k,
    v,
    *,
    scale=1.0,
    causal=True,
    window=0,
    window_right=-1,
    softcap=0.0,
    dtype=None,
):
    """One sequence, q [N, H, C] being the tail of k, v [S, G, C]: out [N, H, C], lse [H, N]."""
    num_queries, heads, _ = q.shape
    num_keys, kv_heads, _ = k.shape
    kv_head = [h // (heads // kv_heads) for h in range(heads)]
    outs, lses = [], []
    for i in range(num_queries):
        position = num_keys - num_queries + i
        seen = [j for j in range(num_keys) if sees(position, j, causal, window, window_right)]
        if not seen:
            outs.append(torch.zeros_like(q[i]))
            lses.append(torch.full((heads,), -math.inf, dtype=torch.float64))
            continue
        score = torch.einsum("hc,jhc->hj", q[i], k[seen][:, kv_head]) * scale
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        top = score.amax(1, keepdim=True)
        p = torch.exp(score - top)
        total = p.sum(1, keepdim=True)
        out = torch.einsum("hj,jhc->hc", _round(p, dtype), v[seen][:, kv_head]) / total
        outs.append(_round(out, dtype))
        lses.append((top + total.log())[:, 0])
    if not outs:
        return q * 0, q.new_zeros(heads, 0)
    return torch.stack(outs), torch.stack(lses, 1)


@_formula
def e4m3(x):
    """Codes and scales of rows [..., C], as numbers; a quotient is rounded to fp32 first."""
    codes = torch.arange(127)
    sizes = torch.where(codes < 8, codes / 8 * 2**-6, (1 + codes % 8 / 8) * 2.0 ** (codes // 8 - 7))
    scales = (x.abs().amax(-1) / sizes[-1]).float().double()
    scales = scales.where(scales > 0, 1.0)
    quotients = (x / scales[..., None]).float().double()
    distances = (quotients.abs()[..., None] - sizes.double()).abs()
    nearest = distances == distances.amin(-1, keepdim=True)
    nearest = (nearest * (2 - codes % 2)).argmax(-1)  # of two alike the even one
    return sizes.double()[nearest] * quotients.sign(), scales


@_formula
def qkv_attention_decode(
    q, k, v, q_weight, k_weight, positions, inv_freq, keys, values, eps, dtype=None, **options
):
    """Behind the keys and values [S, G, C] that each row has already; also the new k and v."""
    q, k, v = qkv_norm_rope(q, k, v, q_weight, k_weight, positions, inv_freq, eps, dtype)
    rows = []
    for b, (old_k, old_v) in enumerate(zip(keys, values, strict=True)):
        row_k, row_v = old_k.double().cpu(), old_v.double().cpu()
        if k is not None:
            row_k, row_v = torch.cat([row_k, k[b : b + 1]]), torch.cat([row_v, v[b : b + 1]])
        rows.append(attention(q[b : b + 1], row_k, row_v, **options, dtype=dtype)[0])
    return torch.cat(rows), k, v


@_formula
def attention_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """Sequence b owns rows cu[b] .. cu[b + 1] - 1 of q, and of k and v."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    results = [
        attention(
            q[starts_q[b] : starts_q[b + 1]],
            k[starts_k[b] : starts_k[b + 1]],
            v[starts_k[b] : starts_k[b + 1]],
            **options,
        )
        for b in range(len(starts_q) - 1)
    ]
    if not results:
        return q * 0, q.new_zeros(q.shape[1], 0)
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results], 1)


@_formula
def moe_route(logits, per_expert_scale, k):
    """The choice is made among the exact probabilities; equal logits go by index."""
    weights, experts = [], []
    for row in logits:
        p = torch.exp(row - row.max())
        p = p / p.sum()
        chosen = sorted(range(len(row)), key=lambda e: (-row[e].item(), e))[:k]
        experts.append(chosen)
        weights.append(p[chosen] / p[chosen].sum() * per_expert_scale[chosen])
    if not experts:
        return logits.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int32)
    return torch.stack(weights), torch.tensor(experts, dtype=torch.int32)


@_formula
def moe_experts(x, gate_up, down, experts, weights, dtype=None):
    rows = []
    for t, chosen in enumerate(experts.tolist()):
        row = torch.zeros_like(x[t])
        for slot, e in enumerate(chosen):
            if 0 <= e < down.shape[0]:
                hidden = geglu(_round(_round(gate_up[e], dtype) @ x[t], dtype), dtype)
                made = _round(_round(down[e], dtype) @ hidden, dtype)
                row = row + weights[t, slot] * made
        rows.append(_round(row, dtype))
    return torch.stack(rows) if rows else torch.zeros_like(x)


@_formula
def moe_open(
    x, residual, post_weight, norm_weight, gate_up, expert_weight, router_scale, router, eps,
    dtype=None, wide=None,
):  # fmt: skip
    wide = wide or dtype
    r, y = add_rms_norm(x, residual, post_weight, norm_weight, None, eps, dtype, wide)
    expert_x, router_x = moe_norm(r, expert_weight, router_scale, eps, wide)
    hidden = geglu(_round(_round(y, dtype) @ _round(gate_up, dtype).T, dtype), dtype)
    return hidden, _round(_round(router_x, dtype) @ router.T, dtype), expert_x, r


@_formula
def moe_experts_small(x, gate_up, down, logits, per_expert_scale, k, dense_x, dense, dtype=None):
    weights, experts = moe_route(logits, per_expert_scale, k)
    y = moe_experts(x, gate_up, down, experts, weights, dtype)
    return y, _round(dense_x @ _round(dense, dtype).T, dtype)


@_formula
def ple_embed(ids, table, projected, weight, eps, dtype=None, table_dtype=None, wide=None):
    table_dtype, wide = table_dtype or dtype, wide or dtype
    width = weight.shape[0]
    factor = _round(torch.tensor(math.sqrt(width), dtype=torch.float64), table_dtype)
    tokens = torch.stack(
        [table[i] if 0 <= i < table.shape[0] else torch.zeros_like(table[0]) for i in ids.tolist()]
        or [table[0]]
    )[: len(ids)]
    shape = (len(ids), table.shape[1] // width, width)
    tokens = _round(tokens * factor, table_dtype).reshape(shape)
    context = rms_norm(projected.reshape(shape), weight, eps, dtype)
    return _round(_round(context + tokens, wide) * 0.5**0.5, wide)


@_formula
def ple_gate(gate, ple, layer, dtype=None, wide=None):
    return _round(_round(gelu_tanh(gate), dtype) * ple[:, layer], wide or dtype)


def philox(seed, low, high):
    """Philox 4x32-10 of the counter (low, high, high >> 32, 0) under a key of 64 bits."""
    word = 0xFFFFFFFF
    c = [low & word, high & word, high >> 32 & word, 0]
    key = [seed & word, seed >> 32 & word]
    for _ in range(10):
        x, y = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [y >> 32 ^ c[1] ^ key[0], y & word, x >> 32 ^ c[3] ^ key[1], x & word]
        key = [key[0] + 0x9E3779B9 & word, key[1] + 0xBB67AE85 & word]
    return c


def gumbel(seed, position, token):
    uniform = (philox(seed, token // 4, position)[token % 4] + 0.5) / 2**32
    return -math.log(-math.log1p(-uniform))


@_formula
def sample(logits, seeds, positions, cap, temperature, top_k=0, top_p=1.0, min_p=0.0, slack=0.0):
    """Of each row the tokens that may be chosen where logits are right up to `slack`, and all else
    up to what fp32 costs."""
    found = []
    for row, seed, position in zip(logits, seeds.tolist(), positions.tolist(), strict=True):
        x = softcap(row, cap) if cap else row
        order = sorted(range(len(x)), key=lambda i: (-x[i].item(), i))
        if temperature == 0 or top_k == 1:
            found.append(
                {i for i in order if x[i] >= x[order[0]] - slack and (slack or i == order[0])}
            )
            continue
        kept = order[: top_k or len(x)]
        error = 2 * slack / temperature
        p = torch.softmax(x[kept] / temperature, 0)
        before = (p.cumsum(0) - p).tolist()
        possible = {i for i in order if x[i] >= x[kept[-1]] - slack} if slack else set(kept)
        sure = {i for i in kept if not slack or len(kept) == len(x) or x[i] > x[kept[-1]] + slack}
        for i, mass, better in zip(kept, (p / p[0]).tolist(), before, strict=True):
            if better >= top_p - 1e-5 - error or mass < min_p * (1 + 1e-5 + error):
                sure.discard(i)
            if better >= top_p + 1e-5 + error or mass < min_p * (1 - 1e-5 - error):
                possible.discard(i)
        sure.add(order[0])
        score = {i: x[i].item() / temperature + gumbel(seed, position, i) for i in possible | sure}
        least = max(score[i] for i in sure) - 3e-5 - error
        found.append({i for i in possible | sure if score[i] >= least})
    return found


@_formula
def softcap(logits, cap, dtype=None):
    return _round(_round(torch.tanh(_round(logits / cap, dtype)), dtype) * cap, dtype)


@_formula
def softcap_cross_entropy(logits, targets, cap):
    """NaN where the target is no token; 0 and 0 where it is -100."""
    nll, lse = [], []
    for row, target in zip(logits, targets.tolist(), strict=True):
        x = softcap(row, cap) if cap else row
        total = x.max() + (x - x.max()).exp().sum().log()
        known = 0 <= target < len(row)
        cost = total - x[target] if known else total * math.nan
        nll.append(total * 0 if target == -100 else cost)
        lse.append(total * 0 if target == -100 else total)
    if not nll:
        return logits.sum(-1), logits.sum(-1)
    return torch.stack(nll), torch.stack(lse)
