// order = the assignments sorted by expert, offsets = where each expert's begin; no host reads.
//
// Block e looks at all assignments: how many go to lower experts gives its offset, and its own
// follow in their order. A warp takes one contiguous share of the assignments, counts, and after
// one barrier knows where its own go. Blocks do not talk to each other; they read the assignments
// E times, from L2, which is little beside one expert's weights.
// Shared memory: sizeof(MoeSortSmem). Bound: latency, 2 A / 1024 loads.
#pragma once

#include "../common/indices.cuh"
#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "ops.h"

namespace gemma4 {

struct MoeSortSmem {
  int lower[kMaxWarps], own[kMaxWarps];
};

// Templated for nothing but the header's sake: a plain kernel would be defined in each object.
template <int = 0>
__global__ void __launch_bounds__(1024)
    moe_sort_kernel(const __grid_constant__ MoeExpertsParams p) {
  MoeSortSmem& smem = shared_memory<MoeSortSmem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t expert = blockIdx.x, all = int64_t{p.tokens} * p.k;
  const int64_t share = (all + blockDim.x - 1) / blockDim.x * 32;
  const int64_t begin = min(warp * share, all), end = min(begin + share, all);

  int lower = 0, own = 0;
  for (int64_t a = begin + lane; a < end; a += 32) {
    const int64_t e = index_at(p.experts, a);
    lower += e >= 0 && e < expert;
    own += e == expert;
  }
  lower = lane_sum(lower);
  own = lane_sum(own);
  if (lane == 0) {
    smem.lower[warp] = lower;
    smem.own[warp] = own;
  }
  __syncthreads();
  const int offset = lane_sum(lane < warps ? smem.lower[lane] : 0);
  const int others = lane < warps ? smem.own[lane] : 0;
  int to = offset + lane_sum(lane < warp ? others : 0);
  if (threadIdx.x == 0) p.offsets[expert] = offset;
  const int total = lane_sum(others);
  if (threadIdx.x == 0 && expert == p.num_experts - 1) p.offsets[expert + 1] = offset + total;

  for (int64_t first = begin; first < end; first += 32) {
    const int64_t a = first + lane;
    const bool mine = a < end && index_at(p.experts, a) == expert;
    const unsigned found = __ballot_sync(0xffffffffu, mine);
    if (mine) p.order[to + __popc(found & ((1u << lane) - 1))] = static_cast<int>(a);
    to += __popc(found);
  }
}

// Some of the sorted assignments of one expert: order[begin] .. order[begin + rows - 1].
struct MoeTile {
  int expert, begin, rows;  // rows 0: there is none
};

// Tile n when each expert's assignments, which begin at these offsets, are cut into tiles of
// most_rows. All of a warp's lanes ask for the same one.
DEVICE MoeTile moe_tile(const int32_t* offsets, int num_experts, int n, int most_rows) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < num_experts; first += 32) {
    const int begin = offsets[min(first + lane, num_experts)];
    const int end = offsets[min(first + lane + 1, num_experts)];
    const int tiles = (end - begin + most_rows - 1) / most_rows;
    int through = tiles;  // of this lane's expert and those before it
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, through, step);
      if (lane >= step) through += before;
    }
    const unsigned beyond = __ballot_sync(0xffffffffu, through > n);
    if (beyond != 0) {
      const int owner = __ffs(beyond) - 1;
      const int skipped = (n - __shfl_sync(0xffffffffu, through - tiles, owner)) * most_rows;
      const int from = __shfl_sync(0xffffffffu, begin, owner) + skipped;
      return {first + owner, from, min(most_rows, __shfl_sync(0xffffffffu, end, owner) - from)};
    }
    n -= __shfl_sync(0xffffffffu, through, 31);
  }
  return {0, 0, 0};
}

// How many tiles there may be, whatever the router chose.
inline int64_t most_moe_tiles(const MoeExpertsParams& p, int64_t most_rows) {
  const int64_t all = int64_t{p.tokens} * p.k;
  const int64_t touched = all < p.num_experts ? all : p.num_experts;
  return p.tokens <= most_rows ? touched : touched + all / most_rows;
}

}  // namespace gemma4
