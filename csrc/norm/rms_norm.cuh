// y = x (mean x² + eps)^-½ weight, for each row.
//
// A block owns a row at a time, and the weight stays in registers from row to row. One block sum a
// row. Shared memory: sizeof(BlockSum).
// Bound: 2 width sizeof(T) bytes of DRAM a row; for a single row, one load and one block sum.
#pragma once

#include "../common/reduce.cuh"
#include "../common/row.cuh"
#include "ops.h"

namespace gemma4 {

// How many blocks a multiprocessor must hold: with one vector a thread all of its 2048 threads;
// with four, left alone, the compiler keeps more than there are registers for, and spills.
template <class T, class W, int kVectors>
constexpr int kRmsNormBlocks = sizeof(W) > sizeof(T) ? 1
                               : kVectors == 1       ? 8
                               : kVectors == 4       ? 3
                                                     : 0;

template <class T, class W, int kVectors>
__global__ void __launch_bounds__(256, kRmsNormBlocks<T, W, kVectors>)
    rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  ptx::let_next_kernel_start();
  BlockSum& smem = shared_memory<BlockSum>();
  const ColumnsOf<kVectors, T> columns{p.width, threadIdx.x, blockDim.x};
  const auto weight = columns.load_first(static_cast<const W*>(p.weight), p.weight != nullptr);
  ptx::wait_for_previous_kernel();

  int parity = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    T* y_row = static_cast<T*>(p.y) + row * p.width;
    const auto x = columns.load_fresh(static_cast<const T*>(p.x) + row * p.x_stride);
    const float sum = block_sum(columns.sum_of_squares(x), smem, parity);
    const float scale = inv_rms(sum, p.width, p.eps);
    columns.each([&](int i, int column) {
      auto y = x.at(i, column);
      const auto w = weight.at(i, column);
#pragma unroll
      for (int j = 0; j < y.kWidth; j++) y.set(j, y[j] * scale * (p.weight ? w[j] : 1.0f));
      store(y_row + column, y);
    });
  }
}

}  // namespace gemma4
