// y = cap tanh(logits / cap).
//
// One thread, one vector. Bound: 2 width sizeof(T) bytes of DRAM a row.
#pragma once

#include "../common/elementwise.cuh"
#include "../common/math.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

template <class T, int kWidth>
__global__ void __launch_bounds__(kElementwiseThreads)
    softcap_kernel(const __grid_constant__ SoftcapParams p) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  each_row<kWidth>(p.rows, p.width, [&](int64_t row, int column) {
    const auto x = load_fresh<kWidth>(static_cast<const T*>(p.logits) + row * p.stride + column);
    Vec<T, kWidth> y;
#pragma unroll
    for (int j = 0; j < kWidth; j++) y.set(j, softcap(x[j], p.cap));
    store(static_cast<T*>(p.y) + row * p.width + column, y);
  });
}

}  // namespace gemma4
