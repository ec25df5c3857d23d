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
// Keys in e4m3 (CodedTile) are copied as the bytes they are and made into operands in registers,
// exactly, as products.cuh says; their scales come beside them, four bytes a key. A score is
// multiplied with its key's scale in fp32, a weight with its value's before it is rounded.
//
// Shared memory: sizeof(AttentionSmem): kRows + 2 kKeys (Hopper: 4 kKeys) rows of q, k and v, 2 KB
// per warp and 32 keys of partial scores (Hopper: twice), and where the keys lie. Bound, by the
// static report: in prefill shared memory, of which each warp reads all keys and values, on Hopper
// L2, of which each block does; in decode DRAM (k and v once).
#pragma once

#include "epilogue.cuh"
#include "key_tiles.cuh"
#include "mainloop.cuh"
#include "mainloop_wgmma.cuh"
#include "softmax.cuh"

namespace gemma4 {

template <class T, class Tile, bool kSoftcap>
__global__ void __launch_bounds__(Tile::kThreads, kResidentBlocks<Tile>)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys;
  // Chosen wrongly; where it never is, no more code is made than this.
  if (!kChosenHere<T, Tile> || (Tile::kWgmma && !ptx::has_wgmma())) return ptx::trap();
  auto& smem = shared_memory<AttentionSmem<T, Tile>>();
  const int lane = threadIdx.x % 32;

  const int g = blockIdx.y, split = blockIdx.z;
  const RowTile of = row_tile(p.tiles);
  const int b = of.b, first_row = of.tile * kRows;
  const Sequence s = sequence_at(p, b);
  const QueryRows queries{s, g, p.group};
  if (p.cu_seqlens_q) fill_unowned<T>(p, s, of, g);
  // From here on; those beyond kRows are others'.
  const int rows = min(s.queries, p.max_seqlen_q) * p.group.divisor - first_row;
  if (rows <= 0) return;
  const int first_position = queries.position(first_row);
  const int last_position = queries.position(first_row + min(rows, kRows) - 1);
  KeyRange range = Splits(p, s).at(split);
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
    keys.scale_scores(score, iteration);
    scale_scores<kSoftcap>(score, p);
    if (key < by_all.begin || key + kKeys > by_all.end) mask_scores(score, key, visible);
    softmax.template update<T>(weight, score, out, [&](float x, int n, int e) {
      return keys.of_codes(x, iteration, n, e);
    });
  };
  if (iterations > 0) {
    copy_rows<Tile::kHeadDim, kRows, Tile::kThreads>(smem.q, [&](int row) {
      const int r = min(first_row + row, s.queries * p.group.divisor - 1);
      return SourceRow<T>{static_cast<const T*>(p.q) + queries.token(r) * p.q_stride +
                              queries.head(r) * p.q_head_stride,
                          row < rows};
    });
    if constexpr (Tile::kWgmma) {
      mainloop_wgmma<Tile>(smem, out, keys, online_softmax);
    } else {
      start_mainloop(keys);
      mainloop<Tile>(smem, out, keys, online_softmax);
    }
  }

  softmax.reduce();
  const float inverse[2] = {softmax.inverse(0), softmax.inverse(1)};
  const float lse[2] = {softmax.lse(0), softmax.lse(1)};
  store_lse<Tile>(p, lse, queries, b, split, first_row, rows);
  if (p.splits.divisor > 1)
    return store_split<Tile>(p, out, inverse, softmax.row_sum, queries, split, first_row, rows);
  store_rows<Tile>(smem.q, out, inverse, rows, [&](int row) {
    const int64_t at = queries.token(first_row + row) * p.q_heads + queries.head(first_row + row);
    return static_cast<T*>(p.out) + at * Tile::kHeadDim;
  });
}

}  // namespace gemma4
