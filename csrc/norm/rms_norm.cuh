// y = x (mean x² + eps)^-½ weight, for each row.
//
// A block owns a row at a time: thread t holds its pieces t, t + threads, ... of 16 bytes in
// registers, so the row is read once, and the weight stays in registers from row to row. One block
// sum a row. Shared memory: sizeof(BlockSum).
// Bound: 2 width sizeof(T) bytes of DRAM a row; for a single row, one load and one block sum.
#pragma once

#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

template <class T, class W, int kPieces>
__global__ void __launch_bounds__(256, kLeastBlocks<T, W>)
    rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  constexpr int kWidth = kFullWidth<T>;
  BlockSum& smem = shared_memory<BlockSum>();
  const auto column = [](int piece) -> int { return (piece * blockDim.x + threadIdx.x) * kWidth; };

  Vec<W, kWidth> weight[kPieces] = {};
  if (p.weight) {
#pragma unroll
    for (int i = 0; i < kPieces; i++)
      if (column(i) < p.width)
        weight[i] = load<kWidth>(static_cast<const W*>(p.weight) + column(i));
  }

  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x_row = static_cast<const T*>(p.x) + row * p.x_stride;
    T* y_row = static_cast<T*>(p.y) + row * p.width;

    Vec<T, kWidth> x[kPieces] = {};
#pragma unroll
    for (int i = 0; i < kPieces; i++)
      if (column(i) < p.width) x[i] = load_once<kWidth>(x_row + column(i));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++) sum += sum_of_squares<kWidth>(x[i]);
    const float scale = 1.0f / sqrtf(block_sum(sum, smem, turn++) / p.width + p.eps);

#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      if (column(i) >= p.width) continue;
      Vec<T, kWidth> y;
#pragma unroll
      for (int j = 0; j < kWidth; j++) y.set(j, x[i][j] * scale * (p.weight ? weight[i][j] : 1.0f));
      store(y_row + column(i), y);
    }
  }
}

// Any width and alignment: an element at a time, the row read a second time, from L2.
template <class T, class W>
__global__ void __launch_bounds__(256)
    rms_norm_ragged_kernel(const __grid_constant__ RmsNormParams p) {
  BlockSum& smem = shared_memory<BlockSum>();
  const W* weight = static_cast<const W*>(p.weight);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* y = static_cast<T*>(p.y) + row * p.width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < p.width; i += blockDim.x) sum += to_float(x[i]) * to_float(x[i]);
    const float scale = 1.0f / sqrtf(block_sum(sum, smem, turn++) / p.width + p.eps);
    for (int i = threadIdx.x; i < p.width; i += blockDim.x)
      y[i] = from_float<T>(to_float(x[i]) * scale * (weight ? to_float(weight[i]) : 1.0f));
  }
}

}  // namespace gemma4
