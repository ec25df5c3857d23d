// Tiles of 16-bit values in shared memory: rows of kWidth values in 16-byte chunks, which are
// permuted within their row so that neither the copies in nor the matrix loads out meet a bank
// twice.
#pragma once

#include "ptx.h"

namespace gemma4 {

// Where chunk `chunk` of row `row` stands, in elements. Eight rows below each other hold a chunk in
// eight different places modulo 128 bytes, which is what one matrix load reads at once.
template <int kWidth>
DEVICE int chunk_offset(int row, int chunk) {
  static_assert(kWidth % 64 == 0);
  return row * kWidth + ((chunk ^ (row & 7)) * 8);
}

template <class T>
struct SourceRow {
  const T* data;  // a valid address in any case
  bool exists;    // or it is not read, and zeros come in its place
};

// Starts the copies of kRows rows, of which the first `columns` (a multiple of 8) exist; all
// kThreads threads take part.
template <int kWidth, int kRows, int kThreads, class T, class Source>
DEVICE void copy_rows(T* tile, const Source& source, int columns FROM_HERE) {
  constexpr int kChunks = kWidth / 8, kAll = kRows * kChunks;
#pragma unroll
  for (int i = 0; i < (kAll + kThreads - 1) / kThreads; i++) {
    const int index = i * kThreads + threadIdx.x;
    if (kAll % kThreads != 0 && index >= kAll) break;
    const int row = index / kChunks, chunk = index % kChunks;
    const SourceRow<T> from = source(row);
    ptx::cp_async<16>(ptx::shared_address(tile + chunk_offset<kWidth>(row, chunk) HERE),
                      from.data + chunk * 8, from.exists && chunk * 8 < columns ? 16 : 0 HERE);
  }
}
template <int kWidth, int kRows, int kThreads, class T, class Source>
DEVICE void copy_rows(T* tile, const Source& source FROM_HERE) {
  copy_rows<kWidth, kRows, kThreads>(tile, source, kWidth HERE);
}

// The 16x16 block at (row, column) as the A operand of mma_16816.
template <int kWidth, class T>
DEVICE void load_a(uint32_t (&a)[4], const T* tile, int row, int column FROM_HERE) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(
      a, ptx::shared_address(tile + chunk_offset<kWidth>(row + lane % 16, column / 8 + lane / 16)
                                        HERE) HERE);
}

// The transposed 16x16 block at (row, column) as two B operands, of rows row.. and of rows row
// + 8..: products with it are sums over the columns.
template <int kWidth, class T>
DEVICE void load_b_transposed(uint32_t (&b)[4], const T* tile, int row, int column FROM_HERE) {
  const int lane = threadIdx.x % 32;
  const int offset =
      chunk_offset<kWidth>(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2);
  ptx::ldmatrix_x4(b, ptx::shared_address(tile + offset HERE) HERE);
}

// The 16x16 block at (row, column) as two B operands, of columns column.. and of columns column
// + 8..: products with it are sums over the rows.
template <int kWidth, class T>
DEVICE void load_b(uint32_t (&b)[4], const T* tile, int row, int column FROM_HERE) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_trans(
      b, ptx::shared_address(tile + chunk_offset<kWidth>(row + lane % 16, column / 8 + lane / 16)
                                        HERE) HERE);
}

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
#else
DEVICE float4 load_shared(const float4* p) { return *p; }
DEVICE void store_shared(float4* p, float4 value) { *p = value; }
DEVICE uint4 load_shared(const uint4* p) { return *p; }
#endif

}  // namespace gemma4
