// Experts for many tokens: two grouped matrix products over tiles of 128 weight rows, then the sum.
//
// A block owns one tile of an expert's assignments (kRows of them) and 128 weight rows: of gate_up
// 64 gate rows and the 64 up rows that belong to them, so that GEGLU happens in registers and only
// the hidden activations are written. Tokens are gathered by the copies themselves. Blocks are
// numbered so that those of one tile of assignments follow each other: they share its rows, and
// the blocks of the expert's next tile share the weights, both from L2. There are as many blocks as
// the worst routing needs; those without a tile leave.
//
// How a tile is multiplied is in linear/tiles.cuh. Weights in float are rounded on their way,
// through registers; of a packed weight a warp reads two of a stage's eight packed tiles a stage
// ahead, and writes them as numbers of T, their rows' scales being left for the sums. What is
// stored is finite in fp16 too. Shared memory: sizeof(MoeTilesSmem).
// Bound, by the static report: L2, from which every block copies its own rows and weights; with few
// tokens an expert the weights, from DRAM.
#pragma once

#include "../common/elementwise.cuh"
#include "../common/math.cuh"
#include "../common/vec.cuh"
#include "../linear/packed.cuh"
#include "../linear/tiles.cuh"
#include "moe_sort.cuh"

namespace gemma4 {

template <class T, int kRows>
struct MoeTilesSmem {
  ProductTiles<T, kRows> tiles;
  int source[kRows];  // row of x
};

// A stage's 128 rows of an expert's weight, of which those from `first` on: of gate_up 64 gate
// rows, then their up rows. Here of a dense weight of W.
template <class T, class W, bool kGateUp>
struct StageWeights {
  static constexpr int kRows = kGateUp ? kTileWeightRows / 2 : kTileWeightRows;  // of a kind
  const W* data;
  int first, height, width;  // height: rows of a kind

  DEVICE StageWeights(const PackedWeight& weight, int expert, int first, int height, int width)
      : data(static_cast<const W*>(weight.codes) +
             (kGateUp ? 2 : 1) * int64_t{expert} * height * width),
        first(first),
        height(height),
        width(width) {}

  DEVICE void load(T* to, int step) const {
    const int column = step * kTileColumns;
    const auto source = [&](int row) {
      const int of_kind = first + row % kRows;
      const int from = min(of_kind, height - 1) + (row < kRows ? 0 : height);
      return SourceRow<W>{data + int64_t{from} * width + column, of_kind < height};
    };
    if constexpr (std::is_same_v<T, W>)
      copy_rows<kTileColumns, kTileWeightRows, kTileThreads>(to, source, width - column);
    else
      round_rows<kTileColumns, kTileWeightRows, kTileThreads>(to, source, width - column);
  }

  // What the sums are yet to be multiplied by, of the stage's rows `row` and `row` + 1.
  DEVICE float2 row_scales(int) const { return {1.0f, 1.0f}; }
};

template <class T, int kBits, bool kGateUp>
struct StageWeights<T, Bits<kBits>, kGateUp> {
  static constexpr int kRows = kGateUp ? kTileWeightRows / 2 : kTileWeightRows;
  static constexpr int kWarpTiles = kTileWeightRows / kPackedRows / (kTileThreads / 32);
  const PackedWeight& weight;
  int64_t expert_row;
  int first, height, steps;
  LaneTile<kBits> held[kWarpTiles];  // of the next step

  DEVICE StageWeights(const PackedWeight& weight, int expert, int first, int height, int width)
      : weight(weight),
        expert_row((kGateUp ? 2 : 1) * int64_t{expert} * height),
        first(first),
        height(height),
        steps(width / kTileColumns) {
    ask(0);
  }

  // Where in the weight a row of the stage is.
  DEVICE int64_t row_at(int row) const {
    return expert_row + first + row % kRows + (row < kRows ? 0 : height);
  }

  DEVICE void ask(int step) {
#pragma unroll
    for (int i = 0; i < kWarpTiles; i++) {
      const int row = (threadIdx.x / 32 * kWarpTiles + i) * kPackedRows;
      held[i] = load_tile<kBits>(weight, row_at(row) / kPackedRows * steps + step,
                                 first + row % kRows < height && step < steps);
    }
  }

  DEVICE void load(T* to, int step) {
#pragma unroll
    for (int i = 0; i < kWarpTiles; i++)
      write_tile<kTileWeightRows>(to, (threadIdx.x / 32 * kWarpTiles + i) * kPackedRows, weight,
                                  held[i]);
    ask(step + 1);
  }

  DEVICE float2 row_scales(int row) const {
    if (!weight.row_scales || first + row % kRows >= height) return {1.0f, 1.0f};
    const float* scales = weight.row_scales + row_at(row);
    return {scales[0], scales[1]};
  }
};

// A stage's 64 rows of an expert's dense weight, which the sums run over, and of them kColumns
// columns from `first` on.
template <class T, class W, int kColumns>
struct TransposedWeights {
  const W* data;
  int first, columns, rows;

  DEVICE TransposedWeights(const PackedWeight& weight, int expert, int first, int columns, int rows)
      : data(static_cast<const W*>(weight.codes) + int64_t{expert} * rows * columns),
        first(first),
        columns(columns),
        rows(rows) {}

  DEVICE void load(T* to, int step) const {
    const auto source = [&](int i) {
      const int row = step * kTileColumns + i;
      return SourceRow<W>{data + int64_t{min(row, rows - 1)} * columns + first, row < rows};
    };
    if constexpr (std::is_same_v<T, W>)
      copy_rows<kColumns, kTileColumns, kTileThreads>(to, source, columns - first);
    else
      round_rows<kColumns, kTileColumns, kTileThreads>(to, source, columns - first);
  }

  DEVICE float2 row_scales(int) const { return {1.0f, 1.0f}; }
};

// kTransposed: down is [E, F, D], and what is stored is a gradient, whose overflow is for a loss
// scaler to see.
//
// Untold, the compiler would hold more in registers under Hopper's products than the three blocks
// have for whose tiles there is room.
template <class T, class W, int kRows, bool kGateUp, bool kTransposed = false>
__global__ void __launch_bounds__(kTileThreads, kRows == 64 && ptx::has_wgmma() ? 3 : 0)
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
  using Weights = std::conditional_t<kTransposed, TransposedWeights<T, W, kTileWeightRows>,
                                     StageWeights<T, W, kGateUp>>;
  Weights weights(kGateUp ? p.gate_up : p.down, tile.expert, first_column, out_width, width);
  const auto load_stage = [&](auto& stage, int step) {
    const int first = step * kTileColumns;
    copy_rows<kTileColumns, kRows, kTileThreads>(
        stage.x,
        [&](int row) {
          const int source = smem.source[min(row, tile.rows - 1)];
          return SourceRow<T>{x + source * x_stride + first, row < tile.rows};
        },
        width - first);
    weights.load(stage.weight, step);
  };

  float sum[kRows / 64][16][4] = {};
  const int steps = (width + kTileColumns - 1) / kTileColumns;
  multiply_stages<false, kTransposed>(sum, smem.tiles, steps, tile.rows, load_stage);

  // Through shared memory to rows of whole sectors.
#pragma unroll
  for (int n = 0; n < kOutColumns / 8; n++) {
    const float2 scale = weights.row_scales(n * 8 + lane % 4 * 2);
    const float2 up_scale = weights.row_scales((n + 8) % 16 * 8 + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < kRows / 64; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = i * 64 + warp * 16 + lane / 4 + half * 8;
        float low = sum[i][n][2 * half] * scale.x, high = sum[i][n][2 * half + 1] * scale.y;
        if constexpr (kGateUp) {
          low = gated<T>(low, sum[i][n + 8][2 * half] * up_scale.x);
          high = gated<T>(high, sum[i][n + 8][2 * half + 1] * up_scale.y);
        }
        if constexpr (!kTransposed) low = saturate<T>(low), high = saturate<T>(high);
        T* to = smem.tiles.out + chunk_offset<kRows>(row, n) + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(low, high);
      }
  }
  __syncthreads();
  T* out = static_cast<T*>(kGateUp ? p.hidden : p.expert_out);
  store_tile<kRows, kOutColumns>(
      smem.tiles.out, tile.rows, out_width - first_column, [&](int row, int chunk) {
        const int64_t to = kGateUp ? tile.begin + row : p.order[tile.begin + row];
        return out + to * out_width + first_column + chunk * 8;
      });
}

// y = Σ_k weight expert_out, in the order of the slots; without weights the sum of gradients. One
// thread, one vector. Bound: 2 (K + 1) D bytes of DRAM a token.
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
      const float weight = p.weights.data ? float_at(p.weights, a) : 1.0f;
      const auto part = load_fresh<8>(static_cast<const T*>(p.expert_out) + a * p.width + column);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] += weight * part[j];
    }
    Vec<T, 8> y;
#pragma unroll
    for (int j = 0; j < 8; j++) y.set(j, p.weights.data ? saturate<T>(sum[j]) : sum[j]);
    store(static_cast<T*>(p.y) + token * p.width + column, y);
  });
}

}  // namespace gemma4
