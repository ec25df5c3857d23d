// index = argmax of softcap(logits), the lowest among equals, the first NaN if there is one.
//
// Blocks (x: parts of a row, y: rows) find the best of their part and settle it with an atomic
// maximum of (value, ~index) packed into 64 bits, kept in the output itself; the maximum does not
// depend on the order of the blocks. A last tiny kernel unpacks the index. The capped value is
// rounded to T before it is compared, or logits that the cap makes equal would not be.
// Shared memory: sizeof(BlockMax). Bound: width sizeof(T) bytes of DRAM a row.
#pragma once

#include "../common/math.cuh"
#include "../common/order.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

struct BlockMax {
  Packed of_warp[kMaxWarps];
};

template <class T, int kWidth>
__global__ void __launch_bounds__(256)
    softcap_argmax_kernel(const __grid_constant__ SoftcapArgmaxParams p) {
  BlockMax& smem = shared_memory<BlockMax>();
  const T* logits = static_cast<const T*>(p.logits) + blockIdx.y * p.stride;
  Packed best = 0;
  for (int column = (blockIdx.x * blockDim.x + threadIdx.x) * kWidth; column < p.width;
       column += gridDim.x * blockDim.x * kWidth) {
    const auto x = load_once<kWidth>(logits + column);
#pragma unroll
    for (int j = 0; j < kWidth; j++)
      best = max(best, pack(to_float(from_float<T>(softcap(x[j], p.cap))), column + j));
  }
  best = lane_max(best);
  if (threadIdx.x % 32 == 0) smem.of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned warp = 1; warp < blockDim.x / 32; warp++) best = max(best, smem.of_warp[warp]);
  atomicMax(static_cast<Packed*>(p.index) + blockIdx.y, best);
}

// A template, for a plain kernel would be defined in each object that includes it.
template <int = 0>
__global__ void __launch_bounds__(256)
    softcap_argmax_unpack_kernel(const __grid_constant__ SoftcapArgmaxParams p) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  Packed* index = static_cast<Packed*>(p.index) + row;
  *index = ~static_cast<unsigned>(*index);
}

}  // namespace gemma4
