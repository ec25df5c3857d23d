// out = Σ_s exp(lse_s - lse) out_s over the splits of the keys, lse = log Σ_s exp(lse_s).
//
// A block owns one row of one head, a thread four of its columns; the splits are taken in their
// order. A split whose lse is -inf saw no key and left its out unwritten. Bound: 4 C bytes of DRAM
// a row and split.
#pragma once

#include "../common/tile.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

template <class T>
__global__ void __launch_bounds__(128)
    attention_merge_kernel(const __grid_constant__ AttentionParams p) {
  const int64_t row = blockIdx.x, rows = p.tokens * p.q_heads;
  float highest = -INFINITY;
  for (int split = 0; split < p.splits; split++)
    highest = fmaxf(highest, p.partial_lse[split * rows + row]);

  float total = 0.0f, out[4] = {};
  for (int split = 0; split < p.splits; split++) {
    const float lse = p.partial_lse[split * rows + row];
    if (lse == -INFINITY) continue;
    const float weight = expf(lse - highest);
    const auto part =
        load_once<4>(p.partial_out + (split * rows + row) * p.head_dim + threadIdx.x * 4);
    total += weight;
#pragma unroll
    for (int j = 0; j < 4; j++) out[j] += weight * part[j];
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  T* to = static_cast<T*>(p.out) + row * p.head_dim + threadIdx.x * 4;
  ptx::store_8(to, {pack_pair<T>(out[0] * inverse, out[1] * inverse),
                    pack_pair<T>(out[2] * inverse, out[3] * inverse)});
  if (p.lse && threadIdx.x == 0) {
    const int64_t token = row / p.q_heads, head = row % p.q_heads;
    const int64_t b = token / p.new_tokens, query = token % p.new_tokens;
    p.lse[(b * p.q_heads + head) * p.lse_head_stride + query] =
        total == 0.0f ? -INFINITY : highest + logf(total);
  }
}

}  // namespace gemma4
