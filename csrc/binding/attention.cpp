#include "../attention/ops.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>

#include "register.h"
#include "torch.h"

namespace binding {
namespace {

using gemma4::AttentionParams, gemma4::Divisor;

// The common part of both attention ops: what does not depend on where the keys lie.
AttentionParams attention_params(Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                                 double scale, int64_t window, double softcap, ScalarType of_keys) {
  const int64_t heads = q.size(q.dim() - 2), kv_heads = k.size(k.dim() - 2);
  const int64_t head_dim = q.size(q.dim() - 1);
  STD_TORCH_CHECK(k.size(k.dim() - 1) == head_dim, "k must have the head_dim of q, ", head_dim,
                  ", got ", k.size(k.dim() - 1));
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0,
                  "the query heads must be a multiple of the KV heads, got ", heads, " and ",
                  kv_heads);
  STD_TORCH_CHECK(window >= 0, "window must be 0 (none) or a key count, got ", window);
  for (const auto& [name, t] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    expect_dtype(name, *t, of_keys);
    call.expect_here(name, *t);
    expect_shape(name, *t, shape_of(k));
  }
  AttentionParams p{};
  p.q_heads = as_int("q", heads);
  p.kv_heads = as_int("k", kv_heads);
  p.head_dim = as_int("q", head_dim);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.window = static_cast<int>(std::min<int64_t>(window, INT32_MAX));
  p.group = Divisor(static_cast<int>(heads / kv_heads));
  p.splits = Divisor(1);
  return p;
}

const int32_t* lengths(Call& call, const char* name, const Tensor& t, int64_t count) {
  call.expect_here(name, t);
  expect_dtype(name, t, ScalarType::Int);
  expect_shape(name, t, {count});
  return static_cast<const int32_t*>(call.in(name, call.keep(torch::stable::contiguous(t))));
}

void set_pages(Call& call, AttentionParams& p, const Tensor& k, const Tensor& block_table,
               int64_t batch) {
  STD_TORCH_CHECK(k.dim() == 4, "with a block_table k and v must be [pages, page_size, G, C]");
  STD_TORCH_CHECK(block_table.dim() == 2 && block_table.size(0) == batch,
                  "block_table must be [B, pages] with B = ", batch);
  p.pages_per_row = as_int("block_table", block_table.size(1));
  p.page_size = Divisor(as_int("k", k.size(1)));
  p.capacity = int64_t{p.pages_per_row} * p.page_size.divisor;
  p.block_table = call.flat_indices("block_table", block_table);
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); d++)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

void set_keys(Call& call, AttentionParams& p, const Tensor& k, const Tensor& v) {
  const int64_t dims = k.dim();
  p.k = call.in("k", k);
  p.v = call.in("v", v);
  p.key_strides = {dims == 4 ? k.stride(0) : 0, k.stride(dims - 3), k.stride(dims - 2)};
}

// A copy of a cache at every step would take as much time and memory as the cache.
void set_cache(Call& call, AttentionParams& p, const char* k_name, const Tensor& k,
               const char* v_name, const Tensor& v) {
  for (const auto& [name, t] : {std::pair{k_name, &k}, std::pair{v_name, &v}})
    STD_TORCH_CHECK(is_aligned(*t), name,
                    " must begin on a multiple of 16 bytes, hold contiguous heads and have strides "
                    "that are multiples of 8 elements");
  STD_TORCH_CHECK(same_strides(k, v), k_name, " and ", v_name, " must have the same strides");
  set_keys(call, p, k, v);
}

// Of one step alone, whose copy is small beside the step.
void set_packed_keys(Call& call, AttentionParams& p, const Tensor& k, const Tensor& v) {
  Tensor k_held = aligned(k), v_held = aligned(v);
  if (!same_strides(k_held, v_held)) {
    k_held = torch::stable::contiguous(k_held);
    v_held = torch::stable::contiguous(v_held);
  }
  set_keys(call, p, call.keep(k_held), call.keep(v_held));
}

// What the forward and the backward over packed sequences know alike.
AttentionParams packed(Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                       double scale, bool causal, int64_t window, int64_t window_right,
                       double softcap) {
  AttentionParams p = attention_params(call, q, k, v, scale, window, softcap, q.scalar_type());
  const int64_t batch = cu_seqlens_q.size(0) - 1;
  const Tensor& q_held = call.keep(aligned(q));
  if (k.dim() == 4)
    set_cache(call, p, "k", k, "v", v);
  else
    set_packed_keys(call, p, k, v);
  p.q = call.in("q", q_held);
  p.cu_seqlens_q = lengths(call, "cu_seqlens_q", cu_seqlens_q, batch + 1);
  p.cu_seqlens_k = lengths(call, "cu_seqlens_k", cu_seqlens_k, batch + 1);
  p.q_stride = q_held.stride(0);
  p.q_head_stride = q_held.stride(1);
  p.lse_head_stride = q.size(0);
  p.tokens = q.size(0);
  p.capacity = k.size(0);
  p.batch = as_int("cu_seqlens_q", batch);
  p.max_seqlen_q = static_cast<int>(std::min(max_seqlen_q, q.size(0)));
  p.window_right = causal ? 0 : static_cast<int>(std::min<int64_t>(window_right, INT32_MAX / 2));
  return p;
}

std::tuple<Tensor, Tensor> attention_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                             Tensor cu_seqlens_k, int64_t max_seqlen_q,
                                             int64_t max_seqlen_k, double scale, bool causal,
                                             int64_t window, int64_t window_right, double softcap,
                                             OptionalTensor block_table, bool return_lse) {
  Call call(q);
  STD_TORCH_CHECK(q.dim() == 3, "q must be [T, H, C], got ", text(shape_of(q)));
  STD_TORCH_CHECK(k.dim() == (block_table ? 4 : 3),
                  "k must be [T, G, C], or pages with a block_table");
  STD_TORCH_CHECK(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) >= 1,
                  "cu_seqlens_q must be [B + 1]");
  AttentionParams p = packed(call, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale, causal,
                             window, window_right, softcap);
  Tensor out = call.empty(shape_of(q));
  Tensor lse = call.empty({q.size(1), return_lse ? q.size(0) : 0}, ScalarType::Float);
  if (block_table) set_pages(call, p, k, *block_table, p.batch);
  p.out = call.out("out", out);
  p.lse = return_lse ? static_cast<float*>(call.out("lse", lse)) : nullptr;
  if (p.batch == 0 || p.max_seqlen_q == 0) {
    // No sequence owns a row.
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
    return {out, lse};
  }
  gemma4::attention_prefill(p, call.dtype(), call.device());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_prefill_backward(
    Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double scale, bool causal, int64_t window, int64_t window_right, double softcap) {
  Call call(q);
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "q must be [T, H, C] and k [T, G, C]");
  STD_TORCH_CHECK(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) >= 1,
                  "cu_seqlens_q must be [B + 1]");
  const Shape of_lse{q.size(1), q.size(0)};
  call.expect("grad_out", grad_out, shape_of(q));
  call.expect("out", out, shape_of(q));
  for (const Tensor* t : {&lse, &grad_lse}) {
    call.expect_here("lse and its gradient", *t);
    expect_dtype("lse and its gradient", *t, ScalarType::Float);
    expect_shape("lse and its gradient", *t, of_lse);
  }
  const auto dense = [&](const Tensor& t) -> const Tensor& {
    return call.keep(aligned(torch::stable::contiguous(t)));
  };
  Tensor grad_q = call.empty(shape_of(q)), grad_k = call.empty(shape_of(k));
  Tensor grad_v = call.empty(shape_of(k)), delta = call.empty(of_lse, ScalarType::Float);
  AttentionParams f = packed(call, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale, causal,
                             window, window_right, softcap);
  f.out = const_cast<void*>(call.in("out", dense(out)));
  f.lse = static_cast<float*>(const_cast<void*>(call.in("lse", dense(lse))));
  gemma4::attention_prefill_backward(
      {.forward = f,
       .grad_out = call.in("grad_out", dense(grad_out)),
       .grad_lse = static_cast<const float*>(call.in("grad_lse", dense(grad_lse))),
       .delta = static_cast<float*>(call.out("delta", delta)),
       .grad_q = call.out("grad_q", grad_q),
       .grad_k = call.out("grad_k", grad_k),
       .grad_v = call.out("grad_v", grad_v),
       .max_seqlen_k = static_cast<int>(std::min(max_seqlen_k, k.size(0)))},
      call.dtype(), call.device());
  return {grad_q, grad_k, grad_v};
}

// Of what a sequence may see at most, and the memory for the results of its splits.
void set_splits(Call& call, AttentionParams& p, bool ring) {
  const int64_t seen = p.window > 0 ? int64_t{p.window} + p.new_tokens - 1 : p.capacity;
  const int splits =
      gemma4::attention_decode_splits(p, ring ? seen : std::min(seen, p.capacity), call.device());
  p.splits = Divisor(splits);
  if (splits == 1) return;
  const int64_t parts = splits + gemma4::attention_decode_knots(splits);
  const auto memory = [&](const char* name, const Shape& shape) {
    return static_cast<float*>(call.out(name, call.keep(call.empty(shape, ScalarType::Float))));
  };
  p.partial_out = memory("partial_out", {parts, p.tokens, p.q_heads, p.head_dim});
  p.partial_lse = memory("partial_lse", {parts, p.tokens, p.q_heads});
}

// Everything of a decoding op but q and out: where the keys are, and how they are divided.
AttentionParams decode_params(Call& call, const Tensor& q, const Tensor& k_cache,
                              const Tensor& v_cache, const OptionalTensor& k_scales,
                              const OptionalTensor& v_scales, const Tensor& seq_lens,
                              const OptionalTensor& block_table, int64_t new_tokens, double scale,
                              int64_t window, bool ring, double softcap) {
  STD_TORCH_CHECK(k_cache.dim() == 4, "k_cache must be 4-d, got ", text(shape_of(k_cache)));
  AttentionParams p = attention_params(call, q, k_cache, v_cache, scale, window, softcap,
                                       k_scales ? ScalarType::Float8_e4m3fn : q.scalar_type());
  if (expect_scales(call, k_cache, v_cache, k_scales, v_scales)) {
    STD_TORCH_CHECK(softcap == 0, "a cache in e4m3 has no kernel with a softcap");
    p.k_scales = static_cast<const float*>(call.in("k_scales", k_scales));
    p.v_scales = static_cast<const float*>(call.in("v_scales", v_scales));
  }
  const int64_t batch = q.size(0), slots = k_cache.size(1);
  STD_TORCH_CHECK(block_table || k_cache.size(0) == batch,
                  "k_cache must have one row per sequence, ", batch, ", got ", k_cache.size(0));
  STD_TORCH_CHECK(
      !ring || (!block_table && window > 0 && window + new_tokens - 1 <= slots),
      "a ring cache needs a window and window + new tokens - 1 slots, and no block_table");
  p.capacity = slots;
  if (block_table) set_pages(call, p, k_cache, *block_table, batch);
  set_cache(call, p, "k_cache", k_cache, "v_cache", v_cache);
  p.ring = Divisor(ring ? as_int("k_cache", slots) : 0);
  p.seq_lens = lengths(call, "seq_lens", seq_lens, batch);
  p.tokens = batch * new_tokens;
  p.batch = as_int("q", batch);
  p.new_tokens = p.max_seqlen_q = as_int("q", new_tokens);
  set_splits(call, p, ring);
  return p;
}

std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k_cache, Tensor v_cache,
                                            OptionalTensor k_scales, OptionalTensor v_scales,
                                            Tensor seq_lens, OptionalTensor block_table,
                                            double scale, int64_t window, bool ring, double softcap,
                                            bool return_lse) {
  Call call(q);
  STD_TORCH_CHECK(q.dim() == 4, "q must be [B, N, H, C], got ", text(shape_of(q)));
  const int64_t batch = q.size(0), new_tokens = q.size(1);
  AttentionParams p = decode_params(call, q, k_cache, v_cache, k_scales, v_scales, seq_lens,
                                    block_table, new_tokens, scale, window, ring, softcap);
  Tensor out = call.empty(shape_of(q));
  Tensor lse = call.empty({batch, q.size(2), return_lse ? new_tokens : 0}, ScalarType::Float);
  Tensor flat = aligned(q);
  if (new_tokens > 1 && flat.stride(0) != new_tokens * flat.stride(1))
    flat = torch::stable::contiguous(q);
  const Tensor& q_held = call.keep(flat);
  p.q = call.in("q", q_held);
  p.out = call.out("out", out);
  p.lse = return_lse ? static_cast<float*>(call.out("lse", lse)) : nullptr;
  p.q_stride = new_tokens > 1 ? q_held.stride(1) : q_held.stride(0);
  p.q_head_stride = q_held.stride(2);
  p.lse_head_stride = new_tokens;
  gemma4::attention_decode(p, call.dtype(), call.device());
  return {out, lse};
}

Tensor qkv_attention_decode(Tensor q, OptionalTensor k, OptionalTensor v, Tensor q_weight,
                            OptionalTensor k_weight, Tensor positions, Tensor inv_freq,
                            Tensor k_cache, Tensor v_cache, OptionalTensor k_scales,
                            OptionalTensor v_scales, Tensor seq_lens, OptionalTensor block_table,
                            Tensor counters, double eps, double scale, int64_t window, bool ring,
                            double softcap) {
  Call call(q);
  STD_TORCH_CHECK(q.dim() == 3, "q must be [B, H, C], got ", text(shape_of(q)));
  STD_TORCH_CHECK(k.has_value() == k_weight.has_value(), "k and k_weight must come together");
  STD_TORCH_CHECK(k || !v, "v must not come without k");
  const int64_t batch = q.size(0), head_dim = q.size(2);
  AttentionParams a = decode_params(call, q, k_cache, v_cache, k_scales, v_scales, seq_lens,
                                    block_table, 1, scale, window, ring, softcap);
  STD_TORCH_CHECK(a.group.divisor <= 16, "at most 16 query heads may share a KV head, got ",
                  a.group.divisor);
  call.expect_here("counters", counters);
  expect_dtype("counters", counters, ScalarType::Int);
  expect_shape("counters", counters, {batch, a.kv_heads, gemma4::kDecodeCounters});
  STD_TORCH_CHECK(counters.is_contiguous(), "counters must be contiguous");
  expect_dtype("inv_freq", inv_freq, ScalarType::Float);
  call.expect_here("inv_freq", inv_freq);
  expect_shape("inv_freq", inv_freq, {head_dim / 2});
  Tensor out = call.empty(shape_of(q));
  const Tensor& q_held = call.keep(aligned(q));
  a.q = call.in("q", q_held);
  a.out = call.out("out", out);
  a.q_stride = q_held.stride(0);
  a.q_head_stride = q_held.stride(1);
  gemma4::QkvAttentionDecodeParams p{};
  const gemma4::DType weights =
      call.dtypes(q.scalar_type(), {&q_weight, pointer_to(k_weight)}).weight;
  const auto heads = [&](const char* name, const Tensor& t, int64_t& stride, int64_t& head_stride) {
    call.expect(name, t, {batch, a.kv_heads, head_dim});
    const Tensor& held = call.keep(aligned(t));
    stride = held.stride(0), head_stride = held.stride(1);
    return call.in(name, held);
  };
  p.q_weight = call.weight("q_weight", q_weight, head_dim, weights);
  p.k_weight = call.weight("k_weight", k_weight, head_dim, weights);
  p.wide_weights = weights != call.dtype();
  if (k) {
    p.k = heads("k", *k, p.k_stride, p.k_head_stride);
    p.k_cache = call.out("k_cache", k_cache);
    p.v_cache = call.out("v_cache", v_cache);
    if (k_scales) {
      p.k_scales = static_cast<float*>(call.out("k_scales", *k_scales));
      p.v_scales = static_cast<float*>(call.out("v_scales", *v_scales));
    }
  }
  if (v) p.v = heads("v", *v, p.v_stride, p.v_head_stride);
  p.inv_freq = static_cast<const float*>(call.in("inv_freq", call.keep(aligned(inv_freq))));
  p.positions = call.indices("positions", positions, batch);
  p.counters = static_cast<unsigned*>(call.out("counters", counters));
  p.eps = static_cast<float>(eps);
  p.attention = a;
  gemma4::qkv_attention_decode(p, call.dtype(), call.device());
  return out;
}

}  // namespace

void register_attention(Library& m) {
  m.impl("attention_prefill", TORCH_BOX(&attention_prefill));
  m.impl("attention_prefill_backward", TORCH_BOX(&attention_prefill_backward));
  m.impl("attention_decode", TORCH_BOX(&attention_decode));
  m.impl("qkv_attention_decode", TORCH_BOX(&qkv_attention_decode));
}

}  // namespace binding
