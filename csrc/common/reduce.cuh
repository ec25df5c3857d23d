// Sums over the lanes of a warp and over the warps of a block, in an order that never changes.
#pragma once

#include "platform.h"

namespace gemma4 {

// The sum over each group of kLanes neighbouring lanes, in all of them. A butterfly: both partners
// add the same two values, so all lanes get the same bits.
template <int kLanes = 32, class V>
DEVICE V lane_sum(V value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// The largest of each group of kLanes neighbouring lanes, in all of them.
template <int kLanes = 32, class V>
DEVICE V lane_max(V value) {
#pragma unroll
  for (int other = kLanes / 2; other > 0; other /= 2)
    value = max(value, __shfl_xor_sync(0xffffffffu, value, other));
  return value;
}

constexpr int kMaxWarps = 32;

// Partial sums of a block's warps, twice: while slow threads still read the one, fast threads may
// already fill the other, so that each sum costs one barrier.
struct BlockSum {
  float partial[2][kMaxWarps];
};

// The sum over all threads of a block of whole warps, in all of them. `parity` says which of the
// two it goes through, and turns to the other for the next sum.
DEVICE float block_sum(float value, BlockSum& shared, int& parity) {
  value = lane_sum(value);
  const int warps = blockDim.x / 32;
  if (warps == 1) return value;
  float* partial = shared.partial[parity];
  parity ^= 1;
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  return lane_sum(lane < warps ? partial[lane] : 0.0f);
}

}  // namespace gemma4
