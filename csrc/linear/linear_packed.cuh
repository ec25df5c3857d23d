// y = x Wᵀ of many tokens, W packed: tiles of kRows tokens, 128 weight rows and 64 columns.
//
// How a tile is multiplied is in tiles.cuh. Tokens come by asynchronous copies; a warp reads two of
// a stage's eight packed tiles into registers a stage ahead, and makes numbers of T of them, times
// their scales, on the way to shared memory. Row scales are the sums'. Blocks of one tile of tokens
// follow each other: they share its rows, and with the next ones the weights, from L2.
//
// Shared memory: sizeof(ProductTiles). Bound: tensor cores; where one tile has all tokens, the
// weights, from DRAM.
#pragma once

#include "ops.h"
#include "packed.cuh"
#include "tiles.cuh"

namespace gemma4 {

template <class T, int kBits, int kRows>
__global__ void __launch_bounds__(kTileThreads)
    linear_packed_kernel(const __grid_constant__ LinearPackedParams p) {
  constexpr int kWarpTiles = kTileWeightRows / kPackedRows / (kTileThreads / 32);
  auto& smem = shared_memory<ProductTiles<T, kRows>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int weight_tiles = (p.rows + kTileWeightRows - 1) / kTileWeightRows;
  const int first_row = static_cast<int>(blockIdx.x % weight_tiles) * kTileWeightRows;
  const int64_t first_token = int64_t{blockIdx.x / weight_tiles} * kRows;
  const int tokens = static_cast<int>(min(int64_t{kRows}, p.tokens - first_token));
  const int steps = p.width / kTileColumns;

  LaneTile<kBits> held[kWarpTiles];
  const auto ask = [&](int step) {
#pragma unroll
    for (int i = 0; i < kWarpTiles; i++) {
      const int row = first_row + (warp * kWarpTiles + i) * kPackedRows;
      if (row < p.rows && step < steps)
        load_tile(held[i], p.weight, row / kPackedRows * steps + step);
    }
  };
  ask(0);
  const auto load_stage = [&](auto& stage, int step) {
    copy_rows<kTileColumns, kRows, kTileThreads>(stage.x, [&](int row) {
      const int64_t token = first_token + min(row, tokens - 1);
      return SourceRow<T>{static_cast<const T*>(p.x) + token * p.x_stride + step * kTileColumns,
                          row < tokens};
    });
#pragma unroll
    for (int i = 0; i < kWarpTiles; i++)
      write_tile<kTileWeightRows>(stage.weight, (warp * kWarpTiles + i) * kPackedRows, p.weight,
                                  held[i]);
    ask(step + 1);
  };
  float sum[kRows / 64][16][4] = {};
  multiply_stages(sum, smem, steps, tokens, load_stage);

  // Through shared memory to rows of whole sectors.
#pragma unroll
  for (int n = 0; n < kTileWeightRows / 8; n++) {
    const int column = first_row + n * 8 + lane % 4 * 2;
    const bool scales = p.weight.row_scales && column < p.rows;
    const float low = scales ? p.weight.row_scales[column] : 1.0f;
    const float high = scales ? p.weight.row_scales[column + 1] : 1.0f;
#pragma unroll
    for (int i = 0; i < kRows / 64; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = i * 64 + warp * 16 + lane / 4 + half * 8;
        T* to = smem.out + chunk_offset<kRows>(row, n) + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(to) =
            pack_pair<T>(sum[i][n][2 * half] * low, sum[i][n][2 * half + 1] * high);
      }
  }
  __syncthreads();
  constexpr int kChunks = kTileWeightRows / 8;
  for (int i = threadIdx.x; i < tokens * kChunks; i += kTileThreads) {
    const int token = i / kChunks, chunk = i % kChunks, column = first_row + chunk * 8;
    if (column < p.rows)
      ptx::store_16(static_cast<T*>(p.y) + (first_token + token) * p.rows + column,
                    load_shared(reinterpret_cast<const uint4*>(smem.out +
                                                               chunk_offset<kRows>(token, chunk))));
  }
}

}  // namespace gemma4
