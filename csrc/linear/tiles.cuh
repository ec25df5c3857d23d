// Products of many tokens: x weightᵀ over tiles of kRows rows and 128 weight rows.
//
// The four warps divide each 64 rows, and each warp's rows are 16 of them and all 128 columns. On
// Hopper wgmma multiplies the tiles where they lie; elsewhere ldmatrix and mma.sync, with sums in
// the same places. Warps whose rows hold no token leave the tensor cores to others.
// Three stages of 64 columns; one barrier a stage, before which stage s has landed and after which
// stage s - 1 is free. wgmma starts before that one's copies are issued, and runs under them.
//
// Shared memory: sizeof(ProductTiles), 97 KB with 128 rows, 73 KB with 64: two or three blocks on a
// large multiprocessor, some multiply while others wait.
#pragma once

#include "../common/tile.cuh"

namespace gemma4 {

constexpr int kTileWeightRows = 128, kTileColumns = 64, kTileStages = 3, kTileThreads = 128;

template <class T, int kRows>
union ProductTiles {
  struct Stage {
    alignas(1024) T x[kRows * kTileColumns];
    alignas(1024) T weight[kTileWeightRows * kTileColumns];
  } stage[kTileStages];
  T out[kRows * kTileWeightRows];  // at the end
};

// sum += x weightᵀ over one stage. Element e of sum[i][n] is row i * 64 + warp * 16 + lane / 4 + e
// / 2 * 8, column n * 8 + lane % 4 * 2 + e % 2.
template <class T, int kRows>
DEVICE void multiply_stage(float (&sum)[kRows / 64][16][4],
                           const typename ProductTiles<T, kRows>::Stage& stage, int rows) {
  const int warp_row = threadIdx.x / 32 * 16;
  const auto x_at = lane_address<kRows>(stage.x, warp_row, 0);
  const auto weight_at = transposed_lane_address<kTileWeightRows>(stage.weight, 0, 0);
  const auto multiply = [&]<int kBlocks>() {
#pragma unroll
    for (int column = 0; column < kTileColumns; column += 16) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int i = 0; i < kBlocks; i++) ptx::ldmatrix_x4(a[i], x_at.at(i * 64, column));
#pragma unroll
      for (int n = 0; n < 8; n++) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, weight_at.at(n * 16, column));
#pragma unroll
        for (int i = 0; i < kBlocks; i++) {
          ptx::mma_16816<T>(sum[i][2 * n], a[i], b[0], b[1]);
          ptx::mma_16816<T>(sum[i][2 * n + 1], a[i], b[2], b[3]);
        }
      }
    }
  };
  if (rows > 64 + warp_row)
    multiply.template operator()<kRows / 64>();
  else if (rows > warp_row)
    multiply.template operator()<1>();
}

// The same as one group of wgmmas.
template <class T, int kRows>
DEVICE void start_multiply_stage(float (&sum)[kRows / 64][16][4],
                                 const typename ProductTiles<T, kRows>::Stage& stage, int rows) {
  const uint64_t x = wgmma_tile<kRows>(stage.x, 0, 0);
  const uint64_t weight = wgmma_tile<kTileWeightRows>(stage.weight, 0, 0);
  // A branch between them would make the compiler run them one by one.
  const auto multiply = [&]<int kBlocks>() {
    ptx::wgmma_fence(sum);
#pragma unroll
    for (int column = 0; column < kTileColumns; column += 16)
#pragma unroll
      for (int i = 0; i < kBlocks; i++)
        ptx::wgmma_64x128x16<T>(sum[i], x + wgmma_step<kRows>(i * 64, column),
                                weight + wgmma_step<kTileWeightRows>(0, column));
    ptx::wgmma_commit();
  };
  if (kRows == 64 || rows <= 64)
    multiply.template operator()<1>();
  else
    multiply.template operator()<kRows / 64>();
}

// The same over all stages, of which load_stage(stage, step) starts the copies, or makes the
// weights by ordinary stores; no thread reads or writes a tile any more when it returns.
template <class T, int kRows, class Load>
DEVICE void multiply_stages(float (&sum)[kRows / 64][16][4], ProductTiles<T, kRows>& tiles,
                            int steps, int rows, Load&& load_stage) {
#pragma unroll
  for (int step = 0; step < kTileStages - 1; step++) {
    if (step < steps) load_stage(tiles.stage[step], step);
    ptx::cp_async_commit();
  }
  for (int step = 0; step < steps; step++) {
    ptx::cp_async_wait<kTileStages - 2>();
    if (ptx::has_wgmma()) ptx::fence_async_proxy();
    __syncthreads();
    const auto& stage = tiles.stage[step % kTileStages];
    if (ptx::has_wgmma()) start_multiply_stage<T, kRows>(sum, stage, rows);
    const int ahead = step + kTileStages - 1;
    if (ahead < steps) load_stage(tiles.stage[ahead % kTileStages], ahead);
    ptx::cp_async_commit();
    if (ptx::has_wgmma())
      ptx::wgmma_wait<0>(sum);
    else
      multiply_stage<T, kRows>(sum, stage, rows);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

}  // namespace gemma4
