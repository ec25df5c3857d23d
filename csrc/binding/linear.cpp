#include "../linear/ops.h"

#include <tuple>

#include "packed.h"
#include "register.h"
#include "torch.h"

namespace binding {
namespace {

Tensor linear_packed(Tensor x, Tensor weight, OptionalTensor weight_scales,
                     OptionalTensor weight_row_scales) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 3, "x must be [T, D] and weight one of codes");
  const int64_t tokens = x.size(0), width = x.size(1);
  const int64_t rows = weight.size(0) * gemma4::kPackedRows;
  gemma4::LinearPackedParams p{};
  call.expect("x", x, {tokens, width});
  const Tensor& held = call.keep(aligned(x));
  p.x = call.in("x", held);
  p.x_stride = held.stride(0);
  p.weight = packed(call, "weight", weight, weight_scales, weight_row_scales, {}, rows, width);
  Tensor y = call.empty({tokens, rows});
  p.y = call.out("y", y);
  p.tokens = tokens;
  p.width = as_int("x", width);
  p.rows = as_int("weight", rows);
  gemma4::linear_packed(p, call.dtype(), call.device());
  return y;
}

std::tuple<Tensor, Tensor> linear_small(Tensor x, Tensor weight, OptionalTensor weight_scales,
                                        OptionalTensor weight_row_scales, OptionalTensor residual,
                                        OptionalTensor post_weight, OptionalTensor scale,
                                        OptionalTensor norm_weight, OptionalTensor factor,
                                        OptionalTensor x_weight, OptionalTensor other,
                                        OptionalTensor other_weight, double eps, bool gated) {
  Call call(x);
  const bool four_or_eight = is_packed(weight);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == (four_or_eight ? 3 : 2),
                  "x must be [T, D] and weight [N, D]");
  STD_TORCH_CHECK(four_or_eight || (!weight_scales && !weight_row_scales),
                  "scales must come with a packed weight alone");
  const int64_t height = weight.size(0) * (four_or_eight ? gemma4::kPackedRows : 1);
  const int64_t tokens = x.size(0), width = x.size(1), rows = height / (gated ? 2 : 1);
  const bool normed = residual || norm_weight;
  STD_TORCH_CHECK(tokens <= gemma4::kMostSmallTokens && width % 8 == 0 &&
                      height % ((gated ? 2 : 1) * (four_or_eight ? 16 : 8)) == 0,
                  "there are kernels for at most ", gemma4::kMostSmallTokens,
                  " tokens and widths that are multiples of 8, got ", text(shape_of(x)), " and ",
                  text(shape_of(weight)));
  STD_TORCH_CHECK(!normed || (width <= gemma4::kMostNormedWidth &&
                              tokens * width <= gemma4::kMostNormedElements),
                  "there are kernels that norm up to ", gemma4::kMostNormedWidth, " columns and ",
                  gemma4::kMostNormedElements, " elements, got ", text(shape_of(x)));
  STD_TORCH_CHECK(!residual == !post_weight, "residual and post_weight must come together or not");
  STD_TORCH_CHECK(!scale || residual, "scale must not come without a residual");
  STD_TORCH_CHECK(
      !other == !x_weight && !other == !other_weight && (!other || residual),
      "x_weight, other and other_weight must come together and with a residual, or not");
  STD_TORCH_CHECK(!(gated && factor), "a gated product must not have a factor");
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
  if (four_or_eight)
    p.packed = packed(call, "weight", weight, weight_scales, weight_row_scales, {}, height, width);
  else
    p.weight = whole(call, "weight", weight, {height, width});
  p.other = rows_of("other", other, width, p.other_stride);
  p.x_weight = row("x_weight", x_weight, width);
  p.other_weight = row("other_weight", other_weight, width);
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

Tensor geglu_backward(Tensor grad, Tensor gate_up) {
  Call call(gate_up);
  Shape shape = shape_of(gate_up);
  STD_TORCH_CHECK(!shape.empty() && shape.back() % 2 == 0,
                  "gate_up must end in an even width, got ", text(shape));
  const int64_t width = shape.back() /= 2;
  call.expect("grad", grad, shape);
  const Rows rows = as_rows(gate_up), grad_rows = as_rows(grad);
  Tensor d_gate_up = call.empty(shape_of(gate_up));
  const int64_t half = width * gate_up.element_size();
  const void* gate = call.in("gate_up", call.keep(rows.tensor));
  void* d_gate = call.out("d_gate_up", d_gate_up);
  gemma4::geglu_backward({.grad = call.in("grad", call.keep(grad_rows.tensor)),
                          .gate = gate,
                          .other = static_cast<const char*>(gate) + half,
                          .d_gate = d_gate,
                          .d_other = static_cast<char*>(d_gate) + half,
                          .rows = rows.rows,
                          .grad_stride = grad_rows.stride,
                          .gate_stride = rows.stride,
                          .other_stride = rows.stride,
                          .d_stride = 2 * width,
                          .width = as_int("gate_up", width)},
                         call.dtype(), call.device());
  return d_gate_up;
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

std::tuple<Tensor, Tensor> softcap_cross_entropy(Tensor logits, Tensor targets, double cap) {
  Call call(logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits must be [T, V], got ",
                  text(shape_of(logits)));
  STD_TORCH_CHECK(cap >= 0, "cap must be at least 0, got ", cap);
  const Rows rows = as_rows(logits);
  const int64_t tokens = logits.size(0);
  Tensor nll = call.empty({tokens}, ScalarType::Float),
         lse = call.empty({tokens}, ScalarType::Float);
  gemma4::softcap_cross_entropy({.logits = call.in("logits", rows.tensor),
                                 .targets = call.indices("targets", targets, tokens),
                                 .nll = static_cast<float*>(call.out("nll", nll)),
                                 .lse = static_cast<float*>(call.out("lse", lse)),
                                 .rows = tokens,
                                 .stride = rows.stride,
                                 .width = as_int("logits", rows.width),
                                 .cap = static_cast<float>(cap)},
                                call.dtype(), call.device());
  return {nll, lse};
}

void softcap_cross_entropy_backward(Tensor logits, Tensor targets, Tensor lse, Tensor grad_nll,
                                    Tensor grad_lse, double cap, Tensor d_logits) {
  Call call(logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits must be [T, V], got ",
                  text(shape_of(logits)));
  STD_TORCH_CHECK(cap >= 0, "cap must be at least 0, got ", cap);
  call.expect("d_logits", d_logits, shape_of(logits));
  STD_TORCH_CHECK(d_logits.is_contiguous(), "d_logits must be contiguous");
  const Rows rows = as_rows(logits);
  const int64_t tokens = logits.size(0);
  const auto of_rows = [&](const char* name, const Tensor& t) {
    expect_dtype(name, t, ScalarType::Float);
    return static_cast<const float*>(call.floats(name, t, {tokens}).data);
  };
  gemma4::softcap_cross_entropy_backward({.logits = call.in("logits", call.keep(rows.tensor)),
                                          .d_logits = call.out("d_logits", d_logits),
                                          .targets = call.indices("targets", targets, tokens),
                                          .lse = of_rows("lse", lse),
                                          .grad_nll = of_rows("grad_nll", grad_nll),
                                          .grad_lse = of_rows("grad_lse", grad_lse),
                                          .rows = tokens,
                                          .stride = rows.stride,
                                          .width = as_int("logits", rows.width),
                                          .cap = static_cast<float>(cap)},
                                         call.dtype(), call.device());
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

void sample(Tensor logits, Tensor seeds, Tensor positions, Tensor ids, Tensor done, Tensor counters,
            Tensor eos, double cap, double temperature, int64_t top_k, double top_p, double min_p,
            int64_t pad) {
  Call call(logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits must be [B, V], got ",
                  text(shape_of(logits)));
  STD_TORCH_CHECK(eos.dim() == 1 && counters.dim() == 1,
                  "eos and counters must have one dimension");
  STD_TORCH_CHECK(cap >= 0 && temperature >= 0 && top_k >= 0 && top_p > 0 && top_p <= 1 &&
                      min_p >= 0 && min_p <= 1,
                  "cap, temperature, top_k, top_p or min_p is out of range");
  const int64_t rows = logits.size(0), width = logits.size(1);
  const bool draws = temperature > 0 && top_k != 1, cut = draws && (top_p < 1 || min_p > 0);
  const int64_t k = draws && top_k > 0 ? std::min(top_k, width) : 1;
  STD_TORCH_CHECK(k <= gemma4::kMostTopK && (top_k > 0 || !cut),
                  "there are kernels that cut to a top_k of at most ", gemma4::kMostTopK,
                  " tokens, or not at all");
  const auto row = [&](const char* name, const Tensor& t, ScalarType type, int64_t size) {
    expect_dtype(name, t, type);
    call.expect_here(name, t);
    expect_shape(name, t, {size});
    STD_TORCH_CHECK(size <= 1 || t.stride(0) == 1, name, " must be contiguous");
    return t;
  };
  const Rows all = as_rows(logits);
  gemma4::SampleParams p{};
  p.logits = call.in("logits", call.keep(all.tensor));
  p.stride = all.stride;
  p.rows = rows;
  p.width = as_int("logits", width);
  p.k = static_cast<int>(k);
  const int64_t parts = rows * gemma4::sample_parts(p.width);
  STD_TORCH_CHECK(counters.size(0) >= parts, "counters must hold ", parts, " numbers, got ",
                  text(shape_of(counters)));
  const auto in = [&](const char* name, const Tensor& t, int64_t size) {
    return static_cast<const int64_t*>(call.in(name, row(name, t, ScalarType::Long, size)));
  };
  const auto out = [&](const char* name, const Tensor& t, ScalarType type, int64_t size) {
    return call.out(name, row(name, t, type, size));
  };
  p.seeds = in("seeds", seeds, rows);
  p.positions = call.indices("positions", positions, rows);
  p.ids = static_cast<int64_t*>(out("ids", ids, ScalarType::Long, rows));
  p.done = static_cast<int64_t*>(out("done", done, ScalarType::Long, rows));
  p.counters = static_cast<unsigned*>(out("counters", counters, ScalarType::Int, counters.size(0)));
  p.eos = in("eos", eos, eos.size(0));
  p.eos_count = as_int("eos", eos.size(0));
  const int64_t nodes = gemma4::sample_nodes(p.width, p.k), slots = gemma4::sample_slots(p.k);
  p.kept = call.out("kept", call.keep(call.empty({rows, nodes, slots}, ScalarType::Long)));
  p.cap = static_cast<float>(cap);
  p.temperature = draws ? static_cast<float>(temperature) : 0.0f;
  p.top_p = static_cast<float>(top_p);
  p.min_p = static_cast<float>(min_p);
  p.pad = pad;
  gemma4::sample(p, call.dtype(), call.device());
}

}  // namespace

void register_linear(Library& m) {
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
  m.impl("linear_small", TORCH_BOX(&linear_small));
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
  m.impl("softcap", TORCH_BOX(&softcap));
  m.impl("softcap_cross_entropy", TORCH_BOX(&softcap_cross_entropy));
  m.impl("softcap_cross_entropy_backward", TORCH_BOX(&softcap_cross_entropy_backward));
  m.impl("softcap_argmax", TORCH_BOX(&softcap_argmax));
  m.impl("sample", TORCH_BOX(&sample));
}

}  // namespace binding
