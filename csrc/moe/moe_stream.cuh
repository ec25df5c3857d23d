// Experts for few tokens: hidden = geglu(gate_up x), y = Σ_k weight down hidden, weights streamed.
//
// What must be read is every touched expert's weights, once; all else is small. They are streamed
// as stream.cuh says, as the 16-row side of mma.sync, with up to 8 tokens a column block on the
// other. Weights in float are rounded when they are multiplied, codes of packed ones become numbers
// of T there (linear/packed.cuh), with their scales in the sums. A lane asks for weights as soon as
// a place for them is free: of eight tokens it has 128 bytes on their way. What is stored is finite
// in fp16 too.
//
// gate_up: a block owns 16 gate rows, the 16 up rows that belong to them, and one tile of an
// expert's assignments; its warps take turns along D and add up through shared memory in the order
// of the warps, then GEGLU in registers. down: a block owns 16 rows of all touched experts; a warp
// takes an expert's tile whole; products wait in shared memory, by assignment, to be weighed and
// added in the order of the slots. A token's bits therefore do not depend on the others'.
//
// Shared memory: sizeof(GateUpSmem), sizeof(DownSmem). Bound: the touched experts' weights, 3 D F
// elements each, from DRAM; with codes of four bits on the fastest cards instructions come close.
#pragma once

#include "../common/math.cuh"
#include "../common/stream.cuh"
#include "../common/tile.cuh"
#include "../common/vec.cuh"
#include "../linear/packed.cuh"
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

// Sixteen rows of a weight as a warp walks along them, kColumns at a time, of which the first
// `rows` exist. A lane takes 8 columns of each 32, of rows lane / 4 and lane / 4 + 8, and of tokens
// the same ones: kGroups pieces of 16 bytes.
template <class T, class W>
struct WeightRows {
  static constexpr bool kRounds = !std::is_same_v<T, W>;  // float, as two runs of 4 columns
  static constexpr int kColumns = 128 / sizeof(W), kGroups = kColumns / 32, kStepBytes = 64;
  struct Step {
    uint4 bits[2][2];  // [row][half of the columns]
  };
  const W* row;
  int rows, width;

  DEVICE WeightRows(const PackedWeight& w, int64_t first_row, int rows, int width)
      : row(static_cast<const W*>(w.codes) + (first_row + lane_row()) * width),
        rows(rows),
        width(width) {}

  DEVICE static int lane_row() { return threadIdx.x % 32 / 4; }

  DEVICE Step load(int first FROM_HERE) const {
    Step step;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int column = first + half * kColumns / 2 + threadIdx.x % 4 * (16 / sizeof(W));
        step.bits[i][half] = load_once_if(lane_row() + i * 8 < rows && column < width,
                                          row + int64_t{8} * i * width + column HERE);
      }
    return step;
  }

  // Of a row of tokens; zeros unless it exists.
  DEVICE static uint4 tokens(bool exists, const T* row, int first, int width FROM_HERE) {
    if constexpr (kRounds) {
      const int column = first + threadIdx.x % 4 * 4;
      const uint2 low = load_8_fresh_if(exists && column < width, row + column HERE);
      const uint2 high = load_8_fresh_if(exists && column + 16 < width, row + column + 16 HERE);
      return {low.x, low.y, high.x, high.y};
    } else {
      const int column = first + threadIdx.x % 4 * 8;
      return load_fresh_if(exists && column < width, row + column HERE);
    }
  }

  // sum[n] += rows xᵀ of the first `eights` of kEights times eight tokens.
  template <int kEights>
  DEVICE void multiply_step(float (&sum)[kEights][4], const Step& step,
                            const uint4 (&x)[kEights][kGroups], int eights) const {
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
      const uint4 low = kRounds ? rounded(step.bits[0]) : step.bits[0][i];
      const uint4 high = kRounds ? rounded(step.bits[1]) : step.bits[1][i];
#pragma unroll
      for (int n = 0; n < kEights; n++) {
        if (n >= eights) break;
        multiply<T>(sum[n], low, high, x[n][i]);
      }
    }
  }

  template <int kEights>
  DEVICE void finish(float (&)[kEights][4]) const {}

  DEVICE static uint4 rounded(const uint4 (&bits)[2]) {
    float w[8];
    __builtin_memcpy(w, bits, sizeof w);
    return {pack_pair<T>(w[0], w[1]), pack_pair<T>(w[2], w[3]), pack_pair<T>(w[4], w[5]),
            pack_pair<T>(w[6], w[7])};
  }
};

// Of a packed weight, a tile a step; its 16 rows all exist.
template <class T, int kBits>
struct WeightRows<T, Bits<kBits>> {
  static constexpr int kColumns = kPackedColumns, kGroups = 2, kStepBytes = 4 * kBits;
  using Step = LaneTile<kBits>;
  const PackedWeight& weight;
  int row_tile, width;

  DEVICE WeightRows(const PackedWeight& w, int64_t first_row, int, int width)
      : weight(w), row_tile(static_cast<int>(first_row / kPackedRows)), width(width) {}

  DEVICE Step load(int first FROM_HERE) const {
    const int64_t tile = int64_t{row_tile} * (width / kColumns) + first / kColumns;
    return load_tile<kBits>(weight, tile, first < width HERE);
  }

  DEVICE static uint4 tokens(bool exists, const T* row, int first, int width FROM_HERE) {
    return WeightRows<T, T>::tokens(exists, row, first, width HERE);
  }

  template <int kEights>
  DEVICE void multiply_step(float (&sum)[kEights][4], const Step& step,
                            const uint4 (&x)[kEights][kGroups], int eights) const {
    multiply_tile<T, kBits>(sum, weight, step, x, eights);
  }

  // The sums over all columns take the rows' scales.
  template <int kEights>
  DEVICE void finish(float (&sum)[kEights][4]) const {
    if (!weight.row_scales) return;
    const float* scales =
        weight.row_scales + int64_t{row_tile} * kPackedRows + threadIdx.x % 32 / 4;
    const float low = scales[0], high = scales[8];
#pragma unroll
    for (int n = 0; n < kEights; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[n][e] *= e < 2 ? low : high;
  }
};

// Rows of up to kEights times eight tokens, of which `count` exist; row[n] is the lane's of the
// n-th eight.
template <class T, int kEights>
struct Tokens {
  const T* data;
  int64_t stride;
  int row[kEights], count;
};

// sum[m] += rows[m] tokensᵀ over the columns first, first + step, ..., a step's width of each.
// Steps of weights are asked for kAhead before they are used.
template <class T, int kMatrices, int kEights, class Rows>
DEVICE void walk(float (&sum)[kMatrices][kEights][4], const Rows (&rows)[kMatrices],
                 const Tokens<T, kEights>& tokens, int first, int step, int width) {
  // On their way in a lane; with more tokens, registers hold their columns and sums instead.
  constexpr int kBytes = 128 / kEights;
  constexpr int kStepBytes = kMatrices * Rows::kStepBytes;
  constexpr int kAhead = kBytes > kStepBytes ? kBytes / kStepBytes : 1;
  const int lane_token = threadIdx.x % 32 / 4;
  typename Rows::Step ahead[kAhead][kMatrices];
  int next = first;
  const auto ask = [&](int i) {
#pragma unroll
    for (int m = 0; m < kMatrices; m++) ahead[i][m] = rows[m].load(next);
    next += step;
  };
#pragma unroll
  for (int i = 0; i < kAhead; i++) ask(i);
  for (int column = first; column < width;)
#pragma unroll
    for (int i = 0; i < kAhead; i++, column += step) {
      if (column >= width) break;
      uint4 x[kEights][Rows::kGroups];
#pragma unroll
      for (int n = 0; n < kEights; n++)
#pragma unroll
        for (int g = 0; g < Rows::kGroups; g++)
          x[n][g] =
              Rows::tokens(n * 8 + lane_token < tokens.count,
                           tokens.data + tokens.row[n] * tokens.stride, column + g * 32, width);
#pragma unroll
      for (int m = 0; m < kMatrices; m++)
        rows[m].multiply_step(sum[m], ahead[i][m], x, (tokens.count + 7) / 8);
      ask(i);
    }
#pragma unroll
  for (int m = 0; m < kMatrices; m++) rows[m].finish(sum[m]);
}

// Of one tile, whose assignments `order` begins with, the hidden values of 16 gate rows.
template <class T, class W, class Batch>
DEVICE void stream_gate_up(const MoeExpertsParams& p, const MoeTile& tile, const int32_t* order,
                           int first_row, GateUpSmem<T, Batch>& smem) {
  using Rows = WeightRows<T, W>;
  constexpr int kBlocks = Batch::kTokens / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t gate_row = int64_t{2} * tile.expert * p.hidden_width + first_row;
  const int exist = p.hidden_width - first_row;
  const Rows gate_up[2] = {{p.gate_up, gate_row, exist, p.width},
                           {p.gate_up, gate_row + p.hidden_width, exist, p.width}};
  Tokens<T, kBlocks> tokens{static_cast<const T*>(p.x), p.x_stride, {}, tile.rows};
#pragma unroll
  for (int n = 0; n < kBlocks; n++)
    tokens.row[n] = order[min(n * 8 + lane / 4, tile.rows - 1)] / p.k;
  float sum[2][kBlocks][4] = {};
  walk(sum, gate_up, tokens, warp * Rows::kColumns, kStreamWarps * Rows::kColumns, p.width);

#pragma unroll
  for (int n = 0; n < kBlocks; n++)
#pragma unroll
    for (int m = 0; m < 2; m++) {
      const float (&of)[4] = sum[m][n];
      store_shared(&smem.partial[warp][2 * n + m][lane], {of[0], of[1], of[2], of[3]});
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
  using Rows = WeightRows<T, W>;
  constexpr int kBlocks = Batch::kTokens / 8;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  auto& smem = shared_memory<DownSmem<Batch>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.x * kStreamRows;

  for (int t = warp;; t += kStreamWarps) {
    const MoeTile tile = moe_tile(p.offsets, p.num_experts, t, Batch::kTokens);
    if (tile.rows == 0) break;
    const Rows down[1] = {
        {p.down, int64_t{tile.expert} * p.width + first_row, p.width - first_row, p.hidden_width}};
    Tokens<T, kBlocks> tokens{static_cast<const T*>(p.hidden), p.hidden_width, {}, tile.rows};
#pragma unroll
    for (int n = 0; n < kBlocks; n++) tokens.row[n] = tile.begin + n * 8 + lane / 4;
    float product[1][kBlocks][4] = {};
    walk(product, down, tokens, 0, Rows::kColumns, p.hidden_width);
#pragma unroll
    for (int n = 0; n < kBlocks; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = n * 8 + lane % 4 * 2 + e % 2;
        if (i < tile.rows)
          smem.product[p.order[tile.begin + i]][lane / 4 + e / 2 * 8] = product[0][n][e];
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
