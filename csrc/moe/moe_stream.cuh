// Experts for few tokens: hidden = geglu(gate_up x), y = Σ_k weight down hidden, weights streamed.
//
// What must be read is every touched expert's weights, once; all else is small. They are streamed
// as stream.cuh says, as the 16-row side of mma.sync, with up to 8 tokens a column block on the
// other. Weights in float are rounded as they come. What is stored is finite in fp16 too.
//
// gate_up: a block owns 16 gate rows, the 16 up rows that belong to them, and one tile of an
// expert's assignments; its warps take turns along D and add up through shared memory in the order
// of the warps, then GEGLU in registers. down: a block owns 16 rows of all touched experts; a warp
// takes an expert's tile whole; products wait in shared memory, by assignment, to be weighed and
// added in the order of the slots. A token's bits therefore do not depend on the others'.
//
// Shared memory: sizeof(GateUpSmem), sizeof(DownSmem). Bound: the touched experts' weights, 6 D F
// bytes each, from DRAM.
#pragma once

#include "../common/math.cuh"
#include "../common/stream.cuh"
#include "../common/tile.cuh"
#include "../common/vec.cuh"
#include "moe_sort.cuh"

namespace gemma4 {

constexpr int kStreamWarps = 8, kStreamRows = 16;

// kTokens columns; kAssignments bounds A.
template <int kTokens_, int kAssignments_>
struct MoeBatch {
  static constexpr int kTokens = kTokens_, kAssignments = kAssignments_;
};

template <class T, class Batch>
struct GateUpSmem {
  float4 partial[kStreamWarps][2 * Batch::kTokens / 8][32];
  alignas(16) T hidden[Batch::kTokens * kStreamRows];

  // Every other four tokens have their halves swapped, or the lanes that hold them would meet.
  DEVICE T* hidden_at(int token, int row) {
    return hidden + token * kStreamRows + (row ^ token / 4 % 2 * 8);
  }
};

template <class Batch>
struct DownSmem {
  alignas(16) float product[Batch::kAssignments][kStreamRows];
};

// How a warp walks along rows of weights: a line of 128 bytes of each at a time, in groups of 32
// columns, of which a lane takes 8 of a row that exists, up to its width, and zeros otherwise.
template <class T, class W>
struct LaneColumns {
  static constexpr int kColumns = 128 / sizeof(W), kGroups = kColumns / 32;

  DEVICE static uint4 weights(bool exists, const T* row, int first, int width FROM_HERE) {
    const int column = first + threadIdx.x % 4 * 8;
    return load_once_if(exists && column < width, row + column HERE);
  }
  DEVICE static uint4 tokens(bool exists, const T* row, int first, int width FROM_HERE) {
    const int column = first + threadIdx.x % 4 * 8;
    return load_fresh_if(exists && column < width, row + column HERE);
  }
};

// A lane's 8 columns are two runs of 4, each 16 bytes of a row of weights.
template <class T>
struct LaneColumns<T, float> {
  static constexpr int kColumns = 32, kGroups = 1;

  DEVICE static uint4 weights(bool exists, const float* row, int first, int width FROM_HERE) {
    const int column = first + threadIdx.x % 4 * 4;
    const uint4 bits[2] = {
        load_once_if(exists && column < width, row + column HERE),
        load_once_if(exists && column + 16 < width, row + column + 16 HERE),
    };
    float w[8];
    __builtin_memcpy(w, bits, sizeof w);
    return {pack_pair<T>(w[0], w[1]), pack_pair<T>(w[2], w[3]), pack_pair<T>(w[4], w[5]),
            pack_pair<T>(w[6], w[7])};
  }
  DEVICE static uint4 tokens(bool exists, const T* row, int first, int width FROM_HERE) {
    const int column = first + threadIdx.x % 4 * 4;
    const uint2 low = load_8_fresh_if(exists && column < width, row + column HERE);
    const uint2 high = load_8_fresh_if(exists && column + 16 < width, row + column + 16 HERE);
    return {low.x, low.y, high.x, high.y};
  }
};

// Of one tile, whose assignments `order` begins with, the hidden values of 16 gate rows.
template <class T, class W, class Batch>
DEVICE void stream_gate_up(const MoeExpertsParams& p, const MoeTile& tile, const int32_t* order,
                           int first_row, GateUpSmem<T, Batch>& smem) {
  using Columns = LaneColumns<T, W>;
  constexpr int kBlocks = Batch::kTokens / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = first_row + lane / 4;
  const W* gate_row = static_cast<const W*>(p.gate_up) +
                      (int64_t{2} * tile.expert * p.hidden_width + row) * p.width;
  const W* up_row = gate_row + int64_t{p.hidden_width} * p.width;
  const T* token[kBlocks];
#pragma unroll
  for (int n = 0; n < kBlocks; n++) {
    const int i = min(n * 8 + lane / 4, tile.rows - 1);
    token[n] = static_cast<const T*>(p.x) + order[i] / p.k * p.x_stride;
  }

  float gate[kBlocks][4] = {}, up[kBlocks][4] = {};
  for (int first = warp * Columns::kColumns; first < p.width;
       first += kStreamWarps * Columns::kColumns) {
    uint4 weight[Columns::kGroups][4], x[Columns::kGroups][kBlocks];
#pragma unroll
    for (int i = 0; i < Columns::kGroups; i++) {
      const auto weights = [&](bool exists, const W* from) {
        return Columns::weights(exists, from, first + i * 32, p.width);
      };
      const bool low = row < p.hidden_width, high = row + 8 < p.hidden_width;
      weight[i][0] = weights(low, gate_row);
      weight[i][1] = weights(high, gate_row + int64_t{8} * p.width);
      weight[i][2] = weights(low, up_row);
      weight[i][3] = weights(high, up_row + int64_t{8} * p.width);
#pragma unroll
      for (int n = 0; n < kBlocks; n++)
        x[i][n] = Columns::tokens(n * 8 + lane / 4 < tile.rows, token[n], first + i * 32, p.width);
    }
#pragma unroll
    for (int i = 0; i < Columns::kGroups; i++)
#pragma unroll
      for (int n = 0; n < kBlocks; n++) {
        if (n * 8 >= tile.rows) break;
        multiply<T>(gate[n], weight[i][0], weight[i][1], x[i][n]);
        multiply<T>(up[n], weight[i][2], weight[i][3], x[i][n]);
      }
  }

#pragma unroll
  for (int n = 0; n < kBlocks; n++) {
    store_shared(&smem.partial[warp][2 * n][lane],
                 {gate[n][0], gate[n][1], gate[n][2], gate[n][3]});
    store_shared(&smem.partial[warp][2 * n + 1][lane], {up[n][0], up[n][1], up[n][2], up[n][3]});
  }
  __syncthreads();
  if (warp < kBlocks) {
    float g[4] = {}, u[4] = {};
#pragma unroll
    for (int w = 0; w < kStreamWarps; w++) {
      const float4 a = load_shared(&smem.partial[w][2 * warp][lane]);
      const float4 b = load_shared(&smem.partial[w][2 * warp + 1][lane]);
      g[0] += a.x, g[1] += a.y, g[2] += a.z, g[3] += a.w;
      u[0] += b.x, u[1] += b.y, u[2] += b.z, u[3] += b.w;
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
      *smem.hidden_at(warp * 8 + lane % 4 * 2 + e % 2, lane / 4 + e / 2 * 8) =
          from_float<T>(gated<T>(g[e], u[e]));
  }
  __syncthreads();
  const int i = threadIdx.x / 2, part = threadIdx.x % 2 * 8;
  if (i < tile.rows && first_row + part < p.hidden_width)
    ptx::store_16(
        static_cast<T*>(p.hidden) + int64_t{tile.begin + i} * p.hidden_width + first_row + part,
        load_shared(reinterpret_cast<const uint4*>(smem.hidden_at(i, part))));
}

template <class T, class W, class Batch>
__global__ void __launch_bounds__(kStreamWarps * 32, 2)
    moe_stream_gate_up_kernel(const __grid_constant__ MoeExpertsParams p) {
  auto& smem = shared_memory<GateUpSmem<T, Batch>>();
  const MoeTile tile = moe_tile(p.offsets, p.num_experts, blockIdx.y, Batch::kTokens);
  if (tile.rows == 0) return;
  stream_gate_up<T, W, Batch>(p, tile, p.order + tile.begin, blockIdx.x * kStreamRows, smem);
}

template <class T, class W, class Batch>
__global__ void __launch_bounds__(kStreamWarps * 32, 2)
    moe_stream_down_kernel(const __grid_constant__ MoeExpertsParams p) {
  using Columns = LaneColumns<T, W>;
  constexpr int kBlocks = Batch::kTokens / 8;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  auto& smem = shared_memory<DownSmem<Batch>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.x * kStreamRows, row = first_row + lane / 4;

  for (int t = warp;; t += kStreamWarps) {
    const MoeTile tile = moe_tile(p.offsets, p.num_experts, t, Batch::kTokens);
    if (tile.rows == 0) break;
    const W* weight_row =
        static_cast<const W*>(p.down) + (int64_t{tile.expert} * p.width + row) * p.hidden_width;
    const T* hidden =
        static_cast<const T*>(p.hidden) + int64_t{tile.begin + lane / 4} * p.hidden_width;

    float product[kBlocks][4] = {};
#pragma unroll 2
    for (int first = 0; first < p.hidden_width; first += Columns::kColumns) {
      uint4 weight[Columns::kGroups][2], x[Columns::kGroups][kBlocks];
#pragma unroll
      for (int i = 0; i < Columns::kGroups; i++) {
        const int from = first + i * 32;
        weight[i][0] = Columns::weights(row < p.width, weight_row, from, p.hidden_width);
        weight[i][1] = Columns::weights(row + 8 < p.width, weight_row + int64_t{8} * p.hidden_width,
                                        from, p.hidden_width);
#pragma unroll
        for (int n = 0; n < kBlocks; n++)
          x[i][n] = Columns::tokens(n * 8 + lane / 4 < tile.rows,
                                    hidden + int64_t{n} * 8 * p.hidden_width, from, p.hidden_width);
      }
#pragma unroll
      for (int i = 0; i < Columns::kGroups; i++)
#pragma unroll
        for (int n = 0; n < kBlocks; n++) {
          if (n * 8 >= tile.rows) break;
          multiply<T>(product[n], weight[i][0], weight[i][1], x[i][n]);
        }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = n * 8 + lane % 4 * 2 + e % 2;
        if (i < tile.rows)
          smem.product[p.order[tile.begin + i]][lane / 4 + e / 2 * 8] = product[n][e];
      }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < 2 * p.tokens; i += blockDim.x) {
    const int token = i / 2, column = i % 2 * 8;
    if (first_row + column >= p.width) continue;
    float sum[8] = {};
    for (int slot = 0; slot < p.k; slot++) {
      const int a = token * p.k + slot;
      const int64_t expert = index_at(p.experts, a);
      if (expert < 0 || expert >= p.num_experts) continue;
      const float weight = float_at(p.weights, a);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] += weight * smem.product[a][column + j];
    }
    Vec<T, 8> y;
#pragma unroll
    for (int j = 0; j < 8; j++) y.set(j, saturate<T>(sum[j]));
    store(static_cast<T*>(p.y) + int64_t{token} * p.width + first_row + column, y);
  }
}

}  // namespace gemma4
