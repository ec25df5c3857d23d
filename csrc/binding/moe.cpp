#include "../moe/ops.h"

#include <tuple>
#include <utility>

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

Tensor moe_experts(Tensor x, Tensor gate_up, Tensor down, Tensor experts, Tensor weights) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() == 2 && down.dim() == 3 && experts.dim() == 2,
                  "x must be [T, D], down [E, D, F] and experts [T, K]");
  const int64_t tokens = x.size(0), width = x.size(1), k = experts.size(1);
  const int64_t num_experts = down.size(0), hidden_width = down.size(2);
  const DTypes dtypes = call.dtypes(x.scalar_type(), {&gate_up, &down});
  for (const auto& [name, t] : {std::pair("gate_up", &gate_up), std::pair("down", &down)}) {
    call.expect_here(name, *t);
    STD_TORCH_CHECK(Call::dtype(t->scalar_type()) == dtypes.weight, name,
                    " must be float32 or of the dtype of x, and the other like it");
  }
  expect_shape("gate_up", gate_up, {num_experts, 2 * hidden_width, width});
  expect_shape("down", down, {num_experts, width, hidden_width});
  expect_shape("experts", experts, {tokens, k});
  STD_TORCH_CHECK(width % 8 == 0 && hidden_width % 8 == 0,
                  "there are kernels for widths that are multiples of 8, got ", width, " and ",
                  hidden_width);
  // A copy would be as large as the layer.
  STD_TORCH_CHECK(
      gate_up.is_contiguous() && down.is_contiguous() && is_aligned(gate_up) && is_aligned(down),
      "gate_up and down must be contiguous and begin on a multiple of 16 bytes");
  const int assignments = as_int("experts", tokens * k);
  const bool streams = gemma4::moe_experts_streams(tokens, k, num_experts);
  const Tensor& x_held = call.keep(aligned(x));
  Tensor y = call.empty({tokens, width});
  Tensor offsets = call.empty({num_experts + 1}, ScalarType::Int);
  Tensor order = call.empty({assignments}, ScalarType::Int);
  Tensor hidden = call.empty({assignments, hidden_width});
  Tensor expert_out = call.empty({streams ? 0 : assignments, width});
  gemma4::moe_experts({.x = call.in("x", x_held),
                       .gate_up = call.in("gate_up", gate_up),
                       .down = call.in("down", down),
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
                       .hidden_width = as_int("down", hidden_width)},
                      dtypes, call.device());
  return y;
}

}  // namespace

void register_moe(Library& m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
}

}  // namespace binding
