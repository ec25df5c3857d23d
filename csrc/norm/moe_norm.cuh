// n = x (mean x² + eps)^-½, y = n weight, router_x = (n scale) width^-½, for each row.
//
// What the experts and their router read of the same row, read once. A block owns a row at a time,
// as in rms_norm.cuh. `router_x` is rounded after each of its three products, where the reference
// rounds it: a router's choice between two close experts hangs on that. Shared memory:
// sizeof(BlockSum). Bound: width (2 sizeof(T) + sizeof(R)) bytes of DRAM a row.
#pragma once

#include "../common/reduce.cuh"
#include "../common/row.cuh"
#include "ops.h"

namespace gemma4 {

// Two outputs need registers: left alone, the compiler keeps too many blocks and spills for it.
template <class T, class R, class W, int kVectors>
__global__ void __launch_bounds__(256, 4 - kVectors / 2)
    moe_norm_kernel(const __grid_constant__ MoeNormParams p) {
  ptx::let_next_kernel_start();
  BlockSum& smem = shared_memory<BlockSum>();
  const ColumnsOf<kVectors, T, R> columns{p.width, threadIdx.x, blockDim.x};
  const auto weight = columns.load_first(static_cast<const W*>(p.weight));
  const auto scale = columns.load_first(static_cast<const W*>(p.scale));
  ptx::wait_for_previous_kernel();

  int parity = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const auto x = columns.load_fresh(static_cast<const T*>(p.x) + row * p.x_stride);
    const float sum = block_sum(columns.sum_of_squares(x), smem, parity);
    const float x_scale = inv_rms(sum, p.width, p.eps);
    columns.each([&](int i, int column) {
      auto y = x.at(i, column);
      const auto w = weight.at(i, column), s = scale.at(i, column);
      Vec<R, y.kWidth> router_x;
#pragma unroll
      for (int j = 0; j < y.kWidth; j++) {
        const float n = y[j] * x_scale;
        y.set(j, n * w[j]);
        router_x.set(j, to_float(from_float<T>(n)) * s[j]);
        router_x.set(j, router_x[j] * p.factor);
      }
      store(static_cast<T*>(p.y) + row * p.width + column, y);
      store(static_cast<R*>(p.router_x) + row * p.width + column, router_x);
    });
  }
}

}  // namespace gemma4
