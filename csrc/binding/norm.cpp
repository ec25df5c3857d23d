#include "../norm/ops.h"

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "register.h"
#include "torch.h"

namespace binding {
namespace {

using gemma4::QkvNormRopeParams;

Tensor rms_norm(Tensor x, OptionalTensor weight, double eps) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const int64_t width = x.size(x.dim() - 1);
  const DTypes dtypes = call.dtypes(x.scalar_type(), {pointer_to(weight)});
  const Rows rows = as_rows(x);
  Tensor y = call.empty(shape_of(x));
  gemma4::rms_norm({.x = call.in("x", rows.tensor),
                    .weight = call.weight("weight", weight, width, dtypes.weight),
                    .y = call.out("y", y),
                    .rows = rows.rows,
                    .x_stride = rows.stride,
                    .width = as_int("x", width),
                    .eps = static_cast<float>(eps)},
                   dtypes, call.device());
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor post_weight,
                                        OptionalTensor next_weight, OptionalTensor scale,
                                        double eps) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const int64_t width = x.size(x.dim() - 1);
  call.expect_here("residual", residual);
  expect_shape("residual", residual, shape_of(x));
  const ScalarType other = call.promoted(residual.scalar_type());
  if (residual.scalar_type() != other) residual = Call::as_float(residual);
  const DTypes dtypes =
      call.dtypes(other, {&post_weight, pointer_to(next_weight), pointer_to(scale)});
  const Rows x_rows = as_rows(x), residual_rows = as_rows(residual);
  Tensor new_residual = call.empty(shape_of(x), other);
  Tensor y = call.empty(next_weight ? shape_of(x) : Shape{0}, other);
  gemma4::add_rms_norm(
      {.x = call.in("x", x_rows.tensor),
       .residual = call.in("residual", residual_rows.tensor),
       .post_weight = call.weight("post_weight", post_weight, width, dtypes.weight),
       .next_weight = call.weight("next_weight", next_weight, width, dtypes.weight),
       .scale = call.weight("scale", scale, 1, dtypes.weight),
       .new_residual = call.out("new_residual", new_residual),
       .y = next_weight ? call.out("y", y) : nullptr,
       .rows = x_rows.rows,
       .x_stride = x_rows.stride,
       .residual_stride = residual_rows.stride,
       .width = as_int("x", width),
       .eps = static_cast<float>(eps)},
      dtypes, call.device());
  return {new_residual, y};
}

std::tuple<Tensor, Tensor> moe_norm(Tensor x, Tensor weight, Tensor scale, double eps) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const int64_t width = x.size(x.dim() - 1);
  const ScalarType other = call.promoted(scale.scalar_type());
  const DTypes dtypes = call.dtypes(other, {&weight, &scale});
  const Rows rows = as_rows(x);
  Tensor y = call.empty(shape_of(x)), router_x = call.empty(shape_of(x), other);
  gemma4::moe_norm({.x = call.in("x", rows.tensor),
                    .weight = call.weight("weight", weight, width, dtypes.weight),
                    .scale = call.weight("scale", scale, width, dtypes.weight),
                    .y = call.out("y", y),
                    .router_x = call.out("router_x", router_x),
                    .rows = rows.rows,
                    .x_stride = rows.stride,
                    .width = as_int("x", width),
                    .eps = static_cast<float>(eps),
                    .factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(width)))},
                   dtypes, call.device());
  return {y, router_x};
}

Tensor heads_in_place(const Tensor& t) {
  return t.stride(2) == 1 || t.size(2) <= 1 ? t : torch::stable::contiguous(t);
}

// Everything of both qkv ops but where k and v go.
QkvNormRopeParams qkv_params(Call& call, const DTypes& dtypes, const Tensor& q, OptionalTensor& k,
                             OptionalTensor& v, const Tensor& q_weight,
                             const OptionalTensor& k_weight, const Tensor& positions,
                             const Tensor& inv_freq, double eps) {
  STD_TORCH_CHECK(q.dim() == 3, "q must be [T, H, C], got ", text(shape_of(q)));
  const int64_t tokens = q.size(0), heads = q.size(1), head_dim = q.size(2);
  STD_TORCH_CHECK(head_dim % 2 == 0, "q must have an even head_dim, got ", head_dim);
  STD_TORCH_CHECK(k.has_value() == k_weight.has_value(), "k and k_weight must come together");
  STD_TORCH_CHECK(k || !v, "v must not come without k");
  int64_t kv_heads = 0;
  if (k) {
    STD_TORCH_CHECK(k->dim() == 3, "k must be [T, G, C], got ", text(shape_of(*k)));
    kv_heads = k->size(1);
    call.expect("k", *k, {tokens, kv_heads, head_dim});
    k = heads_in_place(*k);
  }
  if (v) {
    call.expect("v", *v, {tokens, kv_heads, head_dim});
    v = heads_in_place(*v);
  }
  call.expect_here("inv_freq", inv_freq);
  expect_dtype("inv_freq", inv_freq, ScalarType::Float);
  expect_shape("inv_freq", inv_freq, {head_dim / 2});
  const Tensor& q_held = call.keep(heads_in_place(q));
  QkvNormRopeParams p{};
  p.q = call.in("q", q_held);
  p.k = call.in("k", k);
  p.v = call.in("v", v);
  p.q_weight = call.weight("q_weight", q_weight, head_dim, dtypes.weight);
  p.k_weight = call.weight("k_weight", k_weight, head_dim, dtypes.weight);
  p.inv_freq = static_cast<const float*>(
      call.in("inv_freq", call.keep(torch::stable::contiguous(inv_freq))));
  p.positions = call.indices("positions", positions, tokens);
  p.q_stride = q_held.stride(0);
  p.q_head_stride = q_held.stride(1);
  if (k) {
    p.k_stride = k->stride(0);
    p.k_head_stride = k->stride(1);
  }
  if (v) {
    p.v_stride = v->stride(0);
    p.v_head_stride = v->stride(1);
  }
  p.tokens = p.num_slots = tokens;
  p.q_heads = as_int("q", heads);
  p.kv_heads = as_int("k", kv_heads);
  p.head_dim = as_int("q", head_dim);
  p.eps = static_cast<float>(eps);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> qkv_norm_rope(Tensor q, OptionalTensor k, OptionalTensor v,
                                                 Tensor q_weight, OptionalTensor k_weight,
                                                 Tensor positions, Tensor inv_freq, double eps) {
  Call call(q);
  const DTypes dtypes = call.dtypes(q.scalar_type(), {&q_weight, pointer_to(k_weight)});
  QkvNormRopeParams p =
      qkv_params(call, dtypes, q, k, v, q_weight, k_weight, positions, inv_freq, eps);
  Tensor q_out = call.empty(shape_of(q));
  const Shape kv_shape = k ? Shape{p.tokens, p.kv_heads, p.head_dim} : Shape{0};
  Tensor k_out = call.empty(kv_shape), v_out = call.empty(kv_shape);
  p.q_out = call.out("q_out", q_out);
  p.k_out = call.out("k_out", k_out);
  p.v_out = call.out("v_out", v_out);
  gemma4::qkv_norm_rope(p, dtypes, call.device());
  return {q_out, k_out, v_out};
}

Tensor qkv_norm_rope_cache(Tensor q, Tensor k, OptionalTensor v, Tensor q_weight, Tensor k_weight,
                           Tensor positions, Tensor inv_freq, double eps, Tensor k_cache,
                           Tensor v_cache, OptionalTensor k_scales, OptionalTensor v_scales,
                           Tensor slots) {
  Call call(q);
  if (k_scales) {  // 16 bytes at a time alone
    q = aligned(q), k = aligned(k), inv_freq = aligned(inv_freq);
    if (v) v = aligned(*v);
  }
  OptionalTensor k_in = k;
  const DTypes dtypes = call.dtypes(q.scalar_type(), {&q_weight, &k_weight});
  QkvNormRopeParams p =
      qkv_params(call, dtypes, q, k_in, v, q_weight, k_weight, positions, inv_freq, eps);
  const Shape cache_shape = shape_of(k_cache);
  STD_TORCH_CHECK(cache_shape.size() >= 3 && cache_shape.rbegin()[0] == p.head_dim &&
                      cache_shape.rbegin()[1] == p.kv_heads,
                  "k_cache must end in [G, C], got ", text(cache_shape));
  const ScalarType of_cache = k_scales ? ScalarType::Float8_e4m3fn : q.scalar_type();
  for (const auto& [name, t] : {std::pair{"k_cache", &k_cache}, std::pair{"v_cache", &v_cache}}) {
    expect_dtype(name, *t, of_cache);
    call.expect_here(name, *t);
    expect_shape(name, *t, cache_shape);
  }
  STD_TORCH_CHECK(k_cache.is_contiguous() && v_cache.is_contiguous(),
                  "k_cache and v_cache must be contiguous");
  p.num_slots = 1;
  for (size_t d = 0; d + 2 < cache_shape.size(); d++) p.num_slots *= cache_shape[d];
  Tensor q_out = call.empty(shape_of(q));
  p.q_out = call.out("q_out", q_out);
  p.k_out = call.out("k_cache", k_cache);
  p.v_out = call.out("v_cache", v_cache);
  p.slots = call.indices("slots", slots, p.tokens);
  if (expect_scales(call, k_cache, v_cache, k_scales, v_scales)) {
    p.k_scales = static_cast<float*>(call.out("k_scales", *k_scales));
    p.v_scales = static_cast<float*>(call.out("v_scales", *v_scales));
  }
  gemma4::qkv_norm_rope(p, dtypes, call.device());
  return q_out;
}

}  // namespace

void register_norm(Library& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("moe_norm", TORCH_BOX(&moe_norm));
  m.impl("qkv_norm_rope", TORCH_BOX(&qkv_norm_rope));
  m.impl("qkv_norm_rope_cache", TORCH_BOX(&qkv_norm_rope_cache));
}

}  // namespace binding
