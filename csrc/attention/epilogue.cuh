// How results leave a block.
#pragma once

#include "../common/tile.cuh"
#include "sequence.cuh"

namespace gemma4 {

// The warp's columns of d, each of a lane's two rows by its factor, to the first `rows` rows, which
// start at to(row). They go through the warp's own part of a tile, which no other warp reads any
// more, to leave in whole sectors.
template <class Tile, class T, class To>
  requires(!Tile::kCoded)
DEVICE void store_rows(T* tile, const float (&d)[Tile::kColumns / 8][4], const float (&factor)[2],
                       int rows, const To& to) {
  constexpr int kChunks = Tile::kColumns / 8;
  const int lane = threadIdx.x % 32, first_chunk = Tile::column() / 8;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int n = 0; n < kChunks; n++) {
      const int row = Tile::row() + lane / 4 + i * 8;
      T* at = tile + chunk_offset<Tile::kRows>(row, first_chunk + n) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(at) =
          pack_pair<T>(d[n][2 * i] * factor[i], d[n][2 * i + 1] * factor[i]);
    }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * kChunks / 32; i++) {
    const int row = Tile::row() + (i * 32 + lane) / kChunks;
    const int chunk = first_chunk + (i * 32 + lane) % kChunks;
    if (row >= rows) continue;
    const T* from = tile + chunk_offset<Tile::kRows>(row, chunk);
    ptx::store_16(to(row) + chunk * 8, load_shared(reinterpret_cast<const uint4*>(from)));
  }
}

// The same of products with codes, which have whole sectors in neighbouring lanes.
template <class Tile, class T, class To>
  requires(Tile::kCoded)
DEVICE void store_rows(T*, const float (&d)[Tile::kColumns / 8][4], const float (&factor)[2],
                       int rows, const To& to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = Tile::row() + lane / 4 + i * 8;
    if (row >= rows) continue;
    T* at = to(row) + Tile::column() + lane % 4 * 4;
#pragma unroll
    for (int n = 0; n < Tile::kColumns / 8; n += 2)
      ptx::store_8(at + n * 8,
                   {pack_pair<T>(d[n][2 * i] * factor[i], d[n + 1][2 * i] * factor[i]),
                    pack_pair<T>(d[n][2 * i + 1] * factor[i], d[n + 1][2 * i + 1] * factor[i])});
  }
}

// The lse of a lane's two rows, by the first of the lanes and warps that share them.
template <class Tile>
DEVICE void store_lse(const AttentionParams& p, const float (&lse)[2], const QueryRows& queries,
                      int b, int split, int first_row, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = Tile::row() + lane / 4 + i * 8;
    if (row >= rows || Tile::column() != 0 || lane % 4 != 0) continue;
    const int query = queries.query(first_row + row), head = queries.head(first_row + row);
    const int64_t token = queries.token(first_row + row);
    if (p.splits.divisor > 1)
      p.partial_lse[(split * p.tokens + token) * p.q_heads + head] = lse[i];
    else if (p.lse)
      p.lse[p.cu_seqlens_q ? head * p.lse_head_stride + token
                           : (int64_t{b} * p.q_heads + head) * p.lse_head_stride + query] = lse[i];
  }
}

// The fp32 results of a split, of rows that saw a key: the merge knows the others from their lse.
template <class Tile>
DEVICE void store_split(const AttentionParams& p, const float (&out)[Tile::kColumns / 8][4],
                        const float (&inverse)[2], const float (&row_sum)[2],
                        const QueryRows& queries, int split, int first_row, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = Tile::row() + lane / 4 + i * 8;
    if (row >= rows || row_sum[i] == 0.0f) continue;
    const int64_t token = queries.token(first_row + row);
    float* to =
        p.partial_out + ((split * p.tokens + token) * p.q_heads + queries.head(first_row + row)) *
                            int64_t{Tile::kHeadDim};
    const auto bits = [&](int n, int e) { return __float_as_uint(out[n][2 * i + e] * inverse[i]); };
    if constexpr (Tile::kCoded) {
#pragma unroll
      for (int n = 0; n < Tile::kColumns / 8; n += 2)
        ptx::store_16(to + Tile::column() + n * 8 + lane % 4 * 4,
                      {bits(n, 0), bits(n + 1, 0), bits(n, 1), bits(n + 1, 1)});
    } else {
#pragma unroll
      for (int n = 0; n < Tile::kColumns / 8; n++)
        ptx::store_8(to + Tile::column() + n * 8 + lane % 4 * 2, {bits(n, 0), bits(n, 1)});
    }
  }
}

// out = 0 and lse = -inf in the rows that no block computes: before the first sequence, behind the
// last one, and of this one what max_seqlen_q leaves out. (A loop over heads that begins at the
// thread's index makes nvcc compute the main loop's addresses anew in every iteration.)
template <class T>
DEVICE void fill_unowned(const AttentionParams& p, const Sequence& s, const RowTile& of, int g) {
  const int group = p.group.divisor;
  const auto fill = [&](int64_t begin, int64_t end) {
    for (int64_t token = begin + of.tile; token < end; token += of.tiles)
      for (int head = g * group; head < (g + 1) * group; head++) {
        T* out = static_cast<T*>(p.out) + (token * p.q_heads + head) * p.head_dim;
        for (int i = threadIdx.x * 8; i < p.head_dim; i += blockDim.x * 8)
          ptx::store_16(out + i, {0, 0, 0, 0});
        if (p.lse && threadIdx.x == 0) p.lse[head * p.lse_head_stride + token] = -INFINITY;
      }
  };
  const bool last = of.b == p.batch - 1;
  const int64_t end = last ? p.tokens : within(p.cu_seqlens_q[of.b + 1], p.tokens);
  if (of.b == 0) fill(0, s.q_begin);
  fill(s.q_begin + min(s.queries, p.max_seqlen_q), end);
}

}  // namespace gemma4
