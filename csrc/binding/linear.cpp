#include "../linear/ops.h"

#include "register.h"
#include "torch.h"

namespace binding {
namespace {

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
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("softcap", TORCH_BOX(&softcap));
  m.impl("softcap_argmax", TORCH_BOX(&softcap_argmax));
}

}  // namespace binding
