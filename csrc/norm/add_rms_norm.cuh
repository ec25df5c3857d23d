// residual' = (residual + rms_norm(x) post_weight) scale, y = rms_norm(residual') next_weight.
//
// The sandwich between two branches in one pass. A block owns a row at a time, as in rms_norm.cuh;
// x, residual and both weights are loaded before the first sum, so that a single row costs one trip
// to memory and two block sums. residual' is rounded before it is normed: y must be the norm of
// what the next layer will read. Shared memory: sizeof(BlockSum). Bound: width (sizeof(T) + 3
// sizeof(R)) bytes of DRAM a row.
#pragma once

#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

template <class T, class R, class W, int kPieces>
__global__ void __launch_bounds__(256, kLeastBlocks<R, W>)
    add_rms_norm_kernel(const __grid_constant__ AddRmsNormParams p) {
  constexpr int kWidth = kFullWidth<T, R>;
  BlockSum& smem = shared_memory<BlockSum>();
  const auto column = [](int piece) -> int { return (piece * blockDim.x + threadIdx.x) * kWidth; };

  Vec<W, kWidth> post_weight[kPieces] = {}, next_weight[kPieces] = {};
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    if (column(i) >= p.width) continue;
    post_weight[i] = load<kWidth>(static_cast<const W*>(p.post_weight) + column(i));
    if (p.y) next_weight[i] = load<kWidth>(static_cast<const W*>(p.next_weight) + column(i));
  }
  const float layer_scale = p.scale ? to_float(*static_cast<const W*>(p.scale)) : 1.0f;

  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x_row = static_cast<const T*>(p.x) + row * p.x_stride;
    const R* residual_row = static_cast<const R*>(p.residual) + row * p.residual_stride;
    Vec<T, kWidth> x[kPieces] = {};
    Vec<R, kWidth> residual[kPieces] = {};
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      if (column(i) >= p.width) continue;
      x[i] = load_once<kWidth>(x_row + column(i));
      residual[i] = load_once<kWidth>(residual_row + column(i));
    }

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++) sum += sum_of_squares<kWidth>(x[i]);
    const float post_scale = 1.0f / sqrtf(block_sum(sum, smem, turn++) / p.width + p.eps);

#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      if (column(i) >= p.width) continue;
#pragma unroll
      for (int j = 0; j < kWidth; j++)
        residual[i].set(j,
                        (residual[i][j] + x[i][j] * post_scale * post_weight[i][j]) * layer_scale);
      store(static_cast<R*>(p.new_residual) + row * p.width + column(i), residual[i]);
    }
    if (!p.y) continue;

    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++) sum += sum_of_squares<kWidth>(residual[i]);
    const float next_scale = 1.0f / sqrtf(block_sum(sum, smem, turn++) / p.width + p.eps);
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      if (column(i) >= p.width) continue;
      Vec<R, kWidth> y;
#pragma unroll
      for (int j = 0; j < kWidth; j++) y.set(j, residual[i][j] * next_scale * next_weight[i][j]);
      store(static_cast<R*>(p.y) + row * p.width + column(i), y);
    }
  }
}

// Any width and alignment. A thread reads back only what it wrote itself.
template <class T, class R, class W>
__global__ void __launch_bounds__(256)
    add_rms_norm_ragged_kernel(const __grid_constant__ AddRmsNormParams p) {
  BlockSum& smem = shared_memory<BlockSum>();
  const W* post_weight = static_cast<const W*>(p.post_weight);
  const W* next_weight = static_cast<const W*>(p.next_weight);
  const float layer_scale = p.scale ? to_float(*static_cast<const W*>(p.scale)) : 1.0f;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const R* residual = static_cast<const R*>(p.residual) + row * p.residual_stride;
    R* new_residual = static_cast<R*>(p.new_residual) + row * p.width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < p.width; i += blockDim.x) sum += to_float(x[i]) * to_float(x[i]);
    const float post_scale = 1.0f / sqrtf(block_sum(sum, smem, turn++) / p.width + p.eps);
    sum = 0.0f;
    for (int i = threadIdx.x; i < p.width; i += blockDim.x) {
      const float branch = to_float(x[i]) * post_scale * to_float(post_weight[i]);
      const R r = from_float<R>((to_float(residual[i]) + branch) * layer_scale);
      new_residual[i] = r;
      sum += to_float(r) * to_float(r);
    }
    if (!p.y) continue;
    const float next_scale = 1.0f / sqrtf(block_sum(sum, smem, turn++) / p.width + p.eps);
    R* y = static_cast<R*>(p.y) + row * p.width;
    for (int i = threadIdx.x; i < p.width; i += blockDim.x)
      y[i] = from_float<R>(to_float(new_residual[i]) * next_scale * to_float(next_weight[i]));
  }
}

}  // namespace gemma4
