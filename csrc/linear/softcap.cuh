// y = cap tanh(logits / cap).
//
// One thread, one piece. Bound: 2 width sizeof(T) bytes of DRAM a row.
#pragma once

#include "../common/math.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

template <class T, int kWidth>
__global__ void __launch_bounds__(256) softcap_kernel(const __grid_constant__ SoftcapParams p) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * kWidth;
  if (column >= p.width) return;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < p.rows;
       row += gridDim.y * blockDim.y) {
    const auto x = load_once<kWidth>(static_cast<const T*>(p.logits) + row * p.stride + column);
    Vec<T, kWidth> y;
#pragma unroll
    for (int j = 0; j < kWidth; j++) y.set(j, softcap(x[j], p.cap));
    store(static_cast<T*>(p.y) + row * p.width + column, y);
  }
}

}  // namespace gemma4
