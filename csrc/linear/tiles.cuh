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

// How an operand lies in a stage: kRows rows of 64 columns, or transposed, which is 64 rows of
// kRows columns.
template <int kRows, bool kTransposed>
struct StageOperand {
  static constexpr int kTileRows = kTransposed ? kTileColumns : kRows;

  template <class T>
  DEVICE static uint64_t wgmma(const T* tile) {
    return wgmma_tile<kTileRows>(tile, 0, 0);
  }
  DEVICE static constexpr uint64_t wgmma_step(int row, int column) {
    return kTransposed ? gemma4::wgmma_step<kTileRows>(column, row)
                       : gemma4::wgmma_step<kTileRows>(row, column);
  }

  // Of mma_16816: where a lane begins to read an A operand, or two B operands.
  template <class T>
  DEVICE static auto a_address(const T* tile, int row) {
    return kTransposed ? transposed_lane_address<kTileRows>(tile, 0, row)
                       : lane_address<kTileRows>(tile, row, 0);
  }
  template <class T>
  DEVICE static auto b_address(const T* tile) {
    return kTransposed ? lane_address<kTileRows>(tile, 0, 0)
                       : transposed_lane_address<kTileRows>(tile, 0, 0);
  }
  DEVICE static void load(uint32_t (&r)[4], const LaneAddress<kTileRows>& first, int row,
                          int column) {
    if constexpr (kTransposed)
      ptx::ldmatrix_x4_trans(r, first.at(column, row));
    else
      ptx::ldmatrix_x4(r, first.at(row, column));
  }
};

// sum += x weightᵀ over one stage, of as many weight rows as sum has. Element e of sum[i][n] is row
// i * 64 + warp * 16 + lane / 4 + e / 2 * 8, column n * 8 + lane % 4 * 2 + e % 2.
template <bool kXTransposed, bool kWeightTransposed, class T, int kRows, int kBlocks>
DEVICE void multiply_stage(float (&sum)[kRows / 64][kBlocks][4],
                           const typename ProductTiles<T, kRows>::Stage& stage, int rows) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  using X = StageOperand<kRows, kXTransposed>;
  using Weight = StageOperand<kBlocks * 8, kWeightTransposed>;
  const int warp_row = threadIdx.x / 32 * 16;
  const auto x_at = X::a_address(stage.x, warp_row);
  const auto weight_at = Weight::b_address(stage.weight);
  const auto multiply = [&]<int kTiles>() {
#pragma unroll
    for (int column = 0; column < kTileColumns; column += 16) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int i = 0; i < kTiles; i++) X::load(a[i], x_at, i * 64, column);
#pragma unroll
      for (int n = 0; n < kBlocks / 2; n++) {
        uint32_t b[4];
        Weight::load(b, weight_at, n * 16, column);
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
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
template <bool kXTransposed, bool kWeightTransposed, class T, int kRows, int kBlocks>
DEVICE void start_multiply_stage(float (&sum)[kRows / 64][kBlocks][4],
                                 const typename ProductTiles<T, kRows>::Stage& stage, int rows) {
  using X = StageOperand<kRows, kXTransposed>;
  using Weight = StageOperand<kBlocks * 8, kWeightTransposed>;
  const uint64_t x = X::wgmma(stage.x), weight = Weight::wgmma(stage.weight);
  // A branch between them would make the compiler run them one by one.
  const auto multiply = [&]<int kTiles>() {
    ptx::wgmma_fence(sum);
#pragma unroll
    for (int column = 0; column < kTileColumns; column += 16)
#pragma unroll
      for (int i = 0; i < kTiles; i++) {
        const uint64_t x_at = x + X::wgmma_step(i * 64, column);
        const uint64_t weight_at = weight + Weight::wgmma_step(0, column);
        if constexpr (kBlocks == 16)
          ptx::wgmma_64x128x16<T, kXTransposed, kWeightTransposed>(sum[i], x_at, weight_at);
        else
          ptx::wgmma_64x64x16<T, kXTransposed, kWeightTransposed>(sum[i], x_at, weight_at);
      }
    ptx::wgmma_commit();
  };
  if (kRows == 64 || rows <= 64)
    multiply.template operator()<1>();
  else
    multiply.template operator()<kRows / 64>();
}

// The same over all stages, of operands that may lie transposed in them, of which load_stage(stage,
// step) starts the copies, or makes the weights by ordinary stores; no thread reads or writes a
// tile any more when it returns.
template <bool kXTransposed = false, bool kWeightTransposed = false, class T, int kRows,
          int kBlocks, class Load>
DEVICE void multiply_stages(float (&sum)[kRows / 64][kBlocks][4], ProductTiles<T, kRows>& tiles,
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
    if (ptx::has_wgmma())
      start_multiply_stage<kXTransposed, kWeightTransposed, T, kRows>(sum, stage, rows);
    const int ahead = step + kTileStages - 1;
    if (ahead < steps) load_stage(tiles.stage[ahead % kTileStages], ahead);
    ptx::cp_async_commit();
    if (ptx::has_wgmma())
      ptx::wgmma_wait<0>(sum);
    else
      multiply_stage<kXTransposed, kWeightTransposed, T, kRows>(sum, stage, rows);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// Rows of a tile of 16-bit values that a kernel has made, of which `columns` exist, to where
// to(row, chunk) says that a chunk of eight belongs.
template <int kRows, int kColumns, class T, class To>
DEVICE void store_tile(const T* tile, int rows, int columns, const To& to) {
  constexpr int kChunks = kColumns / 8;
  for (int i = threadIdx.x; i < rows * kChunks; i += kTileThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    if (chunk * 8 >= columns) continue;
    ptx::store_16(
        to(row, chunk),
        load_shared(reinterpret_cast<const uint4*>(tile + chunk_offset<kRows>(row, chunk))));
  }
}

}  // namespace gemma4
