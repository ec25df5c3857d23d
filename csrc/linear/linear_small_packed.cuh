// linear_small_kernel's product of packed weights.
//
// A tile of 16 rows of W is the matrix operand of mma.sync and tokens are its 8 columns, the second
// eight of them only if there are more than eight: a token's bits do not hang on that. A block owns
// kSets tiles (gated: a gate tile and the up tile of its rows), every gridDim-th of them; its warps
// take turns along the 64 columns of a tile. Loads of 64 bytes are on their way in each lane at any
// time, from before the norms to the last tile.
//
// Shared memory: as linear_small_kernel's. Bound: the weights, from DRAM. For 16 bytes of codes in
// a lane there are some 90 instructions of int4, 65 of eight bits and 135 of e2m1; an H100, which
// has the least time of its memory, issues 140 meanwhile.
#pragma once

#include "linear_small.cuh"
#include "packed.cuh"

namespace gemma4 {

// The tiles that a block multiplies: kSets row tiles, `next_set` apart, the first `next` behind
// that of the one before.
struct PackedTiles {
  PackedWeight weight;
  int next, next_set;
  int lines;               // tiles side by side in a row tile
  int tiles, first, step;  // the block's are first, first + step, ...
};

// The products of a block's tiles with tokens. `open` is that of multiply_tiles, but is asked for
// what there is alone; `finish` is given a tile, which eight of the tokens, and what a lane of one
// warp has of them, without row scales: in x, y row lane / 4 of a set's 16, of tokens lane % 4 * 2
// and the next; in z, w row 8 + lane / 4.
template <class T, int kBits, int kSets, class Open, class Finish>
DEVICE void multiply_packed_tiles(const PackedTiles& w, int tokens, LinearSmallSmem<kSets>& smem,
                                  Open&& open, Finish&& finish) {
  constexpr int kLines = 16 / kBits / kSets;  // on their way
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int lines = (w.lines + kLinearWarps - 1) / kLinearWarps;
  const int eights = tokens > 8 ? 2 : 1;

  // Where in the weight the next loads are.
  int ahead = w.first, first = 0;
  LaneTile<kBits> weight[kLines][kSets];
  const auto ask = [&](int i) {
    const int line = (first + i) * kLinearWarps + warp;
    if (ahead >= w.tiles || line >= w.lines) return;
#pragma unroll
    for (int set = 0; set < kSets; set++)
      load_tile(weight[i][set], w.weight, (ahead * w.next + set * w.next_set) * w.lines + line);
  };
  const auto advance = [&] {
    first += kLines;
    if (first < lines) return;
    first = 0;
    ahead += w.step;
  };
#pragma unroll
  for (int i = 0; i < kLines; i++) ask(i);
  advance();

  const auto token = open();
  // Of tokens that do not exist nobody asks for a sum.
  const int lane_token[] = {min(lane / 4, tokens - 1), min(8 + lane / 4, tokens - 1)};
  for (int tile = w.first, turn = 0; tile < w.tiles; tile += w.step, turn++) {
    float sum[kSets][2][4] = {};
    for (int first_line = 0; first_line < lines; first_line += kLines) {
#pragma unroll
      for (int i = 0; i < kLines; i++) {
        const int line = (first_line + i) * kLinearWarps + warp;
        if (line < w.lines) {
          LaneScales scales[kSets];
#pragma unroll
          for (int set = 0; set < kSets; set++)
            scales[set] = lane_scales<T, kBits>(w.weight, weight[i][set].scales);
#pragma unroll
          for (int half = 0; half < 2; half++) {
            uint4 x[2];
#pragma unroll
            for (int eight = 0; eight < 2; eight++)
              if (eight < eights)
                x[eight] = token(lane_token[eight], line * 64 + half * 32 + lane % 4 * 8);
#pragma unroll
            for (int set = 0; set < kSets; set++)
              multiply_half<T>(sum[set], w.weight, weight[i][set], scales[set], half, x, eights);
          }
        }
        ask(i);
      }
      advance();
    }

    // Of two eights each has a place; one has both in turns, so that while one warp still adds, the
    // others may already fill the other.
    const auto partial = [&](int eight) { return smem.partial[eights == 2 ? eight : turn % 2]; };
#pragma unroll
    for (int eight = 0; eight < 2; eight++)
#pragma unroll
      for (int set = 0; set < kSets; set++) {
        const float (&of)[4] = sum[set][eight];
        if (eight < eights)
          store_shared(&partial(eight)[set][warp][lane], {of[0], of[1], of[2], of[3]});
      }
    __syncthreads();
    const int eight = (warp - turn % kLinearWarps + kLinearWarps) % kLinearWarps;
    if (eight < eights) {
      float4 total[kSets] = {};
#pragma unroll
      for (int set = 0; set < kSets; set++)
#pragma unroll
        for (int v = 0; v < kLinearWarps; v++) {
          const float4 part = load_shared(&partial(eight)[set][v][lane]);
          total[set].x += part.x, total[set].y += part.y;
          total[set].z += part.z, total[set].w += part.w;
        }
      finish(tile, eight, total);
    }
    if (eights == 2) __syncthreads();
  }
}

// What a lane has of 16 rows, from `row` on, times their scales.
DEVICE float4 scale_rows(const PackedWeight& w, int row, float4 of_lane) {
  if (!w.row_scales) return of_lane;
  const float* scales = w.row_scales + row + threadIdx.x % 32 / 4;
  const float low = scales[0], high = scales[8];
  return {of_lane.x * low, of_lane.y * low, of_lane.z * high, of_lane.w * high};
}

// Calls f(token, row, i) for the four numbers that a lane has of 16 rows, from `row` on.
template <class F>
DEVICE void each_of_lane(int tokens, int eight, int row, F&& f) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = eight * 8 + lane % 4 * 2 + i % 2;
    if (token < tokens) f(token, row + lane / 4 + i / 2 * 8, i);
  }
}

// Into y, [tokens, rows]: what a lane has of 16 rows, from `row` on.
template <class T>
DEVICE void write_lane_rows(void* y, int tokens, int64_t rows, int eight, int row, float4 of_lane) {
  const float values[4] = {of_lane.x, of_lane.y, of_lane.z, of_lane.w};
  T* const to = static_cast<T*>(y);
  const auto write = [&](int t, int r, int i) { to[t * rows + r] = from_float<T>(values[i]); };
  each_of_lane(tokens, eight, row, write);
}

template <class T, bool kOpens, int kSets, bool kGated, int kBits>
__global__ void __launch_bounds__(kLinearThreads, 2)
    linear_small_packed_kernel(const __grid_constant__ LinearSmallParams p) {
  static_assert(!kGated || kSets == 2);
  constexpr int kTiles = kGated ? 1 : kSets;  // of y's rows
  ptx::let_next_kernel_start();
  auto& smem = shared_memory<LinearSmallSmem<kSets>>();
  const int row_tiles = p.rows / kPackedRows;
  const PackedTiles tiles{.weight = p.packed,
                          .next = kTiles,
                          .next_set = kGated ? row_tiles : 1,
                          .lines = p.width / kPackedColumns,
                          .tiles = row_tiles / kTiles,
                          .first = static_cast<int>(blockIdx.x),
                          .step = static_cast<int>(gridDim.x)};
  const auto open = [&] { return open_tokens<T, kOpens>(p, smem); };
  const auto finish = [&](int tile, int eight, const float4(&total)[kSets]) {
#pragma unroll
    for (int set = 0; set < kTiles; set++) {
      const int row = (tile * kTiles + set) * kPackedRows;
      const float4 y = scale_rows(p.packed, row, total[set]);
      const float4 up = kGated ? scale_rows(p.packed, p.rows + row, total[kSets - 1]) : y;
      const float values[4] = {y.x, y.y, y.z, y.w}, ups[4] = {up.x, up.y, up.z, up.w};
      each_of_lane(p.tokens, eight, row, [&](int t, int r, int i) {
        float value = values[i];
        if (kGated)
          value = gated<T>(value, ups[i]);
        else if (p.factor)
          value =
              gated<T>(value, to_float(static_cast<const T*>(p.factor)[t * p.factor_stride + r]));
        static_cast<T*>(p.y)[int64_t{t} * p.rows + r] = from_float<T>(value);
      });
    }
  };
  multiply_packed_tiles<T, kBits>(tiles, p.tokens, smem, open, finish);
}

}  // namespace gemma4
