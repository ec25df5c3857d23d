// y = gelu_tanh(gate) up, the halves of each row of gate_up; finite in fp16 too.
//
// One thread, one piece. Bound: 3 width sizeof(T) bytes of DRAM a row.
#pragma once

#include "../common/math.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

template <class T, int kWidth>
__global__ void __launch_bounds__(256) geglu_kernel(const __grid_constant__ GegluParams p) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * kWidth;
  if (column >= p.width) return;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < p.rows;
       row += gridDim.y * blockDim.y) {
    const T* gate_up = static_cast<const T*>(p.gate_up) + row * p.stride + column;
    const auto gate = load_once<kWidth>(gate_up), up = load_once<kWidth>(gate_up + p.width);
    Vec<T, kWidth> y;
#pragma unroll
    for (int j = 0; j < kWidth; j++) y.set(j, saturate<T>(gelu_tanh(gate[j]) * up[j]));
    store(static_cast<T*>(p.y) + row * p.width + column, y);
  }
}

}  // namespace gemma4
