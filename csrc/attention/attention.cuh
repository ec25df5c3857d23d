// out = softmax(softcap(scale q kᵀ)) v, one pass over the keys with a running maximum and sum.
//
// Rows are (token, query head of one KV head) pairs, so that the heads that share keys share their
// loads, a window's edge costs few tiles and one new token still fills a tile. A block owns kRows
// of them and walks over the keys they see in tiles of kKeys; it may be given a part of the keys
// alone, and then leaves its result in fp32 for attention_merge.
//
// Warps form kRowWarps x kColumnWarps: a warp owns 16 rows and kColumns columns of q, k, v and out.
// Its part of q kᵀ sums over its own columns; the warps of the same rows exchange these partial
// scores through shared memory and then all hold the whole rows, so that the softmax needs no
// further exchange and p goes from accumulators to operands within the warp. This is what lets
// head_dim 512 fit: 16 x 512 fp32 outputs would be every register one warp's lanes have.
//
// Shared memory: sizeof(AttentionSmem): kRows + 2 kKeys (Hopper: 4 kKeys) rows of q, k and v, 2 KB
// per warp and 32 keys of partial scores (Hopper: twice), and where the keys lie. Bound, by the
// static report: in prefill shared memory, of which each warp reads all keys and values, on Hopper
// L2, of which each block does; in decode DRAM (k and v once).
#pragma once

#include "epilogue.cuh"
#include "mainloop.cuh"
#include "mainloop_wgmma.cuh"
#include "plan.h"
#include "softmax.cuh"

namespace gemma4 {

// Blocks that a multiprocessor must hold. Decoding waits for memory, and more of them hide it;
// without a number the compiler picks one that it cannot keep everywhere.
template <class Tile>
constexpr int kResidentBlocks = Tile::kRows == 16 && Tile::kHeadDim <= 256 ? 3 : 1;

// A block's tiles of keys, one an iteration; of iterations that do not exist, nothing is copied.
template <class T, class Tile>
struct KeyTiles {
  const AttentionParams& p;
  AttentionSmem<T, Tile>& smem;
  const Sequence& s;
  int b, g;
  KeyRange range;
  int iterations;

  DEVICE int first_key(int iteration) const { return range.begin + iteration * Tile::kKeys; }

  // A thread a key finds where it lies, once for k and v; every copy would have to divide.
  DEVICE void load_offsets(int iteration) const {
    const int key = first_key(iteration) + static_cast<int>(threadIdx.x);
    if (threadIdx.x < Tile::kKeys)
      smem.offset[iteration % smem.kOffsets][threadIdx.x] =
          key_offset(p, s, b, g, min(key, range.end - 1));
  }
  DEVICE void copy_k(int iteration) const {
    copy(smem.k[iteration % Tile::kStages], p.k, iteration);
  }
  DEVICE void copy_v(int iteration) const {
    copy(smem.v[iteration % Tile::kStages], p.v, iteration);
  }

 private:
  DEVICE void copy(T* tile, const void* base, int iteration) const {
    if (iteration < iterations)
      copy_rows<Tile::kHeadDim, Tile::kKeys, Tile::kThreads>(tile, [&](int row) {
        return SourceRow<T>{
            static_cast<const T*>(base) + smem.offset[iteration % smem.kOffsets][row],
            first_key(iteration) + row < range.end};
      });
  }
};

template <class T, class Tile, bool kSoftcap>
__global__ void __launch_bounds__(Tile::kThreads, kResidentBlocks<Tile>)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys;
  // Chosen wrongly; where it never is, no more code is made than this.
  if (!kChosenHere<T, Tile> || (Tile::kWgmma && !ptx::has_wgmma())) return ptx::trap();
  auto& smem = shared_memory<AttentionSmem<T, Tile>>();
  const int lane = threadIdx.x % 32;

  const int g = blockIdx.y, split = blockIdx.z, group = p.q_heads / p.kv_heads;
  const RowTile of = row_tile(p.max_seqlen_q * group, kRows);
  const int b = of.b, first_row = of.tile * kRows;
  const Sequence s = sequence_at(p, b);
  const QueryRows queries{s, g, group};
  if (p.cu_seqlens_q) fill_unowned<T>(p, s, of, g);
  // From here on; those beyond kRows are others'.
  const int rows = min(s.queries, p.max_seqlen_q) * group - first_row;
  if (rows <= 0) return;
  const int first_position = queries.position(first_row);
  const int last_position = queries.position(first_row + min(rows, kRows) - 1);
  KeyRange range = split_at(p, s, split);
  range.begin = max(range.begin, visible_at(p, first_position, s.keys).begin);
  range.end = min(range.end, visible_at(p, last_position, s.keys).end);

  // Each lane keeps two rows of the warp's sixteen.
  KeyRange visible[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = first_row + Tile::row() + lane / 4 + i * 8;
    visible[i] = visible_at(p, queries.position(row), s.keys);
    visible[i].begin = max(visible[i].begin, range.begin);
    visible[i].end = min(visible[i].end, range.end);
  }
  // Keys [begin, end) that every row sees need no mask.
  const KeyRange by_all{max(range.begin, visible_at(p, last_position, s.keys).begin),
                        min(range.end, visible_at(p, first_position, s.keys).end)};

  const int iterations =
      range.begin < range.end ? (range.end - range.begin + kKeys - 1) / kKeys : 0;
  const KeyTiles<T, Tile> keys{p, smem, s, b, g, range, iterations};
  float out[Tile::kColumns / 8][4] = {};
  OnlineSoftmax<Tile> softmax;
  const auto online_softmax = [&](uint32_t (&weight)[kKeys / 8][2], float (&score)[kKeys / 8][4],
                                  int iteration) {
    const int key = keys.first_key(iteration);
    scale_scores<kSoftcap>(score, p);
    if (key < by_all.begin || key + kKeys > by_all.end) mask_scores(score, key, visible);
    softmax.template update<T>(weight, score, out);
  };
  if (iterations > 0) {
    copy_rows<Tile::kHeadDim, kRows, Tile::kThreads>(smem.q, [&](int row) {
      const int r = min(first_row + row, s.queries * group - 1);
      return SourceRow<T>{static_cast<const T*>(p.q) + queries.token(r) * p.q_stride +
                              queries.head(r) * p.q_head_stride,
                          row < rows};
    });
    if constexpr (Tile::kWgmma)
      mainloop_wgmma<Tile>(smem, out, keys, online_softmax);
    else
      mainloop<Tile>(smem, out, keys, online_softmax);
  }

  softmax.reduce();
  const float inverse[2] = {softmax.inverse(0), softmax.inverse(1)};
  const float lse[2] = {softmax.lse(0), softmax.lse(1)};
  store_lse<Tile>(p, lse, queries, b, split, first_row, rows);
  if (p.splits > 1)
    return store_split<Tile>(p, out, inverse, softmax.row_sum, queries, split, first_row, rows);
  store_rows<Tile>(smem.q, out, inverse, rows, [&](int row) {
    const int64_t at = queries.token(first_row + row) * p.q_heads + queries.head(first_row + row);
    return static_cast<T*>(p.out) + at * Tile::kHeadDim;
  });
}

}  // namespace gemma4
