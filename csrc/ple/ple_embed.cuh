// y = (rms_norm(projected) weight + token_scale table[id]) 2^-½, for each token and layer.
//
// A warp owns one layer's row of one token. The table may lie in pinned host memory: its rows are
// asked for before the norm, which hides behind the trip. An id of no row reads nothing and adds
// zero. No shared memory. Bound: L P (sizeof(T) + 2 sizeof(R)) bytes a token, the table's sizeof(R)
// over PCIe if it is the host's.
#pragma once

#include "../common/indices.cuh"
#include "../common/reduce.cuh"
#include "../common/row.cuh"
#include "ops.h"

namespace gemma4 {

constexpr float kInverseRoot2 = 0.70710678118654752f;

template <class T, class R, class W, int kVectors>
__global__ void __launch_bounds__(256) ple_embed_kernel(const __grid_constant__ PleEmbedParams p) {
  ptx::let_next_kernel_start();
  const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const ColumnsOf<kVectors, T, R> columns{p.width, lane, 32};
  const auto weight = columns.load_first(static_cast<const W*>(p.weight));
  ptx::wait_for_previous_kernel();

  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const int64_t id = index_at(p.ids, token);
    const bool known = id >= 0 && id < p.vocabulary;
    for (int layer = blockIdx.y * warps + threadIdx.x / 32; layer < p.layers;
         layer += gridDim.y * warps) {
      const int64_t offset = int64_t{layer} * p.width;
      const auto embedding =
          columns.load_once(static_cast<const R*>(p.table) + id * p.table_stride + offset, known);
      const auto x = columns.load_fresh(static_cast<const T*>(p.projected) +
                                        token * p.projected_stride + offset);
      R* y_row = static_cast<R*>(p.y) + (token * p.layers + layer) * p.width;
      const float scale = inv_rms(lane_sum(columns.sum_of_squares(x)), p.width, p.eps);
      columns.each([&](int i, int column) {
        auto y = embedding.at(i, column);
        const auto projected = x.at(i, column);
        const auto w = weight.at(i, column);
#pragma unroll
        for (int j = 0; j < y.kWidth; j++)
          y.set(j, (projected[j] * scale * w[j] + y[j] * p.token_scale) * kInverseRoot2);
        store(y_row + column, y);
      });
    }
  }
}

}  // namespace gemma4
