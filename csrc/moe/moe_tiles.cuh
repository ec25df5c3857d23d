// Experts for many tokens: two grouped matrix products over tiles of 128 weight rows, then the sum.
//
// A block owns one tile of an expert's assignments (kRows of them) and 128 weight rows: of gate_up
// 64 gate rows and the 64 up rows that belong to them, so that GEGLU happens in registers and only
// the hidden activations are written. Tokens are gathered by the copies themselves. Blocks are
// numbered so that those of one tile of assignments follow each other: they share its rows, and
// the blocks of the expert's next tile share the weights, both from L2. There are as many blocks as
// the worst routing needs; those without a tile leave.
//
// The four warps divide each 64 rows, and each warp's rows are 16 of them and all 128 columns. On
// Hopper wgmma multiplies the tiles where they lie; elsewhere ldmatrix and mma.sync, with sums in
// the same places. Warps whose rows hold no token leave the tensor cores to others.
// Three stages of 64 columns; one barrier a stage, before which stage s has landed and after which
// stage s - 1 is free. Shared memory: sizeof(MoeTilesSmem), 97 KB with 128 rows, 73 KB with 64: two
// blocks on a large multiprocessor, one multiplies while the other waits. Weights in float are
// rounded on their way, through registers. What is stored is finite in fp16 too. Bound: tensor
// cores and shared memory alike; with few tokens an expert the weights, from DRAM.
#pragma once

#include "../common/elementwise.cuh"
#include "../common/math.cuh"
#include "../common/tile.cuh"
#include "../common/vec.cuh"
#include "moe_sort.cuh"

namespace gemma4 {

constexpr int kTileWeightRows = 128, kTileColumns = 64, kTileStages = 3, kTileThreads = 128;

template <class T, int kRows>
struct MoeTilesSmem {
  struct Stage {
    alignas(1024) T x[kRows * kTileColumns];
    alignas(1024) T weight[kTileWeightRows * kTileColumns];
  };
  union {
    Stage stage[kTileStages];
    T out[kRows * kTileWeightRows];  // at the end
  };
  int source[kRows];  // row of x
};

// sum += x weightᵀ over one stage. Element e of sum[i][n] is row i * 64 + warp * 16 + lane / 4 + e
// / 2 * 8, column n * 8 + lane % 4 * 2 + e % 2.
template <class T, int kRows>
DEVICE void multiply_stage(float (&sum)[kRows / 64][16][4],
                           const typename MoeTilesSmem<T, kRows>::Stage& stage, int rows) {
  const int warp_row = threadIdx.x / 32 * 16;
  if (ptx::has_wgmma()) {
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
      ptx::wgmma_wait<0>(sum);
    };
    if (rows > 64)
      multiply.template operator()<kRows / 64>();
    else
      multiply.template operator()<1>();
    return;
  }
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

template <class T, class W, int kRows, bool kGateUp>
__global__ void __launch_bounds__(kTileThreads)
    moe_tiles_kernel(const __grid_constant__ MoeExpertsParams p) {
  constexpr int kOutColumns = kGateUp ? kTileWeightRows / 2 : kTileWeightRows;
  auto& smem = shared_memory<MoeTilesSmem<T, kRows>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int width = kGateUp ? p.width : p.hidden_width;  // of x and of the sums
  const int out_width = kGateUp ? p.hidden_width : p.width;
  const int column_tiles = (out_width + kOutColumns - 1) / kOutColumns;
  const int first_column = blockIdx.x % column_tiles * kOutColumns;
  const MoeTile tile = moe_tile(p.offsets, p.num_experts, blockIdx.x / column_tiles, kRows);
  if (tile.rows == 0) return;

  for (int i = threadIdx.x; i < tile.rows; i += kTileThreads)
    smem.source[i] = kGateUp ? p.order[tile.begin + i] / p.k : tile.begin + i;
  __syncthreads();

  const T* x = static_cast<const T*>(kGateUp ? p.x : p.hidden);
  const int64_t x_stride = kGateUp ? p.x_stride : p.hidden_width;
  const W* weights = static_cast<const W*>((kGateUp ? p.gate_up : p.down).codes) +
                     (kGateUp ? 2 : 1) * int64_t{tile.expert} * out_width * width;
  const auto load_stage = [&](int step) {
    auto& stage = smem.stage[step % kTileStages];
    const int first = step * kTileColumns;
    copy_rows<kTileColumns, kRows, kTileThreads>(
        stage.x,
        [&](int row) {
          const int source = smem.source[min(row, tile.rows - 1)];
          return SourceRow<T>{x + source * x_stride + first, row < tile.rows};
        },
        width - first);
    const auto weight = [&](int row) {
      const int column = first_column + row % kOutColumns;  // gate rows, then up rows
      const int weight_row = min(column, out_width - 1) + (row < kOutColumns ? 0 : p.hidden_width);
      return SourceRow<W>{weights + int64_t{weight_row} * width + first, column < out_width};
    };
    if constexpr (std::is_same_v<T, W>)
      copy_rows<kTileColumns, kTileWeightRows, kTileThreads>(stage.weight, weight, width - first);
    else
      round_rows<kTileColumns, kTileWeightRows, kTileThreads>(stage.weight, weight, width - first);
  };

  float sum[kRows / 64][16][4] = {};
  const int steps = (width + kTileColumns - 1) / kTileColumns;
#pragma unroll
  for (int step = 0; step < kTileStages - 1; step++) {
    if (step < steps) load_stage(step);
    ptx::cp_async_commit();
  }
  for (int step = 0; step < steps; step++) {
    ptx::cp_async_wait<kTileStages - 2>();
    if (ptx::has_wgmma()) ptx::fence_async_proxy();
    __syncthreads();
    if (step + kTileStages - 1 < steps) load_stage(step + kTileStages - 1);
    ptx::cp_async_commit();
    multiply_stage<T, kRows>(sum, smem.stage[step % kTileStages], tile.rows);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // Through shared memory to rows of whole sectors.
#pragma unroll
  for (int i = 0; i < kRows / 64; i++)
#pragma unroll
    for (int n = 0; n < kOutColumns / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = i * 64 + warp * 16 + lane / 4 + half * 8;
        float low = sum[i][n][2 * half], high = sum[i][n][2 * half + 1];
        if constexpr (kGateUp) {
          low = gated<T>(low, sum[i][n + 8][2 * half]);
          high = gated<T>(high, sum[i][n + 8][2 * half + 1]);
        }
        T* to = smem.out + chunk_offset<kRows>(row, n) + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(saturate<T>(low), saturate<T>(high));
      }
  __syncthreads();
  constexpr int kChunks = kOutColumns / 8;
  for (int i = threadIdx.x; i < tile.rows * kChunks; i += kTileThreads) {
    const int row = i / kChunks, chunk = i % kChunks, column = first_column + chunk * 8;
    if (column >= out_width) continue;
    const int64_t to = kGateUp ? tile.begin + row : p.order[tile.begin + row];
    const auto* from = reinterpret_cast<const uint4*>(smem.out + chunk_offset<kRows>(row, chunk));
    ptx::store_16(static_cast<T*>(kGateUp ? p.hidden : p.expert_out) + to * out_width + column,
                  load_shared(from));
  }
}

// y = Σ_k weight expert_out, in the order of the slots. One thread, one vector. Bound: 2 (K + 1) D
// bytes of DRAM a token.
template <class T>
__global__ void __launch_bounds__(kElementwiseThreads)
    moe_combine_kernel(const __grid_constant__ MoeExpertsParams p) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  each_row<8>(p.tokens, p.width, [&](int64_t token, int column) {
    float sum[8] = {};
    for (int slot = 0; slot < p.k; slot++) {
      const int64_t a = token * p.k + slot, expert = index_at(p.experts, a);
      if (expert < 0 || expert >= p.num_experts) continue;
      const float weight = float_at(p.weights, a);
      const auto part = load_fresh<8>(static_cast<const T*>(p.expert_out) + a * p.width + column);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] += weight * part[j];
    }
    Vec<T, 8> y;
#pragma unroll
    for (int j = 0; j < 8; j++) y.set(j, saturate<T>(sum[j]));
    store(static_cast<T*>(p.y) + token * p.width + column, y);
  });
}

}  // namespace gemma4
