// Merges the splits that attention left, as merge.cuh says, in a launch of its own. A block owns
// one row of one head, a thread four of its columns. Bound: 4 C bytes of DRAM a row and split.
#pragma once

#include "merge.cuh"

namespace gemma4 {

template <class T>
__global__ void __launch_bounds__(128)
    attention_merge_kernel(const __grid_constant__ AttentionParams p) {
  const int64_t row = blockIdx.x;
  const int64_t token = row / p.q_heads;
  const int head = static_cast<int>(row - token * p.q_heads), column = threadIdx.x * 4;
  Part knots[kFan];
#pragma unroll
  for (int i = 0; i < kFan; i++) {
    const int count = p.splits.divisor - i * kFan;
    if (count > 0) knots[i] = merge_parts(p, i * kFan, count, token, head, column);
  }
  const Part all = merge(knots);
  store_columns(static_cast<T*>(p.out) + row * p.head_dim + column, all);
  if (p.lse && threadIdx.x == 0) {
    const int64_t b = token / p.new_tokens, query = token - b * p.new_tokens;
    p.lse[(b * p.q_heads + head) * p.lse_head_stride + query] = all.lse;
  }
}

}  // namespace gemma4
