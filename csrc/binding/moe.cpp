#include "../moe/ops.h"

#include <cmath>
#include <tuple>
#include <utility>

#include "packed.h"
#include "register.h"
#include "torch.h"

namespace binding {
namespace {

std::tuple<Tensor, Tensor> moe_route(Tensor logits, Tensor per_expert_scale, int64_t k) {
  Call call(logits);
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [T, E], got ", text(shape_of(logits)));
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  STD_TORCH_CHECK(1 <= k && k <= num_experts, "k must lie in 1..E = ", num_experts, ", got ", k);
  const Rows rows = as_rows(logits);
  Tensor weights = call.empty({tokens, k}, ScalarType::Float);
  Tensor experts = call.empty({tokens, k}, ScalarType::Int);
  gemma4::moe_route({.logits = call.in("logits", rows.tensor),
                     .scale = call.floats("per_expert_scale", per_expert_scale, {num_experts}),
                     .weights = static_cast<float*>(call.out("weights", weights)),
                     .experts = static_cast<int32_t*>(call.out("experts", experts)),
                     .tokens = tokens,
                     .stride = rows.stride,
                     .num_experts = as_int("logits", num_experts),
                     .k = as_int("k", k)},
                    call.dtype(), call.device());
  return {weights, experts};
}

int64_t columns_of(const Tensor& weight) {
  const int64_t last = weight.dim() - 1;
  return is_packed(weight) ? weight.size(last - 1) * gemma4::kPackedColumns : weight.size(last);
}

// A weight [experts..., rows, width], packed if the others are, else in this dtype. A copy would be
// as large as the layer: what does not lie ready is refused.
gemma4::PackedWeight weight(Call& call, const char* name, const Tensor& t,
                            const OptionalTensor& scales, const OptionalTensor& row_scales,
                            Shape experts, int64_t rows, int64_t width, bool all_packed,
                            DType dtype) {
  STD_TORCH_CHECK(is_packed(t) == all_packed, name, " must be packed if the others are");
  if (all_packed) return packed(call, name, t, scales, row_scales, experts, rows, width);
  call.expect_here(name, t);
  STD_TORCH_CHECK(!scales && !row_scales, name, "_scales must come with a packed weight alone");
  STD_TORCH_CHECK(Call::dtype(t.scalar_type()) == dtype, name,
                  " must have the dtype of x, or of experts float32");
  experts.insert(experts.end(), {rows, width});
  expect_shape(name, t, experts);
  STD_TORCH_CHECK(t.is_contiguous() && is_aligned(t), name,
                  " must be contiguous and begin on a multiple of 16 bytes");
  return {.codes = call.in(name, t)};
}

Tensor moe_experts(Tensor x, Tensor gate_up, OptionalTensor gate_up_scales,
                   OptionalTensor gate_up_row_scales, Tensor down, OptionalTensor down_scales,
                   OptionalTensor down_row_scales, Tensor experts, Tensor weights) {
  Call call(x);
  const bool all_packed = is_packed(down);
  STD_TORCH_CHECK(x.dim() == 2 && down.dim() == (all_packed ? 4 : 3) && experts.dim() == 2,
                  "x must be [T, D], down [E, D, F] and experts [T, K]");
  const int64_t tokens = x.size(0), width = x.size(1), k = experts.size(1);
  const int64_t num_experts = down.size(0), hidden_width = columns_of(down);
  expect_shape("experts", experts, {tokens, k});
  STD_TORCH_CHECK(width % 8 == 0 && hidden_width % 8 == 0,
                  "there are kernels for widths that are multiples of 8, got ", width, " and ",
                  hidden_width);
  const DTypes dtypes = all_packed ? call.dtypes(x.scalar_type(), {})
                                   : call.dtypes(x.scalar_type(), {&gate_up, &down});
  const Shape each{num_experts};
  const int assignments = as_int("experts", tokens * k);
  const bool streams = gemma4::moe_experts_streams(tokens, k, num_experts);
  const Tensor& x_held = call.keep(aligned(x));
  Tensor y = call.empty({tokens, width});
  Tensor offsets = call.empty({num_experts + 1}, ScalarType::Int);
  Tensor order = call.empty({assignments}, ScalarType::Int);
  Tensor hidden = call.empty({assignments, hidden_width});
  Tensor expert_out = call.empty({streams ? 0 : assignments, width});
  gemma4::moe_experts(
      {.x = call.in("x", x_held),
       .gate_up = weight(call, "gate_up", gate_up, gate_up_scales, gate_up_row_scales, each,
                         2 * hidden_width, width, all_packed, dtypes.weight),
       .down = weight(call, "down", down, down_scales, down_row_scales, each, width, hidden_width,
                      all_packed, dtypes.weight),
       .experts = call.flat_indices("experts", experts),
       .weights = call.floats("weights", weights, {tokens, k}),
       .y = call.out("y", y),
       .offsets = static_cast<int32_t*>(call.out("offsets", offsets)),
       .order = static_cast<int32_t*>(call.out("order", order)),
       .hidden = call.out("hidden", hidden),
       .expert_out = call.out("expert_out", expert_out),
       .x_stride = x_held.stride(0),
       .tokens = as_int("x", tokens),
       .k = as_int("experts", k),
       .num_experts = as_int("down", num_experts),
       .width = as_int("x", width),
       .hidden_width = as_int("down", hidden_width),
       .packed = all_packed},
      dtypes, call.device());
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_experts_backward(
    Tensor grad, Tensor x, Tensor gate_up, OptionalTensor gate_up_scales,
    OptionalTensor gate_up_row_scales, Tensor down, OptionalTensor down_scales,
    OptionalTensor down_row_scales, Tensor experts, Tensor weights, bool wants_x,
    bool wants_gate_up, bool wants_down, bool wants_weights) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() == 2 && down.dim() == 3 && experts.dim() == 2,
                  "x must be [T, D], down [E, D, F], not packed, and experts [T, K]");
  const int64_t tokens = x.size(0), width = x.size(1), k = experts.size(1);
  const int64_t num_experts = down.size(0), hidden_width = down.size(2);
  expect_shape("experts", experts, {tokens, k});
  call.expect("grad", grad, {tokens, width});
  STD_TORCH_CHECK(width % 8 == 0 && hidden_width % 8 == 0,
                  "there are kernels for widths that are multiples of 8, got ", width, " and ",
                  hidden_width);
  const DTypes dtypes = call.dtypes(x.scalar_type(), {&gate_up, &down});
  const int64_t assignments = as_int("experts", tokens * k);
  const Tensor& x_held = call.keep(aligned(x));
  const Tensor& grad_held = call.keep(aligned(grad));
  // Empty unless it is wanted.
  const auto made = [&](bool wanted, const Shape& shape, ScalarType dtype) {
    return call.empty(wanted ? shape : Shape{0}, dtype);
  };
  const auto pointer = [&](const char* name, bool wanted, const Tensor& t) -> void* {
    return wanted ? call.out(name, t) : nullptr;
  };
  const ScalarType dtype = x.scalar_type();
  Tensor dx = made(wants_x, {tokens, width}, dtype);
  Tensor d_gate_up = made(wants_gate_up, shape_of(gate_up), gate_up.scalar_type());
  Tensor d_down = made(wants_down, shape_of(down), down.scalar_type());
  Tensor d_weights = made(wants_weights, {tokens, k}, ScalarType::Float);
  Tensor offsets = call.empty({num_experts + 1}, ScalarType::Int);
  Tensor order = call.empty({assignments}, ScalarType::Int);
  Tensor hidden = made(wants_down, {assignments, hidden_width}, dtype);
  Tensor d_pair = made(wants_x || wants_gate_up, {assignments, 2 * hidden_width}, dtype);
  Tensor dx_parts = made(wants_x, {assignments, width}, dtype);
  const int64_t tiles = (hidden_width + gemma4::kMoeHiddenColumns - 1) / gemma4::kMoeHiddenColumns;
  Tensor d_parts = made(wants_weights, {tiles, assignments}, ScalarType::Float);
  gemma4::MoeExpertsBackwardParams p{};
  p.x = call.in("x", x_held);
  p.grad = call.in("grad", grad_held);
  p.gate_up = weight(call, "gate_up", gate_up, gate_up_scales, gate_up_row_scales, {num_experts},
                     2 * hidden_width, width, false, dtypes.weight);
  p.down = weight(call, "down", down, down_scales, down_row_scales, {num_experts}, width,
                  hidden_width, false, dtypes.weight);
  p.experts = call.flat_indices("experts", experts);
  p.weights = call.floats("weights", weights, {tokens, k});
  p.y = pointer("dx", wants_x, dx);
  p.offsets = static_cast<int32_t*>(call.out("offsets", offsets));
  p.order = static_cast<int32_t*>(call.out("order", order));
  p.hidden = pointer("hidden", wants_down, hidden);
  p.expert_out = pointer("dx_parts", wants_x, dx_parts);
  p.d_pair = pointer("d_pair", wants_x || wants_gate_up, d_pair);
  p.d_parts = static_cast<float*>(pointer("d_parts", wants_weights, d_parts));
  p.hidden_tiles = as_int("down", tiles);
  p.d_gate_up = pointer("d_gate_up", wants_gate_up, d_gate_up);
  p.d_down = pointer("d_down", wants_down, d_down);
  p.d_weights = static_cast<float*>(pointer("d_weights", wants_weights, d_weights));
  p.x_stride = x_held.stride(0);
  p.grad_stride = grad_held.stride(0);
  p.tokens = as_int("x", tokens);
  p.k = as_int("experts", k);
  p.num_experts = as_int("down", num_experts);
  p.width = as_int("x", width);
  p.hidden_width = as_int("down", hidden_width);
  gemma4::moe_experts_backward(p, dtypes, call.device());
  const ScalarType of_weights = weights.scalar_type();
  return {dx, d_gate_up, d_down,
          of_weights == ScalarType::Float ? d_weights : torch::stable::to(d_weights, of_weights)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_open(Tensor x, Tensor residual, Tensor post_weight,
                                                    Tensor norm_weight, Tensor gate_up,
                                                    OptionalTensor gate_up_scales,
                                                    OptionalTensor gate_up_row_scales,
                                                    Tensor expert_weight, Tensor router_scale,
                                                    Tensor router, double eps) {
  Call call(x);
  const bool all_packed = is_packed(gate_up);
  STD_TORCH_CHECK(x.dim() == 2 && gate_up.dim() == (all_packed ? 3 : 2) && router.dim() == 2,
                  "x must be [T, D], gate_up [2 F, D] and router [E, D]");
  const int64_t tokens = x.size(0), width = x.size(1), num_experts = router.size(0);
  const int64_t height = gate_up.size(0) * (all_packed ? gemma4::kPackedRows : 1);
  const int64_t rows = height / 2;
  STD_TORCH_CHECK(tokens <= gemma4::kMostSmallTokens && width % 8 == 0 &&
                      height % (all_packed ? 32 : 16) == 0 && num_experts % 8 == 0 &&
                      width <= gemma4::kMostNormedWidth &&
                      tokens * width <= gemma4::kMostNormedElements,
                  "there are kernels for at most ", gemma4::kMostSmallTokens, " tokens, ",
                  gemma4::kMostNormedWidth, " columns, ", gemma4::kMostNormedElements,
                  " elements and widths that are multiples of 8, got ", text(shape_of(x)), ", ",
                  text(shape_of(gate_up)), " and ", text(shape_of(router)));
  const auto row = [&](const char* name, const Tensor& t) {
    call.expect(name, t, {width});
    return call.parameter(name, t, aligned(t));
  };
  const auto rows_of = [&](const char* name, const Tensor& t, int64_t& stride) {
    call.expect(name, t, {tokens, width});
    const Tensor& held = call.keep(aligned(t));
    stride = held.stride(0);
    return call.in(name, held);
  };
  Tensor hidden = call.empty({tokens, rows}), logits = call.empty({tokens, num_experts});
  Tensor expert_x = call.empty({tokens, width}), new_residual = call.empty({tokens, width});
  gemma4::MoeOpenParams p{};
  p.x = rows_of("x", x, p.x_stride);
  p.residual = rows_of("residual", residual, p.residual_stride);
  p.post_weight = row("post_weight", post_weight);
  p.norm_weight = row("norm_weight", norm_weight);
  p.expert_weight = row("expert_weight", expert_weight);
  p.router_scale = row("router_scale", router_scale);
  p.packed = all_packed;
  p.gate_up = weight(call, "gate_up", gate_up, gate_up_scales, gate_up_row_scales, {}, height,
                     width, all_packed, call.dtype());
  p.router = whole(call, "router", router, {num_experts, width});
  p.hidden = call.out("hidden", hidden);
  p.logits = call.out("logits", logits);
  p.expert_x = call.out("expert_x", expert_x);
  p.new_residual = call.out("new_residual", new_residual);
  p.tokens = as_int("x", tokens);
  p.width = as_int("x", width);
  p.rows = as_int("gate_up", rows);
  p.num_experts = as_int("router", num_experts);
  p.eps = static_cast<float>(eps);
  p.factor = 1.0f / std::sqrt(static_cast<float>(width));
  gemma4::moe_open(p, call.dtype(), call.device());
  return {hidden, logits, expert_x, new_residual};
}

std::tuple<Tensor, Tensor> moe_experts_small(
    Tensor x, Tensor gate_up, OptionalTensor gate_up_scales, OptionalTensor gate_up_row_scales,
    Tensor down, OptionalTensor down_scales, OptionalTensor down_row_scales, Tensor logits,
    Tensor per_expert_scale, int64_t k, Tensor dense_x, Tensor dense, OptionalTensor dense_scales,
    OptionalTensor dense_row_scales) {
  Call call(x);
  const int more = is_packed(down) ? 1 : 0;
  STD_TORCH_CHECK(x.dim() == 2 && down.dim() == 3 + more && logits.dim() == 2 &&
                      dense.dim() == 2 + more && is_packed(dense) == is_packed(down),
                  "x must be [T, D], down [E, D, F], logits [T, E] and dense [D, N]");
  const int64_t tokens = x.size(0), width = x.size(1), dense_width = columns_of(dense);
  const int64_t num_experts = down.size(0), hidden_width = columns_of(down);
  const int64_t assignments = tokens * k;
  STD_TORCH_CHECK(1 <= k && k <= num_experts, "k must lie in 1..E = ", num_experts, ", got ", k);
  STD_TORCH_CHECK(tokens <= gemma4::kMostSmallTokens &&
                      assignments <= gemma4::kMostSmallAssignments && k <= gemma4::kMostRoutes &&
                      num_experts <= gemma4::kMostSmallExperts && width % 8 == 0 &&
                      hidden_width > 0 && hidden_width % 8 == 0 && dense_width % 8 == 0,
                  "there are kernels for at most ", gemma4::kMostSmallTokens, " tokens, ",
                  gemma4::kMostSmallAssignments, " assignments, ", gemma4::kMostSmallExperts,
                  " experts and widths that are multiples of 8, got ", text(shape_of(x)), ", ", k,
                  " of ", text(shape_of(down)), " and ", text(shape_of(dense)));
  call.expect("x", x, {tokens, width});
  call.expect("logits", logits, {tokens, num_experts});
  call.expect("dense_x", dense_x, {tokens, dense_width});
  const Tensor& x_held = call.keep(aligned(x));
  const Rows logit_rows = as_rows(logits);
  const Tensor& dense_held = call.keep(aligned(dense_x));
  Tensor y = call.empty({tokens, width}), dense_y = call.empty({tokens, width});
  Tensor chosen = call.empty({assignments}, ScalarType::Int);
  Tensor chosen_weights = call.empty({assignments}, ScalarType::Float);
  Tensor offsets = call.empty({num_experts + 1}, ScalarType::Int);
  Tensor order = call.empty({assignments}, ScalarType::Int);
  Tensor hidden = call.empty({assignments, hidden_width});
  gemma4::MoeExpertsSmallParams p{};
  p.x = call.in("x", x_held);
  p.x_stride = x_held.stride(0);
  const auto matrix = [&](const char* name, const Tensor& t, const OptionalTensor& scales,
                          const OptionalTensor& row_scales, Shape experts, int64_t rows,
                          int64_t columns) {
    return weight(call, name, t, scales, row_scales, experts, rows, columns, p.packed,
                  call.dtype());
  };
  p.packed = is_packed(down);
  p.gate_up = matrix("gate_up", gate_up, gate_up_scales, gate_up_row_scales, {num_experts},
                     2 * hidden_width, width);
  p.down = matrix("down", down, down_scales, down_row_scales, {num_experts}, width, hidden_width);
  p.logits = call.in("logits", logit_rows.tensor);
  p.logits_stride = logit_rows.stride;
  p.scale = call.floats("per_expert_scale", per_expert_scale, {num_experts});
  p.dense_x = call.in("dense_x", dense_held);
  p.dense_stride = dense_held.stride(0);
  p.dense = matrix("dense", dense, dense_scales, dense_row_scales, {}, width, dense_width);
  STD_TORCH_CHECK(!p.packed || bits_of(p.dense.numbers) == bits_of(p.gate_up.numbers),
                  "gate_up and dense must have codes of as many bits");
  p.y = call.out("y", y);
  p.dense_y = call.out("dense_y", dense_y);
  p.chosen = static_cast<int32_t*>(call.out("chosen", chosen));
  p.chosen_weights = static_cast<float*>(call.out("chosen_weights", chosen_weights));
  p.offsets = static_cast<int32_t*>(call.out("offsets", offsets));
  p.order = static_cast<int32_t*>(call.out("order", order));
  p.hidden = call.out("hidden", hidden);
  p.tokens = as_int("x", tokens);
  p.k = as_int("k", k);
  p.num_experts = as_int("down", num_experts);
  p.width = as_int("x", width);
  p.hidden_width = as_int("down", hidden_width);
  p.dense_width = as_int("dense", dense_width);
  gemma4::moe_experts_small(p, call.dtype(), call.device());
  return {y, dense_y};
}

}  // namespace

void register_moe(Library& m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
  m.impl("moe_open", TORCH_BOX(&moe_open));
  m.impl("moe_experts_small", TORCH_BOX(&moe_experts_small));
}

}  // namespace binding
