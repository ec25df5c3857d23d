// out = Σ exp(lse_i - lse) out_i over the parts that a row's keys were divided into, lse =
// log Σ exp(lse_i). Up to kFan parts are merged at once, and kFan results of that again: in this
// order everywhere, so that the bits depend on nobody's being late.
#pragma once

#include "../common/tile.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

constexpr int kFan = 8, kMostSplits = kFan * kFan;

// Four columns of a row, of some of its keys; of no key, what stands here.
struct Part {
  float lse = -INFINITY, out[4] = {};
};

DEVICE Part merge(const Part (&parts)[kFan]) {
  float highest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kFan; i++) highest = fmaxf(highest, parts[i].lse);
  const float base = highest == -INFINITY ? 0.0f : highest;  // -inf - -inf would be NaN
  Part sum;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kFan; i++) {
    const float weight = expf(parts[i].lse - base);
    total += weight;
#pragma unroll
    for (int j = 0; j < 4; j++) sum.out[j] += weight * parts[i].out[j];
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
  for (int j = 0; j < 4; j++) sum.out[j] *= inverse;
  sum.lse = base + logf(total);
  return sum;
}

// A row of one part, among the rows of all tokens and heads.
struct PartRow {
  float *lse, *out;

  DEVICE PartRow(const AttentionParams& p, int part, int64_t token, int head) {
    const int64_t row = (part * p.tokens + token) * p.q_heads + head;
    lse = p.partial_lse + row;
    out = p.partial_out + row * p.head_dim;
  }
  DEVICE void store(int column, const Part& part) const {
    if (column == 0) *lse = part.lse;
    ptx::store_16(out + column, {__float_as_uint(part.out[0]), __float_as_uint(part.out[1]),
                                 __float_as_uint(part.out[2]), __float_as_uint(part.out[3])});
  }
};

// Merges the `count` parts from `first` on, in four columns of a row. All lse are on their way
// together and then all columns: one after the other each would wait for the whole way to L2. A
// part that saw no key left its columns unwritten.
DEVICE Part merge_parts(const AttentionParams& p, int first, int count, int64_t token, int head,
                        int column) {
  Part parts[kFan];
#pragma unroll
  for (int i = 0; i < kFan; i++)
    if (i < count) parts[i].lse = *PartRow(p, first + i, token, head).lse;
#pragma unroll
  for (int i = 0; i < kFan; i++)
    if (parts[i].lse != -INFINITY) {
      const uint4 bits = ptx::load_16_coherent(PartRow(p, first + i, token, head).out + column);
      __builtin_memcpy(parts[i].out, &bits, sizeof bits);
    }
  return merge(parts);
}

template <class T>
DEVICE void store_columns(T* to, const Part& part) {
  ptx::store_8(to,
               {pack_pair<T>(part.out[0], part.out[1]), pack_pair<T>(part.out[2], part.out[3])});
}

}  // namespace gemma4
