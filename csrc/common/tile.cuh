// Tiles of 16-bit values in shared memory: panels of 64 columns side by side, each kRows rows of
// 128 bytes, whose eight 16-byte chunks are permuted within their row so that neither the copies in
// nor the matrix loads out meet a bank twice. It is also the layout that wgmma reads, for which a
// tile begins on a multiple of 1024 bytes.
#pragma once

#include "e4m3.cuh"
#include "ptx.h"
#include "vec.cuh"

namespace gemma4 {

template <class T>
DEVICE uint32_t pack_pair(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  __builtin_memcpy(&bits, pair, 4);
  return bits;
}

// 16 bytes of shared memory in one access.
#ifdef GEMMA4_EMULATION
DEVICE float4 load_shared(const float4* p FROM_HERE) {
  float4 value;
  emulation::load(&value, p, 16 HERE);
  return value;
}
DEVICE void store_shared(float4* p, float4 value FROM_HERE) {
  emulation::store(p, &value, 16 HERE);
}
DEVICE uint4 load_shared(const uint4* p FROM_HERE) {
  uint4 value;
  emulation::load(&value, p, 16 HERE);
  return value;
}
DEVICE void store_shared(uint4* p, uint4 value FROM_HERE) { emulation::store(p, &value, 16 HERE); }
#else
DEVICE float4 load_shared(const float4* p) { return *p; }
DEVICE void store_shared(float4* p, float4 value) { *p = value; }
DEVICE uint4 load_shared(const uint4* p) { return *p; }
DEVICE void store_shared(uint4* p, uint4 value) { *p = value; }
#endif

// Where chunk `chunk` of row `row` stands, in elements. Eight rows below each other hold a chunk in
// eight different places modulo 128 bytes, which is what one matrix load reads at once.
template <int kRows>
DEVICE int chunk_offset(int row, int chunk) {
  static_assert(kRows % 8 == 0);
  // The first two terms are those of a tile of one panel, which compilers see through best; of the
  // next panel's begin they have 64 elements.
  return row * 64 + (chunk ^ (row & 7)) * 8 + chunk / 8 * (kRows - 1) * 64;
}

// Chunk `chunk` of row `row`. Tiles of bytes have the same rows of 128, with other permutations: of
// neighbouring rows the first four chunks and the last four change places, so that lanes that read
// four chunks of a row each meet no bank twice either.
template <int kRows, class T>
DEVICE T* chunk_of(T* tile, int row, int chunk) {
  if constexpr (sizeof(T) == 2)
    return tile + chunk_offset<kRows>(row, chunk);
  else
    return tile + (chunk / 8 * kRows + row) * 128 + (chunk % 8 ^ (row % 2 * 4 + row / 2 % 4)) * 16;
}

template <class T>
struct SourceRow {
  const T* data;  // a valid address in any case
  bool exists;    // or it is not read, and zeros come in its place
};

// Starts the copies of kRows rows, of which the first `columns` (a multiple of a chunk's) exist;
// all kThreads threads take part, each with one chunk of every kStep-th row.
template <int kWidth, int kRows, int kThreads, class T, class Source>
DEVICE void copy_rows(T* tile, const Source& source, int columns FROM_HERE) {
  constexpr int kOfChunk = 16 / sizeof(T), kChunks = kWidth / kOfChunk;
  constexpr int kStep = kThreads / kChunks, kSteps = (kRows + kStep - 1) / kStep;
  static_assert(kThreads % kChunks == 0);
  const int first_row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const auto in_tile = [&](int i) {
    return (i + 1) * kStep <= kRows || i * kStep + first_row < kRows;
  };
  // All sources first: a load of shared memory between two copies would wait for the one and hold
  // up the other.
  SourceRow<T> from[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; i++) from[i] = source(in_tile(i) ? i * kStep + first_row : first_row);
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    if (!in_tile(i)) break;
    ptx::cp_async<16>(ptx::shared_address(chunk_of<kRows>(tile, i * kStep + first_row, chunk) HERE),
                      from[i].data + chunk * kOfChunk,
                      from[i].exists && chunk * kOfChunk < columns ? 16 : 0 HERE);
  }
}
template <int kWidth, int kRows, int kThreads, class T, class Source>
DEVICE void copy_rows(T* tile, const Source& source FROM_HERE) {
  copy_rows<kWidth, kRows, kThreads>(tile, source, kWidth HERE);
}

// The same from rows of float, rounded to T on the way through registers: done when it returns.
template <int kWidth, int kRows, int kThreads, class T, class Source>
DEVICE void round_rows(T* tile, const Source& source, int columns FROM_HERE) {
  constexpr int kChunks = kWidth / 8, kStep = kThreads / kChunks, kInFlight = 4;
  static_assert(kThreads % kChunks == 0 && kRows % (kStep * kInFlight) == 0);
  const int first_row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
#pragma unroll
  for (int first = first_row; first < first_row + kRows; first += kStep * kInFlight) {
    Vec<float, 8> values[kInFlight] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; i++) {
      const SourceRow<float> from = source(first + i * kStep);
      if (from.exists && chunk * 8 < columns) values[i] = load<8>(from.data + chunk * 8 HERE);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; i++)
      store_shared(
          reinterpret_cast<uint4*>(tile + chunk_offset<kRows>(first + i * kStep, chunk)),
          {pack_pair<T>(values[i][0], values[i][1]), pack_pair<T>(values[i][2], values[i][3]),
           pack_pair<T>(values[i][4], values[i][5]),
           pack_pair<T>(values[i][6], values[i][7])} HERE);
  }
}

// Where a lane reads for the matrix loads of 16x16 blocks: its address in one block, from which
// those of the others differ by a constant and one xor, so that unrolled loops compute nothing.
template <int kRows>
struct LaneAddress {
  uint32_t first;

  // In the block `rows` (a multiple of 8) below and `columns` (of 16) to the right. The first
  // block's column must be a multiple of all columns walked, or of 64: nothing carries then.
  DEVICE uint32_t at(int rows, int columns) const {
    return (first ^ (columns % 64 * 2)) + (columns / 64 * kRows + rows) * 128;
  }
};

// Of an A operand of mma_16816, or with ldmatrix_x4_trans of two B operands, of the first and of
// the last 8 columns: products with them are sums over the rows.
template <int kRows, class T>
DEVICE LaneAddress<kRows> lane_address(const T* tile, int row, int column FROM_HERE) {
  const int lane = threadIdx.x % 32;
  return {ptx::shared_address(tile + chunk_offset<kRows>(row + lane % 16, column / 8 + lane / 16)
                                         HERE)};
}

// Of two B operands, of the first and of the last 8 rows: products with them are sums over the
// columns.
template <int kRows, class T>
DEVICE LaneAddress<kRows> transposed_lane_address(const T* tile, int row, int column FROM_HERE) {
  const int lane = threadIdx.x % 32;
  const int offset = chunk_offset<kRows>(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2);
  return {ptx::shared_address(tile + offset HERE)};
}

// How wgmma finds a tile from a row (a multiple of 8) and column (of 64) on.
template <int kRows, class T>
DEVICE uint64_t wgmma_tile(const T* tile, int row, int column) {
  return ptx::wgmma_tile(ptx::shared_address(tile + chunk_offset<kRows>(row, column / 8)),
                         kRows * 128);
}
// To add to it for `rows` (a multiple of 8) below and `columns` (of 16) to the right.
template <int kRows>
DEVICE constexpr uint64_t wgmma_step(int rows, int columns) {
  return (columns / 64 * kRows + rows) * 8 + columns % 64 / 8;
}

}  // namespace gemma4
