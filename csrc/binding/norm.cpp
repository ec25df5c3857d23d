#include "../norm/ops.h"

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "register.h"
#include "torch.h"

namespace binding {
namespace {

using gemma4::QkvNormRopeParams, gemma4::WeightGradients;

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

// Rows for a backward kernel, which reads 16 bytes at a time alone: a gradient comes as it likes.
Rows rows_for_backward(Call& call, const char* name, const Tensor& t, const Shape& shape,
                       ScalarType dtype) {
  call.expect_here(name, t);
  expect_dtype(name, t, dtype);
  expect_shape(name, t, shape);
  Rows rows = as_rows(aligned(t));
  rows.tensor = call.keep(rows.tensor);
  return rows;
}

Floats weight_for_backward(Call& call, const char* name, const OptionalTensor& t, int64_t width) {
  if (!t) return {};
  call.expect_here(name, *t);
  expect_shape(name, *t, {width});
  return {call.in(name, call.keep(aligned(*t))), Call::dtype(t->scalar_type())};
}

// The gradients of weights, and the memory for the blocks' sums of their rows.
struct WeightSums {
  Call& call;
  WeightGradients params;

  WeightSums(Call& call, int64_t rows, int of_multiprocessor)
      : call(call),
        params{.blocks = gemma4::weight_gradient_blocks(rows, of_multiprocessor, call.device())} {}

  Tensor of(int which, const OptionalTensor& weight, bool wanted) {
    if (!weight || !wanted) return call.empty({0});
    const int64_t width = weight->size(0);
    Tensor sum = call.empty({width}, weight->scalar_type());
    const Tensor& partial = call.keep(call.empty({params.blocks, width}, ScalarType::Float));
    params.partial[which] = static_cast<float*>(call.out("partial", partial));
    params.sum[which] = call.out("grad_weight", sum);
    params.dtype[which] = Call::dtype(weight->scalar_type());
    return sum;
  }
};

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, OptionalTensor weight,
                                             double eps, bool wants_x, bool wants_weight) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const Shape shape = shape_of(x);
  const int64_t width = shape.back();
  const Rows rows = rows_for_backward(call, "x", x, shape, x.scalar_type());
  const Rows grads = rows_for_backward(call, "grad", grad, shape, x.scalar_type());
  WeightSums sums(call, rows.rows, gemma4::kRowBlocks);
  Tensor grad_x = call.empty(wants_x ? shape : Shape{0});
  Tensor grad_weight = sums.of(0, weight, wants_weight);
  gemma4::rms_norm_backward({.grad = call.in("grad", grads.tensor),
                             .x = call.in("x", rows.tensor),
                             .weight = weight_for_backward(call, "weight", weight, width),
                             .grad_x = wants_x ? call.out("grad_x", grad_x) : nullptr,
                             .weights = sums.params,
                             .rows = rows.rows,
                             .grad_stride = grads.stride,
                             .x_stride = rows.stride,
                             .width = as_int("x", width),
                             .eps = static_cast<float>(eps)},
                            call.dtype(), call.device());
  return {grad_x, grad_weight};
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

std::tuple<Tensor, Tensor, Tensor, Tensor> add_rms_norm_backward(
    OptionalTensor grad_residual, OptionalTensor grad_y, Tensor x, Tensor new_residual,
    Tensor post_weight, OptionalTensor next_weight, OptionalTensor scale, double eps, bool wants_x,
    bool wants_residual, bool wants_post_weight, bool wants_next_weight) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const Shape shape = shape_of(x);
  const int64_t width = shape.back();
  const ScalarType other = call.promoted(new_residual.scalar_type());
  const auto rows_of = [&](const char* name, const OptionalTensor& t) {
    return t ? rows_for_backward(call, name, *t, shape, other) : Rows{x, 0, 0, 0};
  };
  const Rows rows = rows_for_backward(call, "x", x, shape, x.scalar_type());
  const Rows residuals = rows_of("new_residual", new_residual);
  const Rows residual_grads = rows_of("grad_residual", grad_residual);
  const Rows y_grads = rows_of("grad_y", grad_y);
  WeightSums sums(call, rows.rows, gemma4::kRowBlocks);
  Tensor grad_x = call.empty(wants_x ? shape : Shape{0});
  Tensor grad_old = call.empty(wants_residual ? shape : Shape{0}, other);
  Tensor grad_post = sums.of(0, post_weight, wants_post_weight);
  Tensor grad_next = sums.of(1, next_weight, wants_next_weight);
  gemma4::add_rms_norm_backward(
      {.grad_residual = grad_residual ? call.in("grad_residual", residual_grads.tensor) : nullptr,
       .grad_y = grad_y ? call.in("grad_y", y_grads.tensor) : nullptr,
       .x = call.in("x", rows.tensor),
       .new_residual = call.in("new_residual", residuals.tensor),
       .post_weight = weight_for_backward(call, "post_weight", post_weight, width),
       .next_weight = weight_for_backward(call, "next_weight", next_weight, width),
       .scale = weight_for_backward(call, "scale", scale, 1),
       .grad_x = wants_x ? call.out("grad_x", grad_x) : nullptr,
       .grad_old_residual = wants_residual ? call.out("grad_old_residual", grad_old) : nullptr,
       .weights = sums.params,
       .rows = rows.rows,
       .grad_residual_stride = residual_grads.stride,
       .grad_y_stride = y_grads.stride,
       .x_stride = rows.stride,
       .new_residual_stride = residuals.stride,
       .width = as_int("x", width),
       .eps = static_cast<float>(eps)},
      call.dtype(), Call::dtype(other), call.device());
  return {grad_x, grad_old, grad_post, grad_next};
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

std::tuple<Tensor, Tensor, Tensor> moe_norm_backward(OptionalTensor grad_y,
                                                     OptionalTensor grad_router_x, Tensor x,
                                                     Tensor weight, Tensor scale, double eps,
                                                     bool wants_x, bool wants_weight,
                                                     bool wants_scale) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const Shape shape = shape_of(x);
  const int64_t width = shape.back();
  const ScalarType other = call.promoted(scale.scalar_type());
  const Rows rows = rows_for_backward(call, "x", x, shape, x.scalar_type());
  const Rows y_grads = grad_y ? rows_for_backward(call, "grad_y", *grad_y, shape, x.scalar_type())
                              : Rows{x, 0, 0, 0};
  const Rows router_grads =
      grad_router_x ? rows_for_backward(call, "grad_router_x", *grad_router_x, shape, other)
                    : Rows{x, 0, 0, 0};
  WeightSums sums(call, rows.rows, gemma4::kRowBlocks);
  Tensor grad_x = call.empty(wants_x ? shape : Shape{0});
  Tensor grad_weight = sums.of(0, weight, wants_weight);
  Tensor grad_scale = sums.of(1, scale, wants_scale);
  gemma4::moe_norm_backward(
      {.grad_y = grad_y ? call.in("grad_y", y_grads.tensor) : nullptr,
       .grad_router_x = grad_router_x ? call.in("grad_router_x", router_grads.tensor) : nullptr,
       .x = call.in("x", rows.tensor),
       .weight = weight_for_backward(call, "weight", weight, width),
       .scale = weight_for_backward(call, "scale", scale, width),
       .grad_x = wants_x ? call.out("grad_x", grad_x) : nullptr,
       .weights = sums.params,
       .rows = rows.rows,
       .grad_y_stride = y_grads.stride,
       .grad_router_x_stride = router_grads.stride,
       .x_stride = rows.stride,
       .width = as_int("x", width),
       .eps = static_cast<float>(eps),
       .factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(width)))},
      call.dtype(), Call::dtype(other), call.device());
  return {grad_x, grad_weight, grad_scale};
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

// Heads for a backward kernel, which reads 16 bytes at a time alone.
gemma4::Heads heads_for_backward(Call& call, const char* name, const OptionalTensor& t,
                                 const Shape& shape) {
  if (!t) return {};
  call.expect(name, *t, shape);
  const Tensor& held = call.keep(aligned(*t));
  return {call.in(name, held), held.stride(0), held.stride(1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> qkv_norm_rope_backward(
    OptionalTensor grad_q, OptionalTensor grad_k, OptionalTensor grad_v, Tensor q, OptionalTensor k,
    OptionalTensor v, Tensor q_weight, OptionalTensor k_weight, Tensor positions, Tensor inv_freq,
    double eps, bool wants_q_weight, bool wants_k_weight) {
  Call call(q);
  q = aligned(q), inv_freq = aligned(inv_freq);
  if (k) k = aligned(*k);
  if (v) v = aligned(*v);
  // The weights are read by themselves.
  gemma4::QkvNormRopeBackwardParams p{
      .forward = qkv_params(call, call.dtypes(q.scalar_type(), {&q_weight, pointer_to(k_weight)}),
                            q, k, v, q_weight, k_weight, positions, inv_freq, eps)};
  const Shape q_shape = shape_of(q), kv_shape = k ? shape_of(*k) : Shape{0};
  p.grad_q = heads_for_backward(call, "grad_q", grad_q, q_shape);
  p.grad_k = heads_for_backward(call, "grad_k", grad_k, kv_shape);
  p.grad_v = heads_for_backward(call, "grad_v", grad_v, kv_shape);
  p.q_weight = weight_for_backward(call, "q_weight", q_weight, p.forward.head_dim);
  p.k_weight = weight_for_backward(call, "k_weight", k_weight, p.forward.head_dim);
  WeightSums sums(call, p.forward.tokens, gemma4::kHeadBlocks);
  Tensor q_out = call.empty(q_shape), k_out = call.empty(kv_shape);
  Tensor v_out = call.empty(v ? kv_shape : Shape{0});
  Tensor grad_q_weight = sums.of(0, q_weight, wants_q_weight);
  Tensor grad_k_weight = sums.of(1, k_weight, wants_k_weight);
  p.forward.q_out = call.out("q_out", q_out);
  p.forward.k_out = call.out("k_out", k_out);
  p.forward.v_out = call.out("v_out", v_out);
  p.weights = sums.params;
  gemma4::qkv_norm_rope_backward(p, call.dtype(), call.device());
  return {q_out, k_out, v_out, grad_q_weight, grad_k_weight};
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
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
  m.impl("moe_norm", TORCH_BOX(&moe_norm));
  m.impl("moe_norm_backward", TORCH_BOX(&moe_norm_backward));
  m.impl("qkv_norm_rope", TORCH_BOX(&qkv_norm_rope));
  m.impl("qkv_norm_rope_backward", TORCH_BOX(&qkv_norm_rope_backward));
  m.impl("qkv_norm_rope_cache", TORCH_BOX(&qkv_norm_rope_cache));
}

}  // namespace binding
