#include "../linear/ops.h"

#include <tuple>

#include "register.h"
#include "torch.h"

namespace binding {
namespace {

std::tuple<Tensor, Tensor> linear_small(Tensor x, Tensor weight, OptionalTensor residual,
                                        OptionalTensor post_weight, OptionalTensor scale,
                                        OptionalTensor norm_weight, OptionalTensor factor,
                                        double eps, bool gated) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x must be [T, D] and weight [N, D]");
  const int64_t tokens = x.size(0), width = x.size(1), rows = weight.size(0) / (gated ? 2 : 1);
  const bool normed = residual || norm_weight;
  STD_TORCH_CHECK(tokens <= gemma4::kMostSmallTokens && width % 8 == 0 &&
                      weight.size(0) % (gated ? 16 : 8) == 0,
                  "there are kernels for at most ", gemma4::kMostSmallTokens,
                  " tokens and widths that are multiples of 8, got ", text(shape_of(x)), " and ",
                  text(shape_of(weight)));
  STD_TORCH_CHECK(!normed || (width <= gemma4::kMostNormedWidth &&
                              tokens * width <= gemma4::kMostNormedElements),
                  "there are kernels that norm up to ", gemma4::kMostNormedWidth, " columns and ",
                  gemma4::kMostNormedElements, " elements, got ", text(shape_of(x)));
  STD_TORCH_CHECK(!residual == !post_weight, "residual and post_weight must come together or not");
  STD_TORCH_CHECK(!scale || residual, "scale must not come without a residual");
  STD_TORCH_CHECK(!(gated && factor), "a gated product must not have a factor");
  call.expect("weight", weight, {weight.size(0), width});
  // A copy would be as large as the layer.
  STD_TORCH_CHECK(weight.is_contiguous() && is_aligned(weight),
                  "weight must be contiguous and begin on a multiple of 16 bytes");
  const auto row = [&](const char* name, const OptionalTensor& t, int64_t size) -> const void* {
    if (!t) return nullptr;
    call.expect(name, *t, {size});
    return call.parameter(name, *t, aligned(*t));
  };
  const auto rows_of = [&](const char* name, const OptionalTensor& t, int64_t size,
                           int64_t& stride) -> const void* {
    if (!t) return nullptr;
    call.expect(name, *t, {tokens, size});
    const Tensor& held = call.keep(aligned(*t));
    stride = held.stride(0);
    return call.in(name, held);
  };
  gemma4::LinearSmallParams p{};
  p.x = rows_of("x", x, width, p.x_stride);
  p.weight = call.in("weight", weight);
  p.residual = rows_of("residual", residual, width, p.residual_stride);
  p.post_weight = row("post_weight", post_weight, width);
  p.scale = row("scale", scale, 1);
  p.norm_weight = row("norm_weight", norm_weight, width);
  p.factor = rows_of("factor", factor, rows, p.factor_stride);
  Tensor y = call.empty({tokens, rows});
  Tensor new_residual = call.empty(residual ? Shape{tokens, width} : Shape{0});
  p.y = call.out("y", y);
  p.new_residual = residual ? call.out("new_residual", new_residual) : nullptr;
  p.tokens = as_int("x", tokens);
  p.width = as_int("x", width);
  p.rows = as_int("weight", rows);
  p.eps = static_cast<float>(eps);
  p.gated = gated;
  gemma4::linear_small(p, call.dtype(), call.device());
  return {y, new_residual};
}

Tensor geglu(Tensor gate_up) {
  Call call(gate_up);
  Shape shape = shape_of(gate_up);
  STD_TORCH_CHECK(!shape.empty() && shape.back() % 2 == 0,
                  "gate_up must end in an even width, got ", text(shape));
  shape.back() /= 2;
  const Rows rows = as_rows(gate_up);
  Tensor y = call.empty(shape);
  const void* gate = call.in("gate_up", rows.tensor);
  gemma4::geglu({.gate = gate,
                 .other = static_cast<const char*>(gate) + shape.back() * gate_up.element_size(),
                 .y = call.out("y", y),
                 .rows = rows.rows,
                 .gate_stride = rows.stride,
                 .other_stride = rows.stride,
                 .width = as_int("gate_up", shape.back())},
                call.dtype(), call.device());
  return y;
}

Tensor softcap(Tensor logits, double cap) {
  Call call(logits);
  STD_TORCH_CHECK(cap > 0, "cap must be positive, got ", cap);
  const Rows rows = as_rows(logits);
  Tensor y = call.empty(shape_of(logits));
  gemma4::softcap({.logits = call.in("logits", rows.tensor),
                   .y = call.out("y", y),
                   .rows = rows.rows,
                   .stride = rows.stride,
                   .width = as_int("logits", rows.width),
                   .cap = static_cast<float>(cap)},
                  call.dtype(), call.device());
  return y;
}

Tensor softcap_argmax(Tensor logits, double cap) {
  Call call(logits);
  STD_TORCH_CHECK(cap > 0, "cap must be positive, got ", cap);
  Shape shape = shape_of(logits);
  STD_TORCH_CHECK(!shape.empty() && shape.back() > 0,
                  "logits must end in a non-empty vocabulary, got ", text(shape));
  shape.pop_back();
  const Rows rows = as_rows(logits);
  Tensor index = call.empty(shape, ScalarType::Long);
  gemma4::softcap_argmax({.logits = call.in("logits", rows.tensor),
                          .index = call.out("index", index),
                          .rows = rows.rows,
                          .stride = rows.stride,
                          .width = as_int("logits", rows.width),
                          .cap = static_cast<float>(cap)},
                         call.dtype(), call.device());
  return index;
}

}  // namespace

void register_linear(Library& m) {
  m.impl("linear_small", TORCH_BOX(&linear_small));
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("softcap", TORCH_BOX(&softcap));
  m.impl("softcap_argmax", TORCH_BOX(&softcap_argmax));
}

}  // namespace binding
