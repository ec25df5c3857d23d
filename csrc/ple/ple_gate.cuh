// y = gelu_tanh(gate) ple, with ple the layer's slice of the per-layer embeddings;
// finite in fp16 too.
//
// One thread, one piece; the slice is read in place by its stride. Bound: width
// (sizeof(T) + 2 sizeof(R)) bytes of DRAM a row.
#pragma once

#include "../common/math.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

template <class T, class R, int kWidth>
__global__ void __launch_bounds__(256) ple_gate_kernel(const __grid_constant__ PleGateParams p) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * kWidth;
  if (column >= p.width) return;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < p.rows;
       row += gridDim.y * blockDim.y) {
    const auto gate =
        load_once<kWidth>(static_cast<const T*>(p.gate) + row * p.gate_stride + column);
    const auto ple = load_once<kWidth>(static_cast<const R*>(p.ple) + row * p.ple_stride + column);
    Vec<R, kWidth> y;
#pragma unroll
    for (int j = 0; j < kWidth; j++) y.set(j, saturate<R>(gelu_tanh(gate[j]) * ple[j]));
    store(static_cast<R*>(p.y) + row * p.width + column, y);
  }
}

}  // namespace gemma4
