// y = gelu_tanh(gate) other: the gated product of an MLP, and of the per-layer embeddings; finite
// in fp16 too.
//
// One thread, one vector; both operands are read in place by their strides. Bound: width
// (sizeof(T) + 2 sizeof(R)) bytes of DRAM a row.
#pragma once

#include "../common/elementwise.cuh"
#include "../common/math.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

template <class T, class R, int kWidth>
__global__ void __launch_bounds__(kElementwiseThreads)
    gelu_mul_kernel(const __grid_constant__ GeluMulParams p) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  each_row<kWidth>(p.rows, p.width, [&](int64_t row, int column) {
    const T* gate_row = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const R* other_row = static_cast<const R*>(p.other) + row * p.other_stride;
    const auto gate = load_fresh<kWidth>(gate_row + column);
    const auto other = load_fresh<kWidth>(other_row + column);
    Vec<R, kWidth> y;
#pragma unroll
    for (int j = 0; j < kWidth; j++) y.set(j, gated<R>(gate[j], other[j]));
    store(static_cast<R*>(p.y) + row * p.width + column, y);
  });
}

}  // namespace gemma4
