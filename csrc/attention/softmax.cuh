// The softmax of scores that come a tile at a time.
#pragma once

#include "../common/math.cuh"
#include "../common/tile.cuh"
#include "sequence.cuh"

namespace gemma4 {

// Scores become multiples of ln 2, which exp2 wants.
template <bool kSoftcap, int kCount>
DEVICE void scale_scores(float (&score)[kCount][4], const AttentionParams& p) {
#pragma unroll
  for (int n = 0; n < kCount; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      score[n][e] = kSoftcap ? softcap_fast(score[n][e] * p.scale, p.softcap) * kLog2e
                             : score[n][e] * (p.scale * kLog2e);
}

// The tile begins at key `first`; a lane's two rows see the keys in visible.
template <int kCount>
DEVICE void mask_scores(float (&score)[kCount][4], int first, const KeyRange (&visible)[2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kCount; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int j = first + n * 8 + lane % 4 * 2 + e % 2;
      if (j < visible[e / 2].begin || j >= visible[e / 2].end) score[n][e] = -INFINITY;
    }
}

// The softmax of the warp's rows, a tile of scores at a time: each lane keeps two rows' maximum and
// its part of their sum.
template <class Tile>
struct OnlineSoftmax {
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};

  // Makes weights of scores, which are multiples of ln 2, and rescales what stands in out. Values
  // are multiplied with of_codes(weight, n, e), e being 0 or 1, of scores e and e + 2 of score[n].
  template <class T, class OfCodes>
  DEVICE void update(uint32_t (&weight)[Tile::kKeys / 8][2],
                     const float (&score)[Tile::kKeys / 8][4], float (&out)[Tile::kColumns / 8][4],
                     const OfCodes& of_codes) {
    float rescale[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float new_max = row_max[i];
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; n++)
        new_max = fmaxf(new_max, fmaxf(score[n][2 * i], score[n][2 * i + 1]));
      new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 1));
      new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 2));
      // A row that has seen no key yet: -inf - -inf would be NaN.
      const float base = new_max == -INFINITY ? 0.0f : new_max;
      rescale[i] = ptx::exp2_approx(row_max[i] - base);
      row_max[i] = new_max;
      row_sum[i] *= rescale[i];
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; n++) {
        const float low = ptx::exp2_approx(score[n][2 * i] - base);
        const float high = ptx::exp2_approx(score[n][2 * i + 1] - base);
        row_sum[i] += low + high;
        weight[n][i] = pack_pair<T>(of_codes(low, n, 0), of_codes(high, n, 1));
      }
    }
    // Once the maxima stand still, which is soon, there is nothing to rescale.
    if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < Tile::kColumns / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) out[n][e] *= rescale[e / 2];
    }
  }

  // After the last tile: sums of whole rows.
  DEVICE void reduce() {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      row_sum[i] += __shfl_xor_sync(0xffffffffu, row_sum[i], 1);
      row_sum[i] += __shfl_xor_sync(0xffffffffu, row_sum[i], 2);
    }
  }
  DEVICE float inverse(int i) const {
    return row_sum[i] > 0.0f ? 1.0f / row_sum[i] : row_sum[i];  // NaN stays NaN
  }
  DEVICE float lse(int i) const { return (row_max[i] + log2f(row_sum[i])) * kLn2; }  // no key: -inf
};

}  // namespace gemma4
