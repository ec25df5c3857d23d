// y = a Wᵀ for up to 16 tokens, every weight read once.
//
// a is x; or, where a branch closes and the next one opens, r = (residual + rms_norm(x)
// post_weight) scale, which is stored, and a = rms_norm(r) norm_weight, each half of it if wanted.
// Two branches that close as one are first made one: x = rms_norm(x) x_weight + rms_norm(other)
// other_weight.
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

#include "../common/launch.h"
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

// Elements from a row of a to the next in shared memory: 64 bytes past a whole number of lines, so
// that two tokens, which one access reads at once, share no bank.
inline int padded_row(int width) { return round_up(width, 64) + 32; }

template <int kSets>
struct LinearSmallSmem {
  float4 partial[2][kSets][kLinearWarps][32];
  BlockSum sum;
};

// Makes a, all of it, in shared memory: what norm(token, column, y, scale) makes of each vector y
// of r, whose (mean r² + eps)^-½ is `scale`. The first block stores r.
template <class T, class Norm>
DEVICE void open_branch(const OpeningParams& p, T* a, BlockSum& smem, const Norm& norm) {
  const ColumnsOf<kNormVectors, T> columns{p.width, threadIdx.x, kLinearThreads};
  const float layer_scale =
      p.scale ? to_float(ptx::load_one_first(static_cast<const T*>(p.scale))) : 1.0f;
  int parity = 0;
  // Rows of weights are loaded where they are used: beside x, the residual and the weights on their
  // way registers would not hold them.
  for (const void* row : {p.x_weight, p.other_weight, p.post_weight, p.norm_weight})
    if (row)
      columns.each([&](int, int column) { ptx::prefetch(static_cast<const T*>(row) + column); });
  ptx::wait_for_previous_kernel();
  for (int token = 0; token < p.tokens; token++) {
    auto x = columns.load_fresh(static_cast<const T*>(p.x) + token * p.x_stride);
    if (p.other) {
      const auto other =
          columns.load_fresh(static_cast<const T*>(p.other) + token * p.other_stride);
      const auto close = [&](const auto& branch, const void* weight, bool adds) {
        const float sum = block_sum(columns.sum_of_squares(branch), smem, parity);
        const float scale = inv_rms(sum, p.width, p.eps);
        columns.each([&](int i, int column) {
          auto to = x.at(i, column);
          const auto from = branch.at(i, column);
          const auto w = load<8>(static_cast<const T*>(weight) + column);
#pragma unroll
          for (int j = 0; j < to.kWidth; j++)
            to.set(j, (adds ? to[j] : 0.0f) + from[j] * scale * w[j]);
          x.vectors[i] = to;
        });
      };
      close(x, p.x_weight, false);
      close(other, p.other_weight, true);
    }
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
      norm(token, column, y, scale);
      uint4 bits;
      __builtin_memcpy(&bits, &y, sizeof bits);
      store_shared(reinterpret_cast<uint4*>(a + token * p.a_stride + column), bits);
    });
  }
  __syncthreads();
}

// y = y scale weight, of a vector of the row.
template <class T>
DEVICE void scale_by(Vec<T, 8>& y, float scale, const void* weight, int column) {
  const auto w = load<8>(static_cast<const T*>(weight) + column);
#pragma unroll
  for (int j = 0; j < y.kWidth; j++) y.set(j, y[j] * scale * w[j]);
}

// The rows of W that a block multiplies. A tile is `sets` times 8 of them, `next_set` elements
// apart; its first is row tile * tile_rows.
template <class T>
struct WeightTiles {
  const T* weight;
  int64_t next_set;
  int width, tiles, tile_rows, sets;
  int first, step;  // the block's are first, first + step, ...
};

// The products of a block's tiles. `open` makes a, once the first weights are on their way, and
// returns token(t, column), which reads 8 columns of it, zeros where there are none; `finish` is
// given a tile and what a lane of one warp has of it: in x, y rows lane % 4 * 2 and the next of a
// set, of token lane / 4; in z, w of token lane / 4 + 8.
template <class T, int kSets, class Open, class Finish>
DEVICE void multiply_tiles(const WeightTiles<T>& w, LinearSmallSmem<kSets>& smem, Open&& open,
                           Finish&& finish) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // A warp's lines of 64 columns; of each half of one a lane takes 8.
  const int lines = (w.width + kLinearWarps * 64 - 1) / (kLinearWarps * 64);
  const auto column = [&](int line, int half) {
    return (line * kLinearWarps + warp) * 64 + half * 32 + lane % 4 * 8;
  };

  // Where in the weights the next loads are.
  int ahead = w.first, first = 0;
  const T* row = w.weight + int64_t{ahead * w.tile_rows + lane / 4} * w.width;
  uint4 weight[2 * kLinearLines][kSets];
  const auto ask = [&](int i) {
    const int from = column(first + i / 2, i % 2);
#pragma unroll
    for (int set = 0; set < kSets; set++)
      weight[i][set] = load_first_if(ahead < w.tiles && from < w.width && set < w.sets,
                                     row + set * w.next_set + from);
  };
  const auto advance = [&] {
    first += kLinearLines;
    if (first < lines) return;
    first = 0;
    ahead += w.step;
    row += int64_t{w.tile_rows} * w.step * w.width;
  };
#pragma unroll
  for (int i = 0; i < 2 * kLinearLines; i++) ask(i);
  advance();

  const auto token = open();
  for (int tile = w.first, turn = 0; tile < w.tiles; tile += w.step, turn++) {
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
      for (int v = 0; v < kLinearWarps; v++) {
        const float4 part = load_shared(&partial[set][v][lane]);
        total[set].x += part.x, total[set].y += part.y;
        total[set].z += part.z, total[set].w += part.w;
      }
    finish(tile, total);
  }
}

// Into y, [tokens, rows]: what a lane holds of eight of its rows, from `row` on.
template <class T>
DEVICE void write_rows(void* y, int tokens, int rows, int row, float4 of_lane) {
  const int t = threadIdx.x % 32 / 4, r = row + threadIdx.x % 4 * 2;
  const auto write = [&](int t, float low, float high) {
    if (t < tokens)
      *reinterpret_cast<uint32_t*>(static_cast<T*>(y) + int64_t{t} * rows + r) =
          pack_pair<T>(low, high);
  };
  write(t, of_lane.x, of_lane.y);
  write(t + 8, of_lane.z, of_lane.w);
}

template <class T>
DEVICE float4 gated(float4 gate, float4 up) {
  return {gated<T>(gate.x, up.x), gated<T>(gate.y, up.y), gated<T>(gate.z, up.z),
          gated<T>(gate.w, up.w)};
}

// What read(t, column) gives of a token's 8 columns; zeros where there are none.
template <class Read>
DEVICE auto zeros_beyond(const OpeningParams& p, const Read& read) {
  return [&p, read](int t, int from) {
    const bool exists = t < p.tokens && from < p.width;
    return exists ? read(t, from) : uint4{0, 0, 0, 0};
  };
}

// Where open_branch has put a: in shared memory.
template <class T>
DEVICE auto shared_tokens(const OpeningParams& p, const T* a) {
  return [&p, a](int t, int from) {
    return load_shared(reinterpret_cast<const uint4*>(a + t * p.a_stride + from));
  };
}
template <class T>
DEVICE auto tokens_at(const OpeningParams& p, const T* a) {
  return zeros_beyond(p, shared_tokens(p, a));
}

// Makes a and returns read(t, column), of 8 columns that exist.
template <class T, bool kOpens, int kSets>
DEVICE auto open_tokens(const LinearSmallParams& p, LinearSmallSmem<kSets>& smem) {
  if constexpr (kOpens) {
    T* a = reinterpret_cast<T*>(&smem + 1);
    open_branch(p, a, smem.sum, [&](int, int column, auto& y, float scale) {
      if (p.norm_weight) scale_by(y, scale, p.norm_weight, column);
    });
    return shared_tokens(p, a);
  } else {
    ptx::wait_for_previous_kernel();
    return [&p](int t, int from) {
      return ptx::load_16_coherent(static_cast<const T*>(p.x) + t * p.x_stride + from);
    };
  }
}

template <class T, bool kOpens, int kSets, bool kGated>
__global__ void __launch_bounds__(kLinearThreads, 2)
    linear_small_kernel(const __grid_constant__ LinearSmallParams p) {
  static_assert(!kGated || kSets == 2);
  constexpr int kRows = kGated ? 8 : 8 * kSets;  // of y, of a tile
  ptx::let_next_kernel_start();
  auto& smem = shared_memory<LinearSmallSmem<kSets>>();
  const WeightTiles<T> tiles{.weight = static_cast<const T*>(p.weight),
                             .next_set = int64_t{kGated ? p.rows : 8} * p.width,
                             .width = p.width,
                             .tiles = p.rows / kRows,
                             .tile_rows = kRows,
                             .sets = kSets,
                             .first = static_cast<int>(blockIdx.x),
                             .step = static_cast<int>(gridDim.x)};
  const auto open = [&] { return zeros_beyond(p, open_tokens<T, kOpens>(p, smem)); };
  multiply_tiles(tiles, smem, open, [&](int tile, const float4(&total)[kSets]) {
    if constexpr (kGated)
      return write_rows<T>(p.y, p.tokens, p.rows, tile * kRows, gated<T>(total[0], total[1]));
#pragma unroll
    for (int set = 0; set < kSets; set++) {
      float4 y = total[set];
      if (p.factor) {
        const int t = threadIdx.x % 32 / 4, r = tile * kRows + set * 8 + threadIdx.x % 4 * 2;
        const auto factor = [&](int t, int r) {
          return t < p.tokens ? to_float(static_cast<const T*>(p.factor)[t * p.factor_stride + r])
                              : 0.0f;
        };
        y = gated<T>(y, {factor(t, r), factor(t, r + 1), factor(t + 8, r), factor(t + 8, r + 1)});
      }
      write_rows<T>(p.y, p.tokens, p.rows, tile * kRows + set * 8, y);
    }
  });
}

}  // namespace gemma4
