// d_other = grad gelu_tanh(gate), d_gate = grad other gelu_tanh'(gate), of y = gelu_tanh(gate)
// other; in fp16 zeros where y was held at its largest number.
//
// One thread, one vector; what is not wanted is not written. Bound: width (2 sizeof(T) +
// 3 sizeof(R)) bytes of DRAM a row.
#pragma once

#include "../common/elementwise.cuh"
#include "../common/math.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

// As gelu_tanh has it: x s of s = 1 / (1 + exp(-2u)), whose slope is s (1 - s) 2u'.
struct GeluTanh {
  float value, slope;
};
DEVICE GeluTanh sloped_gelu_tanh(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  const float s = 1.0f / (1.0f + expf(-2.0f * u));
  const float du = 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
  return {x * s, s + x * s * (1.0f - s) * 2.0f * du};
}

template <class T, class R, int kWidth>
__global__ void __launch_bounds__(kElementwiseThreads)
    gelu_mul_backward_kernel(const __grid_constant__ GeluMulBackwardParams p) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  each_row<kWidth>(p.rows, p.width, [&](int64_t row, int column) {
    const R* grad_row = static_cast<const R*>(p.grad) + row * p.grad_stride;
    const T* gate_row = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const R* other_row = static_cast<const R*>(p.other) + row * p.other_stride;
    const auto grad = load_fresh<kWidth>(grad_row + column);
    const auto gate = load_fresh<kWidth>(gate_row + column);
    const auto other = load_fresh<kWidth>(other_row + column);
    Vec<T, kWidth> d_gate;
    Vec<R, kWidth> d_other;
#pragma unroll
    for (int j = 0; j < kWidth; j++) {
      const GeluTanh gelu = sloped_gelu_tanh(gate[j]);
      const float y = gelu.value * other[j];
      const float passed = saturate<R>(y) == y || y != y ? grad[j] : 0.0f;
      d_gate.set(j, passed * other[j] * gelu.slope);
      d_other.set(j, passed * gelu.value);
    }
    const int64_t at = row * p.d_stride + column;
    if (p.d_gate) store(static_cast<T*>(p.d_gate) + at, d_gate);
    if (p.d_other) store(static_cast<R*>(p.d_other) + at, d_other);
  });
}

}  // namespace gemma4
