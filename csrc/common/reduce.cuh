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
// already fill the other, so that each call costs one barrier.
template <int kSums>
struct BlockSums {
  float partial[2][kSums][kMaxWarps];
};
using BlockSum = BlockSums<1>;

// The sums over all threads of a block of whole warps, in all of them. `parity` says which of the
// two they go through, and turns to the other for the next ones.
template <int kSums>
DEVICE void block_sums(float (&values)[kSums], BlockSums<kSums>& shared, int& parity) {
#pragma unroll
  for (float& value : values) value = lane_sum(value);
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (warps == 1) return;
  auto& partial = shared.partial[parity];
  parity ^= 1;
#pragma unroll
  for (int i = 0; i < kSums; i++)
    if (lane == 0) partial[i][threadIdx.x / 32] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; i++) values[i] = lane_sum(lane < warps ? partial[i][lane] : 0.0f);
}

DEVICE float block_sum(float value, BlockSum& shared, int& parity) {
  float values[] = {value};
  block_sums(values, shared, parity);
  return values[0];
}

}  // namespace gemma4
