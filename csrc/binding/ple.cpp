#include "../ple/ops.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <tuple>

#include "register.h"
#include "torch.h"

namespace binding {
namespace {

// As the reference's embedding rounds it.
float round_to(ScalarType dtype, float x) {
  if (dtype == ScalarType::BFloat16) return torch::headeronly::BFloat16(x);
  if (dtype == ScalarType::Half) return torch::headeronly::Half(x);
  return x;
}

Tensor ple_embed(Tensor ids, Tensor table, Tensor projected, Tensor weight, double eps) {
  Call call(projected);
  STD_TORCH_CHECK(ids.dim() == 1 && table.dim() == 2 && weight.dim() == 1,
                  "ids must be [T], table [V, L P] and weight [P]");
  const int64_t tokens = ids.size(0), width = weight.size(0), columns = table.size(1);
  STD_TORCH_CHECK(width > 0 && columns % width == 0, "table must be [V, L P] with P = ", width,
                  ", got ", text(shape_of(table)));
  expect_shape("projected", projected, {tokens, columns});
  const ScalarType other = table.scalar_type();
  STD_TORCH_CHECK(other == call.promoted(other),
                  "table must be float32 or of the dtype of projected for a kernel to read it");
  const DTypes dtypes = call.dtypes(other, {&weight});
  const Rows table_rows = as_rows(table), projected_rows = as_rows(projected);
  const bool on_host = table.is_cpu() && !projected.is_cpu();
  if (!on_host) call.expect_here("table", table);
  const void* table_data =
      on_host ? mapped(table_rows.tensor.data_ptr()) : call.in("table", table_rows.tensor);
  STD_TORCH_CHECK(table_data || table.numel() == 0,
                  "table is in host memory and must be pinned for a kernel to read it");
  Tensor y = call.empty({tokens, columns / width, width}, other);
  gemma4::ple_embed(
      {.ids = call.indices("ids", ids, tokens),
       .table = table_data,
       .projected = call.in("projected", projected_rows.tensor),
       .weight = call.weight("weight", weight, width, dtypes.weight),
       .y = call.out("y", y),
       .tokens = tokens,
       .vocabulary = table.size(0),
       .table_stride = table_rows.stride,
       .projected_stride = projected_rows.stride,
       .layers = as_int("table", columns / width),
       .width = as_int("weight", width),
       .token_scale = round_to(table.scalar_type(), std::sqrt(static_cast<float>(width))),
       .eps = static_cast<float>(eps)},
      dtypes, call.device());
  return y;
}

// The layer's [T, P] of ple, in what gate and ple promote to.
Tensor layer_of(const Call& call, const Tensor& gate, const Tensor& ple, int64_t layer) {
  STD_TORCH_CHECK(gate.dim() == 2 && ple.dim() == 3, "gate must be [T, P] and ple [T, L, P]");
  call.expect_here("ple", ple);
  expect_shape("ple", ple, {gate.size(0), ple.size(1), gate.size(1)});
  STD_TORCH_CHECK(0 <= layer && layer < ple.size(1), "layer must lie in 0..L-1 = ", ple.size(1) - 1,
                  ", got ", layer);
  Tensor slice = torch::stable::select(ple, 1, layer);
  return slice.scalar_type() == call.promoted(slice.scalar_type()) ? slice : Call::as_float(slice);
}

Tensor ple_gate(Tensor gate, Tensor ple, int64_t layer) {
  Call call(gate);
  const Tensor slice = layer_of(call, gate, ple, layer);
  const ScalarType other = slice.scalar_type();
  const Rows gate_rows = as_rows(gate), layer_rows = as_rows(slice);
  Tensor y = call.empty(shape_of(gate), other);
  gemma4::ple_gate({.gate = call.in("gate", gate_rows.tensor),
                    .other = call.in("ple", layer_rows.tensor),
                    .y = call.out("y", y),
                    .rows = gate_rows.rows,
                    .gate_stride = gate_rows.stride,
                    .other_stride = layer_rows.stride,
                    .width = as_int("gate", gate.size(1))},
                   call.dtypes(other, {}), call.device());
  return y;
}

std::tuple<Tensor, Tensor> ple_gate_backward(Tensor grad, Tensor gate, Tensor ple, int64_t layer,
                                             bool wants_gate, bool wants_ple) {
  Call call(gate);
  const Tensor slice = layer_of(call, gate, ple, layer);
  const ScalarType other = slice.scalar_type();
  expect_dtype("grad", grad, other);
  call.expect_here("grad", grad);
  expect_shape("grad", grad, shape_of(gate));
  const Rows grad_rows = as_rows(grad), gate_rows = as_rows(gate), layer_rows = as_rows(slice);
  Tensor d_gate = call.empty(wants_gate ? shape_of(gate) : Shape{0});
  Tensor d_slice = call.empty(wants_ple ? shape_of(gate) : Shape{0}, other);
  gemma4::ple_gate_backward({.grad = call.in("grad", call.keep(grad_rows.tensor)),
                             .gate = call.in("gate", call.keep(gate_rows.tensor)),
                             .other = call.in("ple", call.keep(layer_rows.tensor)),
                             .d_gate = wants_gate ? call.out("d_gate", d_gate) : nullptr,
                             .d_other = wants_ple ? call.out("d_slice", d_slice) : nullptr,
                             .rows = gate_rows.rows,
                             .grad_stride = grad_rows.stride,
                             .gate_stride = gate_rows.stride,
                             .other_stride = layer_rows.stride,
                             .d_stride = gate.size(1),
                             .width = as_int("gate", gate.size(1))},
                            call.dtypes(other, {}), call.device());
  const bool narrow = ple.scalar_type() != other;
  return {d_gate, narrow ? torch::stable::to(d_slice, ple.scalar_type()) : d_slice};
}

}  // namespace

void register_ple(Library& m) {
  m.impl("ple_embed", TORCH_BOX(&ple_embed));
  m.impl("ple_gate", TORCH_BOX(&ple_gate));
  m.impl("ple_gate_backward", TORCH_BOX(&ple_gate_backward));
}

}  // namespace binding
