// nll = lse - x[target], lse = log Σ exp x, of x = softcap(logits, cap), or the logits where the
// cap is 0; 0 and 0 of an ignored row, which is not read; nll NaN where the target is no token.
//
// A block owns a row and reads it once: each thread keeps the largest x of its columns and the sum
// of exp2 of the others beside it (online log-sum-exp), which lanes and warps then merge in a fixed
// order. A chunk of a loss has more rows than a card has multiprocessors, so that a row needs no
// second block.
// Shared memory: sizeof(BlockLogSum). Bound: width sizeof(T) bytes of DRAM a row; with a cap, three
// instructions of the special function unit an element take 1.2 times as long for 16-bit logits.
#pragma once

#include <cfloat>

#include "../common/indices.cuh"
#include "../common/math.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

constexpr int kCrossEntropyThreads = 512;

// Σ 2^x as sum · 2^top. The top is finite from the start: -∞ less -∞ would be NaN.
struct LogSum {
  float top = -FLT_MAX, sum = 0.0f;

  template <int kCount>
  DEVICE void add(const float (&x)[kCount]) {
    float higher = top;
#pragma unroll
    for (const float value : x) higher = fmaxf(higher, value);
    sum *= ptx::exp2_approx(top - higher);
#pragma unroll
    for (const float value : x) sum += ptx::exp2_approx(value - higher);
    top = higher;
  }
};

DEVICE LogSum lane_merge(LogSum mine) {
  const float top = lane_max(mine.top);
  return {top, lane_sum(mine.sum * ptx::exp2_approx(mine.top - top))};
}

struct BlockLogSum {
  LogSum of_warp[kCrossEntropyThreads / 32];
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    softcap_cross_entropy_kernel(const __grid_constant__ CrossEntropyParams p) {
  constexpr int kBatch = 4;  // loads of a thread in flight
  BlockLogSum& smem = shared_memory<BlockLogSum>();
  const int64_t row = blockIdx.x, target = index_at(p.targets, row);
  if (target == kIgnoredTarget) {
    if (threadIdx.x == 0) p.nll[row] = p.lse[row] = 0.0f;
    return;
  }
  const T* logits = static_cast<const T*>(p.logits) + row * p.stride;
  const auto capped = [&](float x) { return p.cap > 0.0f ? sloped_softcap(x, p.cap).value : x; };
  LogSum mine;
  constexpr int kStep = kCrossEntropyThreads * kWidth;
  for (int first = threadIdx.x * kWidth; first < p.width; first += kBatch * kStep) {
    Vec<T, kWidth> loaded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      if (first + i * kStep < p.width) loaded[i] = load_once<kWidth>(logits + first + i * kStep);
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      if (first + i * kStep >= p.width) break;
      float x[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; j++) x[j] = capped(loaded[i][j]) * kLog2e;
      mine.add(x);
    }
  }
  const int lane = threadIdx.x % 32;
  mine = lane_merge(mine);
  if (lane == 0) smem.of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  mine = lane_merge(lane < kCrossEntropyThreads / 32 ? smem.of_warp[lane] : LogSum{});
  if (lane != 0) return;
  const float lse = (mine.top + log2f(mine.sum)) * kLn2;
  const bool known = 0 <= target && target < p.width;
  p.nll[row] = known ? lse - capped(to_float(logits[target])) : NAN;
  p.lse[row] = lse;
}

}  // namespace gemma4
