// y = a Wᵀ for up to 16 tokens, every weight read once.
//
// a is x; or, where a branch closes and the next one opens, r = (residual + rms_norm(x)
// post_weight) scale, which is stored, and a = rms_norm(r) norm_weight, each half of it if wanted.
// y is the product; or gelu_tanh(gate) up of the two halves of its rows; or gelu_tanh(product)
// factor.
//
// A block owns tiles of kSets x 8 rows of W (gated: 8 gate rows and their 8 up rows), every
// gridDim-th of them: 16 rows where there are enough for all multiprocessors, 8 so that 256 rows
// still make 32 blocks. Its warps take turns along the columns, a line of 128 bytes of each row at
// a time, and add up through shared memory in the order of the warps. Rows of W are the 8-column
// side of mma.sync and tokens its 16 rows: a token's bits depend neither on the others, nor on
// their number, nor on the tile.
//
// kSets x 4 loads of 16 bytes are on their way in each lane at any time, from before the
// norms to the last tile: a place is asked for anew as soon as it is used. Every block makes all of
// a for itself: its rows come from L2 while the first weights come from DRAM, and a launch is
// saved.
//
// Shared memory: sizeof(LinearSmallSmem) and, where a is not x, a itself. Bound: the weights, from
// DRAM.
#pragma once

#include "../common/math.cuh"
#include "../common/reduce.cuh"
#include "../common/row.cuh"
#include "../common/stream.cuh"
#include "../common/tile.cuh"
#include "ops.h"

namespace gemma4 {

constexpr int kLinearWarps = 8, kLinearThreads = kLinearWarps * 32;
constexpr int kLinearLines = 2;  // of 64 columns, on their way
// 16 bytes each that a thread holds of a row it norms.
constexpr int kNormVectors = 3;

template <int kSets>
struct LinearSmallSmem {
  float4 partial[2][kSets][kLinearWarps][32];
  BlockSum sum;
};

template <class T>
DEVICE float gated(float gate, float other) {
  return saturate<T>(gelu_tanh(gate) * other);
}

// Makes a, all of it; the first block stores r.
template <class T>
DEVICE void open_branch(const LinearSmallParams& p, T* a, BlockSum& smem) {
  const ColumnsOf<kNormVectors, T> columns{p.width, threadIdx.x, kLinearThreads};
  const float layer_scale =
      p.scale ? to_float(ptx::load_one_first(static_cast<const T*>(p.scale))) : 1.0f;
  int parity = 0;
  // Rows of weights are loaded where they are used: beside x, the residual and the weights on their
  // way registers would not hold them.
  for (const void* row : {p.post_weight, p.norm_weight})
    if (row)
      columns.each([&](int, int column) { ptx::prefetch(static_cast<const T*>(row) + column); });
  ptx::wait_for_previous_kernel();
  for (int token = 0; token < p.tokens; token++) {
    const auto x = columns.load_fresh(static_cast<const T*>(p.x) + token * p.x_stride);
    Row<T, 8, kNormVectors> r;
    if (!p.residual) {
      r = x;
    } else {
      T* r_row = static_cast<T*>(p.new_residual) + int64_t{token} * p.width;
      const auto residual =
          columns.load_fresh(static_cast<const T*>(p.residual) + token * p.residual_stride);
      const float x_sum = block_sum(columns.sum_of_squares(x), smem, parity);
      const float x_scale = inv_rms(x_sum, p.width, p.eps);
      columns.each([&](int i, int column) {
        auto sum = residual.at(i, column);
        const auto branch = x.at(i, column);
        const auto w = load<8>(static_cast<const T*>(p.post_weight) + column);
#pragma unroll
        for (int j = 0; j < sum.kWidth; j++)
          sum.set(j, (sum[j] + branch[j] * x_scale * w[j]) * layer_scale);
        r.vectors[i] = sum;
        if (blockIdx.x == 0) store(r_row + column, sum);
      });
    }
    const float sum = p.norm_weight ? block_sum(columns.sum_of_squares(r), smem, parity) : 0.0f;
    const float scale = inv_rms(sum, p.width, p.eps);
    columns.each([&](int i, int column) {
      auto y = r.at(i, column);
      if (p.norm_weight) {
        const auto w = load<8>(static_cast<const T*>(p.norm_weight) + column);
#pragma unroll
        for (int j = 0; j < y.kWidth; j++) y.set(j, y[j] * scale * w[j]);
      }
      uint4 bits;
      __builtin_memcpy(&bits, &y, sizeof bits);
      store_shared(reinterpret_cast<uint4*>(a + token * p.a_stride + column), bits);
    });
  }
  __syncthreads();
}

template <class T, bool kOpens, int kSets, bool kGated>
__global__ void __launch_bounds__(kLinearThreads, 2)
    linear_small_kernel(const __grid_constant__ LinearSmallParams p) {
  static_assert(!kGated || kSets == 2);
  constexpr int kRows = kGated ? 8 : 8 * kSets;  // of y, of a tile
  ptx::let_next_kernel_start();
  auto& smem = shared_memory<LinearSmallSmem<kSets>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tiles = p.rows / kRows;
  const int64_t next_set = int64_t{kGated ? p.rows : 8} * p.width;

  // A warp's lines of 64 columns; of each half of one a lane takes 8.
  const int lines = (p.width + kLinearWarps * 64 - 1) / (kLinearWarps * 64);
  const auto column = [&](int line, int half) {
    return (line * kLinearWarps + warp) * 64 + half * 32 + lane % 4 * 8;
  };

  // Where in the weights the next loads are.
  int ahead = blockIdx.x, first = 0;
  const T* row = static_cast<const T*>(p.weight) + int64_t{ahead * kRows + lane / 4} * p.width;
  uint4 weight[2 * kLinearLines][kSets];
  const auto ask = [&](int i) {
    const int from = column(first + i / 2, i % 2);
#pragma unroll
    for (int set = 0; set < kSets; set++)
      weight[i][set] = load_first_if(ahead < tiles && from < p.width, row + set * next_set + from);
  };
  const auto advance = [&] {
    first += kLinearLines;
    if (first < lines) return;
    first = 0;
    ahead += gridDim.x;
    row += int64_t{kRows} * gridDim.x * p.width;
  };
#pragma unroll
  for (int i = 0; i < 2 * kLinearLines; i++) ask(i);
  advance();

  const T* a = static_cast<const T*>(p.x);
  int64_t stride = p.x_stride;
  if constexpr (kOpens) {
    T* made = reinterpret_cast<T*>(&smem + 1);
    open_branch(p, made, smem.sum);
    a = made, stride = p.a_stride;
  } else {
    ptx::wait_for_previous_kernel();
  }
  const auto token = [&](int i, int from) {
    const bool exists = i < p.tokens && from < p.width;
    if constexpr (kOpens)
      return exists ? load_shared(reinterpret_cast<const uint4*>(a + i * stride + from))
                    : uint4{0, 0, 0, 0};
    else
      return load_fresh_if(exists, a + i * stride + from);
  };

  for (int tile = blockIdx.x, turn = 0; tile < tiles; tile += gridDim.x, turn++) {
    float sum[kSets][4] = {};
    for (int line = 0; line < lines; line += kLinearLines) {
#pragma unroll
      for (int i = 0; i < 2 * kLinearLines; i++) {
        const int from = column(line + i / 2, i % 2);
        const uint4 low = token(lane / 4, from), high = token(8 + lane / 4, from);
#pragma unroll
        for (int set = 0; set < kSets; set++) multiply<T>(sum[set], low, high, weight[i][set]);
        ask(i);
      }
      advance();
    }

    // Two of them: while one warp still adds, the others may already fill the other.
    auto& partial = smem.partial[turn % 2];
#pragma unroll
    for (int set = 0; set < kSets; set++)
      store_shared(&partial[set][warp][lane], {sum[set][0], sum[set][1], sum[set][2], sum[set][3]});
    __syncthreads();
    if (warp != turn % kLinearWarps) continue;
    float4 total[kSets] = {};
#pragma unroll
    for (int set = 0; set < kSets; set++)
#pragma unroll
      for (int w = 0; w < kLinearWarps; w++) {
        const float4 part = load_shared(&partial[set][w][lane]);
        total[set].x += part.x, total[set].y += part.y;
        total[set].z += part.z, total[set].w += part.w;
      }
    const auto write = [&](int t, int r, float low, float high) {
      if (t < p.tokens)
        *reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + int64_t{t} * p.rows + r) =
            pack_pair<T>(low, high);
    };
    const int t = lane / 4, r = tile * kRows + lane % 4 * 2;
    if constexpr (kGated) {
      const float4 gate = total[0], up = total[1];
      write(t, r, gated<T>(gate.x, up.x), gated<T>(gate.y, up.y));
      write(t + 8, r, gated<T>(gate.z, up.z), gated<T>(gate.w, up.w));
    } else {
#pragma unroll
      for (int set = 0; set < kSets; set++) {
        float4 y = total[set];
        if (p.factor) {
          const auto factor = [&](int token, int row) {
            return token < p.tokens
                       ? to_float(static_cast<const T*>(p.factor)[token * p.factor_stride + row])
                       : 0.0f;
          };
          y = {gated<T>(y.x, factor(t, r + set * 8)), gated<T>(y.y, factor(t, r + set * 8 + 1)),
               gated<T>(y.z, factor(t + 8, r + set * 8)),
               gated<T>(y.w, factor(t + 8, r + set * 8 + 1))};
        }
        write(t, r + set * 8, y.x, y.y);
        write(t + 8, r + set * 8, y.z, y.w);
      }
    }
  }
}

}  // namespace gemma4
