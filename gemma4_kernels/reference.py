"""The eager twin of each op: plain torch, differentiable, right on every device.

These are what runs where no kernel is compiled, what defines the numbers, and what a reader of a
kernel should read first; over 400 lines, so that all of them stand in one place. Arithmetic is fp32
(fp64 for fp64 inputs) inside and cast where the Gemma 4 reference casts; where dtypes meet, as they
do under autocast, they are promoted as there.

Shape letters: T tokens (all sequences, packed), B sequences, N new tokens of a sequence, S key
positions, D model width, H query heads, G key-value heads, R = H / G, C head channels, F
feed-forward width, E experts, K experts per token, P PLE width, L layers, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Attention scores held at once by `attention_prefill`, in elements: bounds its memory whatever the
# prompt, and large enough for full-speed matrix products.
SCORE_ELEMENTS = 1 << 22
# Query rows per call of torch's fused CPU attention, which blocks over keys itself.
FUSED_ROWS = 256


def _finite(x: Tensor) -> Tensor:
    """fp16 as it is, but no further than its largest number, which activations of checkpoints made
    in bf16 pass; NaN stays."""
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most) if x.dtype == torch.float16 else x


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    # torch's own: fp32 inside, weight multiplied before the one cast, as Gemma 4 has it.
    if weight is None or weight.dtype == x.dtype:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    next_weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    residual = residual + _rms_norm(x, post_weight, eps)
    if scale is not None:
        # In place, in the reference: the dtype stays.
        residual = (residual * scale).to(residual.dtype)
    residual = residual.contiguous()
    if next_weight is None:
        return residual, residual.new_empty(0)
    return residual, _rms_norm(residual, next_weight, eps)


def qkv_norm_rope(
    q_THC: Tensor,
    k_TGC: Tensor | None,
    v_TGC: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    positions_T: Tensor,
    inv_freq: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q_THC.dtype
    inner = torch.promote_types(dtype, q_weight.dtype)
    if k_weight is not None:
        inner = torch.promote_types(inner, k_weight.dtype)
    if inner != dtype:  # weights wider than q leave one rounding, at the end
        wide_k = None if k_TGC is None else k_TGC.to(inner)
        wide_v = None if v_TGC is None else v_TGC.to(inner)
        args = (q_THC.to(inner), wide_k, wide_v, q_weight, k_weight, positions_T, inv_freq, eps)
        q, k, v = qkv_norm_rope(*args)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    angle = positions_T[:, None, None, None] * inv_freq
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    sin = torch.cat([-sin, sin], 2)

    def norm_and_rotate(x: Tensor, weight: Tensor | None) -> Tensor:
        # Pairs are (i, i + C/2): the two halves of a head, swapped by the flip.
        halves = _rms_norm(x, weight, eps).unflatten(-1, (2, -1))
        return (halves * cos + halves.flip(2) * sin).flatten(2)

    q = norm_and_rotate(q_THC, q_weight)
    if k_TGC is None:
        return q, q.new_empty(0), q.new_empty(0)
    # V is made from the raw k (k_eq_v): it sees neither k's weight nor the rotation.
    v = _rms_norm(k_TGC if v_TGC is None else v_TGC, None, eps)
    return q, norm_and_rotate(k_TGC, k_weight), v


def qkv_norm_rope_cache(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    positions_T: Tensor,
    inv_freq: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
) -> Tensor:
    q, k, v = qkv_norm_rope(q_THC, k_TGC, v_TGC, q_weight, k_weight, positions_T, inv_freq, eps)
    slots_T = slots_T.long()
    lowest, highest = _range(slots_T)
    if highest >= k_cache.shape[:-2].numel():
        raise ValueError(
            f"slots must lie below the cache's {k_cache.shape[:-2].numel()} slots, or be negative "
            f"for none, got {highest}"
        )
    if lowest < 0:
        keep = slots_T >= 0
        slots_T, k, v = slots_T[keep], k[keep], v[keep]
    k_cache.flatten(0, -3).index_copy_(0, slots_T, k)
    v_cache.flatten(0, -3).index_copy_(0, slots_T, v)
    return q


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return _finite(F.gelu(gate, approximate="tanh") * up).contiguous()


def linear_small(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    factor: Tensor | None,
    eps: float,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    a, new_residual = x, x.new_empty(0)
    if residual is not None:
        assert post_weight is not None  # they come together
        a, _ = add_rms_norm(x, residual, post_weight, None, scale, eps)
        new_residual = a
    if norm_weight is not None:
        a = rms_norm(a, norm_weight, eps)
    y = F.linear(a.to(weight.dtype), weight)
    if gated:
        y = geglu(y)
    elif factor is not None:
        y = ple_gate(y, factor.unsqueeze(1), 0)
    return y, new_residual


def _visible(
    first: int, last: int, num_keys: int, window: int, right: int | None
) -> tuple[int, int]:
    """The keys [lo, hi) that some query at key positions first..last - 1 can see."""
    lo = max(0, first - window + 1) if window else 0
    hi = num_keys if right is None else min(num_keys, last + right)
    return min(lo, max(hi, 0)), max(hi, 0)


def _mask(
    first: int, last: int, lo: int, hi: int, window: int, right: int | None, device: torch.device
) -> Tensor | None:
    """True where query i of first..last - 1 sees key j of lo..hi - 1; None if all see all."""
    inside_right = right is None or hi - 1 <= first + right
    inside_left = not window or lo > last - 1 - window
    if inside_right and inside_left:
        return None
    distance = torch.arange(first, last, device=device)[:, None] - torch.arange(
        lo, hi, device=device
    )
    mask = torch.ones_like(distance, dtype=torch.bool)
    if right is not None:
        mask &= distance >= -right
    if window:
        mask &= distance < window
    return mask


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """[G, R, rows, keys] scores, capped and masked, from q [G, R, rows, C] and k [keys, G, C]."""
    s = torch.matmul(q.flatten(1, 2), k.permute(1, 2, 0)).unflatten(1, q.shape[1:3])
    if scale != 1.0:
        s = s * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    return s if mask is None else s.masked_fill(~mask, -math.inf)


def _probabilities(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the keys and its log-sum-exp; a row that sees no key gives 0 and -inf.

    The largest probability is exp(max - lse) and at least 1 / keys, so it gives lse exactly enough
    and saves the passes of logsumexp.
    """
    highest = scores.amax(-1)
    blind = highest == -math.inf
    p = scores.softmax(-1).masked_fill_(blind.unsqueeze(-1), 0.0)
    return p, (highest - p.amax(-1).log()).masked_fill_(blind, -math.inf)


def _grouped(x_THC: Tensor, kv_heads: int) -> Tensor:
    """[T, H, C] as [G, R, T, C]: the query heads that share a KV head beside each other."""
    return x_THC.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _ungrouped(x_GRTC: Tensor) -> Tensor:
    return x_GRTC.permute(2, 0, 1, 3).flatten(1, 2)


def _range(x: Tensor) -> tuple[int, int]:
    """The least and the largest of some integers, -1 if there are none."""
    if not x.numel():
        return -1, -1
    least, largest = x.aminmax()
    return int(least), int(largest)


def _offsets(name: str, cu_seqlens: Tensor, max_seqlen: int) -> list[int]:
    """cu_seqlens_q or _k (q or k the name), read on the host."""
    cu = cu_seqlens.tolist()
    if cu[0] != 0:
        raise ValueError(f"cu_seqlens_{name} must begin at 0, got {cu[0]}")
    for begin, end in itertools.pairwise(cu):
        if end < begin:
            raise ValueError(f"cu_seqlens_{name} must not decrease, got {end} after {begin}")
        if end - begin > max_seqlen:
            raise ValueError(
                f"max_seqlen_{name} must not fall below the longest sequence, {end - begin}, "
                f"got {max_seqlen}"
            )
    return cu


def _sequences(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_queries: int,
    num_keys: int | None,
) -> Iterator[tuple[int, slice, slice]]:
    """(b, its queries, its keys) for each sequence that has a query; reads the two on the host."""
    cu_q = _offsets("q", cu_seqlens_q, max_seqlen_q)
    cu_k = _offsets("k", cu_seqlens_k, max_seqlen_k)
    if cu_q[-1] != num_queries:
        raise ValueError(
            f"cu_seqlens_q must end at the number of queries, {num_queries}, got {cu_q[-1]}"
        )
    if num_keys is not None and cu_k[-1] > num_keys:
        raise ValueError(
            f"cu_seqlens_k must end within the number of keys, {num_keys}, got {cu_k[-1]}"
        )
    for b in range(len(cu_q) - 1):
        if cu_q[b + 1] > cu_q[b]:
            yield b, slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])


def _blocks(
    queries: slice, num_keys: int, rows: int, causal: bool, window: int, window_right: int
) -> Iterator[tuple[slice, int, int, int, int | None]]:
    """(its queries, position of the first, keys [lo, hi), right bound) of each block of `rows`
    queries that sees a key. Positions count keys: the queries are the tail of the keys."""
    right = 0 if causal else None if window_right < 0 else window_right
    for begin in range(queries.start, queries.stop, rows):
        block = slice(begin, min(begin + rows, queries.stop))
        first = num_keys - (queries.stop - begin)
        lo, hi = _visible(first, first + block.stop - begin, num_keys, window, right)
        if lo < hi:
            yield block, first, lo, hi, right


def _pages(cache: Tensor, pages: list[int], num_keys: int) -> Tensor:
    """The first num_keys keys [S, G, C] on `pages`; a view where the pages lie in order."""
    if min(pages) < 0 or max(pages) >= len(cache):
        raise ValueError(
            f"block_table must lie in 0..{len(cache) - 1} where it is used, got {pages}"
        )
    if pages == list(range(pages[0], pages[0] + len(pages))):
        return cache[pages[0] : pages[0] + len(pages)].flatten(0, 1)[:num_keys]
    return cache[torch.tensor(pages, device=cache.device)].flatten(0, 1)[:num_keys]


def attention_prefill(
    q_THC: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int,
    window_right: int,
    softcap: float,
    block_table: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(q_THC.dtype, torch.float32)
    kv_heads = k.shape[-2]
    fused = q_THC.is_cpu and not softcap and not return_lse
    out_THC = torch.zeros_like(q_THC, memory_format=torch.contiguous_format)
    lse_HT = q_THC.new_full(
        (q_THC.shape[1], q_THC.shape[0] if return_lse else 0), -math.inf, dtype=acc
    )
    held = k.shape[0] if block_table is None else None
    cu_and_longest = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    for b, queries, keys in _sequences(*cu_and_longest, q_THC.shape[0], held):
        num_keys = keys.stop - keys.start
        if num_keys == 0:
            continue
        if block_table is not None and num_keys > block_table.shape[1] * k.shape[1]:
            raise ValueError(
                f"block_table must have pages for the {num_keys} keys of sequence {b}, got "
                f"{block_table.shape[1]} of {k.shape[1]}"
            )
        if block_table is None:
            k_SGC, v_SGC = k[keys], v[keys]
        else:
            pages = block_table[b, : -(-num_keys // k.shape[1])].tolist()
            k_SGC, v_SGC = _pages(k, pages, num_keys), _pages(v, pages, num_keys)
        if not fused:
            k_SGC, v_SGC = k_SGC.to(acc), v_SGC.to(acc)
        scores_of_row = max(num_keys * q_THC.shape[1], 1)
        rows = FUSED_ROWS if fused else max(16, SCORE_ELEMENTS // scores_of_row)
        blocks = _blocks(queries, num_keys, rows, causal, window, window_right)
        for block, first, lo, hi, right in blocks:
            last = first + block.stop - block.start
            mask = _mask(first, last, lo, hi, window, right, q_THC.device)
            if fused and first >= 0:
                out_THC[block] = (
                    F.scaled_dot_product_attention(
                        q_THC[block].transpose(0, 1)[None],
                        k_SGC[lo:hi].transpose(0, 1)[None],
                        v_SGC[lo:hi].transpose(0, 1)[None],
                        mask,
                        scale=scale,
                        enable_gqa=kv_heads != q_THC.shape[1],
                    )[0]
                ).transpose(0, 1)
                continue
            q_GRTC = _grouped(q_THC[block].to(acc), kv_heads)
            p, lse = _probabilities(_scores(q_GRTC, k_SGC[lo:hi].to(acc), mask, scale, softcap))
            out = torch.matmul(p.flatten(1, 2), v_SGC[lo:hi].to(acc).transpose(0, 1))
            out_THC[block] = _ungrouped(out.view(q_GRTC.shape)).to(q_THC.dtype)
            if return_lse:
                lse_HT[:, block] = lse.flatten(0, 1)
    return out_THC, lse_HT


def attention_prefill_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q_THC: Tensor,
    k_SGC: Tensor,
    v_SGC: Tensor,
    out_THC: Tensor,
    lse_HT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from p = exp(s - lse) recomputed block by block.

    dv = pᵀ do, ds = p (do vᵀ - rowsum(do out) + dlse), dq = ds k, dk = dsᵀ q.
    """
    acc = lse_HT.dtype
    kv_heads = k_SGC.shape[1]
    dq = torch.zeros_like(q_THC, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(k_SGC, dtype=acc, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(v_SGC, dtype=acc, memory_format=torch.contiguous_format)
    cu_and_longest = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    for _, queries, keys in _sequences(*cu_and_longest, q_THC.shape[0], k_SGC.shape[0]):
        num_keys = keys.stop - keys.start
        rows = max(16, SCORE_ELEMENTS // max(num_keys * q_THC.shape[1], 1))
        blocks = _blocks(queries, num_keys, rows, causal, window, window_right)
        for block, first, lo, hi, right in blocks:
            last = first + block.stop - block.start
            seen = slice(keys.start + lo, keys.start + hi)
            k, v = k_SGC[seen].to(acc), v_SGC[seen].to(acc)
            q, do, o = (_grouped(x[block].to(acc), kv_heads) for x in (q_THC, grad_out, out_THC))
            mask = _mask(first, last, lo, hi, window, right, q_THC.device)
            lse = lse_HT[:, block].unflatten(0, (kv_heads, -1))
            s = _scores(q, k, mask, scale, softcap)
            p = (s - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp()
            dp = torch.matmul(do.flatten(1, 2), v.permute(1, 2, 0)).view_as(p)
            d_lse = grad_lse[:, block].unflatten(0, (kv_heads, -1))
            ds = p * (dp + (d_lse - (do * o).sum(-1)).unsqueeze(-1))
            if softcap:
                ds = ds * (1 - (s.masked_fill(s == -math.inf, 0.0) / softcap) ** 2)
            ds = ds.flatten(1, 2) * scale
            dq[block] = _ungrouped(torch.matmul(ds, k.transpose(0, 1)).view_as(q)).to(dq.dtype)
            dk[seen] += torch.matmul(ds.transpose(1, 2), q.flatten(1, 2)).transpose(0, 1)
            dv[seen] += torch.matmul(p.flatten(1, 2).transpose(1, 2), do.flatten(1, 2)).transpose(
                0, 1
            )
    return dq, dk.to(k_SGC.dtype), dv.to(v_SGC.dtype)


def attention_decode(
    q_BNHC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: int,
    ring: bool,
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    fused = q_BNHC.is_cpu and not softcap and not return_lse
    acc = torch.promote_types(q_BNHC.dtype, torch.float32)
    _, num_new, heads, _ = q_BNHC.shape
    kv_heads = k_cache.shape[2]
    page_size = k_cache.shape[1]
    room = page_size if block_table is None else page_size * block_table.shape[1]
    lse_shape = (q_BNHC.shape[0], heads, num_new if return_lse else 0)
    out = torch.zeros_like(q_BNHC, memory_format=torch.contiguous_format)
    lse_BHN = q_BNHC.new_full(lse_shape, -math.inf, dtype=acc)
    lengths = seq_lens.tolist()
    groups = [(slice(b, b + 1), length) for b, length in enumerate(lengths)]
    if fused and block_table is None and len(set(lengths)) == 1 and lengths[0] >= num_new:
        groups = [(slice(0, len(lengths)), lengths[0])]  # one call, as for most decoding on a CPU
    for rows, length in groups:
        b = rows.start
        if length == 0:
            continue
        if length < 0 or (length > room and not ring):
            whose = "the cache" if block_table is None else "block_table"
            raise ValueError(f"seq_lens[{b}] must lie in 0..{room}, {whose}'s keys, got {length}")
        first = length - num_new
        lo, hi = _visible(first, length, length, window, 0)
        mask = _mask(first, length, lo, hi, window, 0, q_BNHC.device)
        if block_table is None:
            # Views, not one copied block: a wrapped ring is two spans whose scores are joined.
            spans = _spans(page_size, lo, hi) if ring else [slice(lo, hi)]
            ks, vs = ([cache[rows, span] for span in spans] for cache in (k_cache, v_cache))
        else:
            skipped = lo // page_size
            pages = block_table[b, skipped : -(-hi // page_size)].tolist()
            seen = slice(lo - skipped * page_size, None)
            num_keys = hi - skipped * page_size
            ks, vs = ([_pages(cache, pages, num_keys)[None, seen]] for cache in (k_cache, v_cache))
        if fused and first >= 0:
            k, v = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in (ks, vs))
            out[rows] = F.scaled_dot_product_attention(
                q_BNHC[rows].transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                mask,
                scale=scale,
                enable_gqa=kv_heads != heads,
            ).transpose(1, 2)
            continue
        ks, vs = ([x[0].to(acc) for x in xs] for xs in (ks, vs))
        q = _grouped(q_BNHC[b].to(acc), kv_heads)
        scores = [_scores(q, k, None, scale, softcap) for k in ks]
        s = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
        if mask is not None:
            s = s.masked_fill(~mask, -math.inf)
        p, lse = _probabilities(s)
        parts = p.flatten(1, 2).split([len(v) for v in vs], -1)
        o = torch.matmul(parts[0], vs[0].transpose(0, 1))
        if len(vs) == 2:
            o = o + torch.matmul(parts[1], vs[1].transpose(0, 1))
        out[b] = _ungrouped(o.view(q.shape))
        if return_lse:
            lse_BHN[b] = lse.flatten(0, 1)
    return out, lse_BHN


def _spans(slots: int, lo: int, hi: int) -> list[slice]:
    """The slots of positions lo..hi - 1 in a ring, oldest first."""
    begin, end = lo % slots, (hi - 1) % slots + 1
    return [slice(begin, end)] if begin < end else [slice(begin, slots), slice(0, end)]


def moe_norm(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    router_x = _rms_norm(x, None, eps) * scale * max(x.shape[-1], 1) ** -0.5
    return _rms_norm(x, weight, eps), router_x.contiguous()


def moe_route(logits_TE: Tensor, per_expert_scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(logits_TE.dtype, torch.float32)
    probabilities = logits_TE.softmax(-1, dtype=acc)
    # A stable sort and not topk, which leaves the order of equal values open.
    weights, experts = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :k], experts[:, :k]
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights * per_expert_scale[experts]).to(acc), experts.int()


def _by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, list[tuple[int, slice]]]:
    """The assignments (t K + k) sorted by expert, and (e, its run) of each expert that has any."""
    flat = experts_TK.flatten().long()
    for e in _range(flat):
        if not -1 <= e <= num_experts:
            raise ValueError(
                f"experts must lie in 0..{num_experts - 1}, or be -1 or {num_experts} for none, "
                f"got {e}"
            )
    order = flat.argsort(stable=True)
    none, *counts = (flat + 1).bincount(minlength=num_experts + 1).tolist()
    runs, begin = [], none
    for e, count in enumerate(counts[:num_experts]):
        if count:
            runs.append((e, slice(begin, begin + count)))
        begin += count
    return order, runs


def moe_experts(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    order, runs = _by_expert(experts_TK, down_EDF.shape[0])
    tokens = order // experts_TK.shape[1]
    x_sorted, weights = x_TD[tokens], weights_TK.flatten()[order, None]
    out_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, weights.dtype))
    for e, run in runs:
        gate_up, down = gate_up_E2FD[e].to(x_TD.dtype), down_EDF[e].to(x_TD.dtype)
        hidden = geglu(F.linear(x_sorted[run], gate_up))
        # A token meets an expert at most once, so each index_add_ is free of order.
        out_TD.index_add_(0, tokens[run], _finite(F.linear(hidden, down)) * weights[run])
    return _finite(out_TD.to(x_TD.dtype))


def moe_experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and weights, expert by expert, activations recomputed."""
    order, runs = _by_expert(experts_TK, down_EDF.shape[0])
    tokens = order // experts_TK.shape[1]
    weights = weights_TK.flatten()[order, None]
    dx, d_gate_up, d_down = (t.new_zeros(t.shape) for t in (x_TD, gate_up_E2FD, down_EDF))
    d_weights = weights_TK.new_zeros(weights_TK.numel())
    for e, run in runs:
        x, dy = x_TD[tokens[run]], grad_TD[tokens[run]]
        gate_up, down = gate_up_E2FD[e].to(x.dtype), down_EDF[e].to(x.dtype)
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        act = F.gelu(gate, approximate="tanh")
        product = act * up
        hidden = _finite(product)
        d_weights[order[run]] = (dy * F.linear(hidden, down)).sum(-1).to(d_weights.dtype)
        dy = (dy * weights[run]).to(x.dtype)
        d_down[e] = dy.T @ hidden
        d_hidden = dy @ down
        if hidden is not product:  # what was held back passes nothing on
            d_hidden = d_hidden.masked_fill(product.isinf(), 0.0)
        d_gate = torch.ops.aten.gelu_backward(d_hidden * up, gate, approximate="tanh")
        d_pair = torch.cat([d_gate, d_hidden * act], -1)
        d_gate_up[e] = d_pair.T @ x
        dx.index_add_(0, tokens[run], d_pair @ gate_up)
    return dx, d_gate_up, d_down, d_weights.view_as(weights_TK)


def ple_embed(
    ids_T: Tensor, table: Tensor, projected: Tensor, weight: Tensor, eps: float
) -> Tensor:
    ids_T = ids_T.long()
    known = (ids_T >= 0) & (ids_T < table.shape[0])
    if not table.shape[0]:
        table = table.new_zeros(1, table.shape[1])
    rows = F.embedding(torch.where(known, ids_T, 0).to(table.device), table)
    rows = rows.to(projected.device).masked_fill(~known[:, None], 0.0)
    # The factor is rounded to the table's dtype first, as the reference's embedding does.
    scale = torch.tensor(math.sqrt(weight.shape[0]), dtype=table.dtype)
    tokens_TLP = (rows * scale).unflatten(1, (-1, weight.shape[0]))
    context_TLP = _rms_norm(projected.view(tokens_TLP.shape), weight, eps)
    return (context_TLP + tokens_TLP) * 2.0**-0.5


def ple_gate(gate_TP: Tensor, ple_TLP: Tensor, layer: int) -> Tensor:
    return _finite(F.gelu(gate_TP, approximate="tanh") * ple_TLP[:, layer]).contiguous()


def softcap(logits: Tensor, cap: float) -> Tensor:
    return (torch.tanh_(logits / cap) * cap).contiguous()


def softcap_argmax(logits: Tensor, cap: float) -> Tensor:
    return softcap(logits, cap).argmax(-1)
