// y = (rms_norm(projected) weight + token_scale table[id]) 2^-½, for each token and layer.
//
// A warp owns one layer's row of one token; its lanes hold kPieces pieces each. The table may lie
// in pinned host memory: its rows are asked for before the norm, which hides behind the trip. An id
// of no row reads nothing and adds zero. No shared memory. Bound: L P (sizeof(T) + 2 sizeof(R))
// bytes a token, the table's sizeof(R) over PCIe if it is the host's.
#pragma once

#include "../common/indices.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

constexpr float kInverseRoot2 = 0.70710678118654752f;

template <class T, class R, class W, int kWidth, int kPieces>
__global__ void __launch_bounds__(256) ple_embed_kernel(const __grid_constant__ PleEmbedParams p) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const auto column = [&](int piece) { return (piece * 32 + lane) * kWidth; };
  Vec<W, kWidth> weight[kPieces] = {};
#pragma unroll
  for (int i = 0; i < kPieces; i++)
    if (column(i) < p.width) weight[i] = load<kWidth>(static_cast<const W*>(p.weight) + column(i));

  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const int64_t id = index_at(p.ids, token);
    const bool known = id >= 0 && id < p.vocabulary;
    for (int layer = blockIdx.y * warps + threadIdx.x / 32; layer < p.layers;
         layer += gridDim.y * warps) {
      const int64_t offset = int64_t{layer} * p.width;
      const R* table = static_cast<const R*>(p.table) + id * p.table_stride + offset;
      const T* projected = static_cast<const T*>(p.projected) + token * p.projected_stride + offset;
      R* y = static_cast<R*>(p.y) + (token * p.layers + layer) * p.width;
      Vec<R, kWidth> row[kPieces] = {};
      Vec<T, kWidth> x[kPieces] = {};
#pragma unroll
      for (int i = 0; i < kPieces; i++) {
        if (column(i) >= p.width) continue;
        if (known) row[i] = load_once<kWidth>(table + column(i));
        x[i] = load_once<kWidth>(projected + column(i));
      }
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kPieces; i++) sum += sum_of_squares<kWidth>(x[i]);
      const float scale = 1.0f / sqrtf(lane_sum(sum) / p.width + p.eps);
#pragma unroll
      for (int i = 0; i < kPieces; i++) {
        if (column(i) >= p.width) continue;
        Vec<R, kWidth> out;
#pragma unroll
        for (int j = 0; j < kWidth; j++)
          out.set(j, (x[i][j] * scale * weight[i][j] + row[i][j] * p.token_scale) * kInverseRoot2);
        store(y + column(i), out);
      }
    }
  }
}

// Any width and alignment: the row is read a second time.
template <class T, class R, class W>
__global__ void __launch_bounds__(256)
    ple_embed_ragged_kernel(const __grid_constant__ PleEmbedParams p) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const W* weight = static_cast<const W*>(p.weight);
  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const int64_t id = index_at(p.ids, token);
    const bool known = id >= 0 && id < p.vocabulary;
    for (int layer = blockIdx.y * warps + threadIdx.x / 32; layer < p.layers;
         layer += gridDim.y * warps) {
      const int64_t offset = int64_t{layer} * p.width;
      const R* table = static_cast<const R*>(p.table) + id * p.table_stride + offset;
      const T* x = static_cast<const T*>(p.projected) + token * p.projected_stride + offset;
      R* y = static_cast<R*>(p.y) + (token * p.layers + layer) * p.width;
      float sum = 0.0f;
      for (int i = lane; i < p.width; i += 32) sum += to_float(x[i]) * to_float(x[i]);
      const float scale = 1.0f / sqrtf(lane_sum(sum) / p.width + p.eps);
      for (int i = lane; i < p.width; i += 32) {
        const float row = known ? to_float(table[i]) * p.token_scale : 0.0f;
        y[i] = from_float<R>((to_float(x[i]) * scale * to_float(weight[i]) + row) * kInverseRoot2);
      }
    }
  }
}

}  // namespace gemma4
