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
      const GatedGradient gradient = gated_gradient<R>(gate[j], other[j], grad[j]);
      d_gate.set(j, gradient.d_gate);
      d_other.set(j, gradient.d_other);
    }
    const int64_t at = row * p.d_stride + column;
    if (p.d_gate) store(static_cast<T*>(p.d_gate) + at, d_gate);
    if (p.d_other) store(static_cast<R*>(p.d_other) + at, d_other);
  });
}

}  // namespace gemma4
