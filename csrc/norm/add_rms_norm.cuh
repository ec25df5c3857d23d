// residual' = (residual + rms_norm(x) post_weight) scale, y = rms_norm(residual') next_weight.
//
// The sandwich between two branches in one pass. A block owns a row at a time, as in rms_norm.cuh;
// x, residual and both weights are loaded before the first sum, so that a single row costs one trip
// to memory and two block sums. residual' is rounded before it is normed: y must be the norm of
// what the next layer will read. Shared memory: sizeof(BlockSum). Bound: width (sizeof(T) + 3
// sizeof(R)) bytes of DRAM a row.
#pragma once

#include "../common/reduce.cuh"
#include "../common/row.cuh"
#include "ops.h"

namespace gemma4 {

// With four vectors a thread, left alone, the compiler keeps two blocks, and spills.
template <class T, class R, class W, int kVectors>
__global__ void __launch_bounds__(256, kVectors == 4 ? 1 : kLeastBlocks<R, W>)
    add_rms_norm_kernel(const __grid_constant__ AddRmsNormParams p) {
  ptx::let_next_kernel_start();
  BlockSum& smem = shared_memory<BlockSum>();
  const ColumnsOf<kVectors, T, R> columns{p.width, threadIdx.x, blockDim.x};
  const auto post_weight = columns.load_first(static_cast<const W*>(p.post_weight));
  const auto next_weight = columns.load_first(static_cast<const W*>(p.next_weight), p.y != nullptr);
  const float layer_scale =
      p.scale ? to_float(ptx::load_one_first(static_cast<const W*>(p.scale))) : 1.0f;
  ptx::wait_for_previous_kernel();

  int parity = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const auto x = columns.load_fresh(static_cast<const T*>(p.x) + row * p.x_stride);
    const auto residual =
        columns.load_fresh(static_cast<const R*>(p.residual) + row * p.residual_stride);
    R* residual_row = static_cast<R*>(p.new_residual) + row * p.width;
    const float x_sum = block_sum(columns.sum_of_squares(x), smem, parity);
    const float x_scale = inv_rms(x_sum, p.width, p.eps);
    auto new_residual = residual;
    columns.each([&](int i, int column) {
      auto r = residual.at(i, column);
      const auto branch = x.at(i, column);
      const auto w = post_weight.at(i, column);
#pragma unroll
      for (int j = 0; j < r.kWidth; j++)
        r.set(j, (r[j] + branch[j] * x_scale * w[j]) * layer_scale);
      new_residual.store(residual_row, i, column, r);
    });
    if (!p.y) continue;

    const float sum = block_sum(columns.sum_of_squares(new_residual), smem, parity);
    const float scale = inv_rms(sum, p.width, p.eps);
    columns.each([&](int i, int column) {
      auto y = new_residual.at(i, column);
      const auto w = next_weight.at(i, column);
#pragma unroll
      for (int j = 0; j < y.kWidth; j++) y.set(j, y[j] * scale * w[j]);
      store(static_cast<R*>(p.y) + row * p.width + column, y);
    });
  }
}

}  // namespace gemma4
