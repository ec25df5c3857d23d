// n = x (mean x² + eps)^-½, y = n weight, router_x = (n scale) width^-½, for each row.
//
// What the experts and their router read of the same row, read once. A block owns a row at a time,
// as in rms_norm.cuh. `router_x` is rounded after each of its three products, where the reference
// rounds it: a router's choice between two close experts hangs on that. Shared memory:
// sizeof(BlockSum). Bound: width (2 sizeof(T) + sizeof(R)) bytes of DRAM a row.
#pragma once

#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

// Two outputs need registers: left alone, the compiler keeps too many blocks and spills for it.
template <class T, class R, class W, int kPieces>
__global__ void __launch_bounds__(256, 4 - kPieces / 2)
    moe_norm_kernel(const __grid_constant__ MoeNormParams p) {
  constexpr int kWidth = kFullWidth<T, R>;
  BlockSum& smem = shared_memory<BlockSum>();
  const auto column = [](int piece) -> int { return (piece * blockDim.x + threadIdx.x) * kWidth; };

  Vec<W, kWidth> weight[kPieces] = {}, scale[kPieces] = {};
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    if (column(i) >= p.width) continue;
    weight[i] = load<kWidth>(static_cast<const W*>(p.weight) + column(i));
    scale[i] = load<kWidth>(static_cast<const W*>(p.scale) + column(i));
  }

  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x_row = static_cast<const T*>(p.x) + row * p.x_stride;
    Vec<T, kWidth> x[kPieces] = {};
#pragma unroll
    for (int i = 0; i < kPieces; i++)
      if (column(i) < p.width) x[i] = load_once<kWidth>(x_row + column(i));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++) sum += sum_of_squares<kWidth>(x[i]);
    const float norm = 1.0f / sqrtf(block_sum(sum, smem, turn++) / p.width + p.eps);

#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      if (column(i) >= p.width) continue;
      Vec<T, kWidth> y;
      Vec<R, kWidth> router_x;
#pragma unroll
      for (int j = 0; j < kWidth; j++) {
        y.set(j, x[i][j] * norm * weight[i][j]);
        router_x.set(j, to_float(from_float<T>(x[i][j] * norm)) * scale[i][j]);
        router_x.set(j, router_x[j] * p.factor);
      }
      store(static_cast<T*>(p.y) + row * p.width + column(i), y);
      store(static_cast<R*>(p.router_x) + row * p.width + column(i), router_x);
    }
  }
}

// Any width and alignment: an element at a time, the row read a second time, from L2.
template <class T, class R, class W>
__global__ void __launch_bounds__(256)
    moe_norm_ragged_kernel(const __grid_constant__ MoeNormParams p) {
  BlockSum& smem = shared_memory<BlockSum>();
  const W* weight = static_cast<const W*>(p.weight);
  const W* scale = static_cast<const W*>(p.scale);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < p.width; i += blockDim.x) sum += to_float(x[i]) * to_float(x[i]);
    const float norm = 1.0f / sqrtf(block_sum(sum, smem, turn++) / p.width + p.eps);
    for (int i = threadIdx.x; i < p.width; i += blockDim.x) {
      const float n = to_float(x[i]) * norm;
      static_cast<T*>(p.y)[row * p.width + i] = from_float<T>(n * to_float(weight[i]));
      const R scaled = from_float<R>(to_float(from_float<T>(n)) * to_float(scale[i]));
      static_cast<R*>(p.router_x)[row * p.width + i] = from_float<R>(to_float(scaled) * p.factor);
    }
  }
}

}  // namespace gemma4
