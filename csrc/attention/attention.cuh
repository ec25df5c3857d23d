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
// Three barriers a tile: k has landed and v is free; k is free, the partial scores and the places
// of the next keys are there; v has landed. The copy of the next k runs under the softmax and p v,
// that of v under q kᵀ.
//
// On Hopper k and v have two stages each, and one barrier a tile is enough: before it, the next k
// and this v have landed and the partial scores are there; after it, the next but one k and the
// next v are free to be copied. The next q kᵀ then runs under this tile's softmax.
//
// Shared memory: sizeof(AttentionSmem): kRows + 2 kKeys (Hopper: 4 kKeys) rows of q, k and v, 2 KB
// per warp and 32 keys of partial scores (Hopper: twice), and where the keys lie. Bound, by the
// static report: in prefill shared memory, of which each warp reads all keys and values, on Hopper
// L2, of which each block does; in decode DRAM (k and v once).
#pragma once

#include "../common/indices.cuh"
#include "../common/launch.h"
#include "../common/math.cuh"
#include "../common/vec.cuh"
#include "ops.h"
#include "attention_warp.cuh"

namespace gemma4 {

template <class T, class Tile>
struct AttentionSmem : ScoreExchange<Tile> {
  static constexpr int kPlaces = Tile::kStages + 1;
  static constexpr int kAlignment = Tile::kWgmma ? 1024 : 128;
  alignas(kAlignment) T q[Tile::kRows * Tile::kHeadDim];  // at the end: out
  alignas(kAlignment) T k[Tile::kStages][Tile::kKeys * Tile::kHeadDim];
  alignas(kAlignment) T v[Tile::kStages][Tile::kKeys * Tile::kHeadDim];
  // Where this tile's and the next ones' keys lie, in elements.
  int64_t offset[kPlaces][Tile::kKeys];
};

// Blocks that a multiprocessor must hold. Decoding waits for memory, and more of them hide it;
// without a number the compiler picks one that it cannot keep everywhere.
template <class Tile>
constexpr int kResidentBlocks = Tile::kRows == 16 && Tile::kHeadDim <= 256 ? 3 : 1;

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;
constexpr int kLeastKeysOfSplit = 256;

// Where one sequence's queries and keys are.
struct Sequence {
  int64_t q_begin, k_begin;
  int queries, keys;

  // Query i stands at key position `first` + i: the queries are the tail of the keys.
  DEVICE int first() const { return keys - queries; }
};

// Lengths come from the device and cannot be refused; what is past the memory is not touched.
DEVICE int64_t within(int64_t x, int64_t size) { return max(int64_t{0}, min(x, size)); }

DEVICE Sequence sequence_at(const AttentionParams& p, int b) {
  Sequence s{int64_t{b} * p.new_tokens, 0, p.new_tokens, 0};
  if (p.cu_seqlens_q) {
    s.q_begin = within(p.cu_seqlens_q[b], p.tokens);
    s.queries = static_cast<int>(max(int64_t{0}, p.cu_seqlens_q[b + 1] - s.q_begin));
    s.queries = static_cast<int>(min(int64_t{s.queries}, p.tokens - s.q_begin));
  }
  int64_t keys = p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] : p.seq_lens[b];
  if (p.cu_seqlens_k && p.block_table.data) keys -= p.cu_seqlens_k[b];
  if (p.cu_seqlens_k && !p.block_table.data) s.k_begin = within(p.cu_seqlens_k[b], p.capacity);
  const int64_t end = within(keys, p.ring > 0 ? INT32_MAX : p.capacity);
  s.keys = static_cast<int>(max(int64_t{0}, end - s.k_begin));
  return s;
}

struct KeyRange {
  int begin, end;
};

// The keys that a query at key position i sees.
DEVICE KeyRange visible_at(const AttentionParams& p, int i, int keys) {
  KeyRange r{0, keys};
  if (p.window > 0) r.begin = max(0, i - p.window + 1);
  if (p.window_right >= 0) r.end = min(keys, i + p.window_right + 1);
  return r;
}

// Split `split` of a sequence's keys. Its bounds follow from this sequence alone, so that a row's
// bits depend neither on the others nor on the memory that is reserved: fewer splits than there may
// be are enough for all keys in splits of the least size.
DEVICE KeyRange split_at(const AttentionParams& p, const Sequence& s, int split) {
  const KeyRange all{visible_at(p, s.first(), s.keys).begin, visible_at(p, s.keys - 1, s.keys).end};
  if (p.splits == 1) return all;
  const int even = (max(all.end - all.begin, 0) + p.splits - 1) / p.splits;
  const int size = max(kLeastKeysOfSplit, (even + 63) / 64 * 64);
  const int begin = min(all.begin + split * size, all.end);
  return {begin, min(begin + size, all.end)};
}

// Where a key lies in k and in v alike, in elements.
DEVICE int64_t key_offset(const AttentionParams& p, const Sequence& s, int b, int g, int key) {
  int64_t outer = b, inner = s.k_begin + key;
  if (p.block_table.data) {
    outer = index_at(p.block_table, int64_t{b} * p.pages_per_row + key / p.page_size);
    inner = key % p.page_size;
  } else if (p.ring > 0) {
    inner = key % p.ring;
  }
  return outer * p.key_strides.outer + inner * p.key_strides.inner + g * p.key_strides.head;
}

// A block's share of one sequence's rows: every `tiles`-th of those from `tile` on.
struct RowTile {
  int b, tile, tiles;
};

// Blocks in x are the tiles of the first sequence, then those of the second. The last rows see the
// most keys in the causal case: they start first.
DEVICE RowTile row_tile(int rows, int rows_of_tile) {
  const unsigned tiles = (rows + rows_of_tile - 1) / rows_of_tile;
  const unsigned b = blockIdx.x / tiles;
  return {static_cast<int>(b), static_cast<int>((b + 1) * tiles - 1 - blockIdx.x),
          static_cast<int>(tiles)};
}

// out = 0 and lse = -inf in the rows that no block computes: before the first sequence, behind the
// last one, and of this one what max_seqlen_q leaves out. (A loop over heads that begins at the
// thread's index makes nvcc compute the main loop's addresses anew in every iteration.)
template <class T>
DEVICE void fill_unowned(const AttentionParams& p, const Sequence& s, const RowTile& of, int g) {
  const int group = p.q_heads / p.kv_heads;
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

// The walk over all tiles of keys, one a turn. The callers' functions find where the keys of a turn
// lie, start the copies of its k and v (of a turn that does not exist, none), and make weights of
// its scores.
template <class Tile, class Smem, class Place, class CopyK, class CopyV, class Weigh>
DEVICE void walk_keys(Smem& smem, float (&out)[Tile::kColumns / 8][4], int turns,
                      const Place& place_keys, const CopyK& copy_k, const CopyV& copy_v,
                      const Weigh& weigh) {
  place_keys(0);
  __syncthreads();
  copy_k(0);
  ptx::cp_async_commit();
  for (int turn = 0; turn < turns; turn++) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    copy_v(turn);
    ptx::cp_async_commit();
    place_keys(turn + 1);

    float score[Tile::kKeys / 8][4] = {};
    multiply<Tile>(score, smem.q, smem.k[0]);
    smem.put(score);
    __syncthreads();
    copy_k(turn + 1);
    ptx::cp_async_commit();
    smem.total(score);
    uint32_t weight[Tile::kKeys / 8][2];
    weigh(weight, score, turn);

    ptx::cp_async_wait<1>();
    __syncthreads();
    accumulate<Tile>(out, weight, smem.v[0]);
  }
}

// The same with two stages of k and v and one barrier a turn.
template <class Tile, class Smem, class Place, class CopyK, class CopyV, class Weigh>
DEVICE void walk_keys_on_hopper(Smem& smem, float (&out)[Tile::kColumns / 8][4], int turns,
                                const Place& place_keys, const CopyK& copy_k, const CopyV& copy_v,
                                const Weigh& weigh) {
  place_keys(0);
  place_keys(1);
  place_keys(2);
  __syncthreads();
  copy_k(0);
  ptx::cp_async_commit();
  copy_k(1);
  copy_v(0);
  ptx::cp_async_commit();

  float score[Tile::kKeys / 8][4] = {};
  ptx::cp_async_wait<1>();
  ptx::fence_async_proxy();
  __syncthreads();
  start_multiply<Tile>(score, smem.q, smem.k[0]);
  ptx::wgmma_wait<0>(score);
  smem.put(score);

  // The last turn apart: wgmmas that only some turns start would make the compiler wait for all.
  const auto take_turn = [&]<bool kLast>(int turn) {
    ptx::cp_async_wait<0>();
    ptx::fence_async_proxy();
    __syncthreads();
    copy_k(turn + 2);
    copy_v(turn + 1);
    ptx::cp_async_commit();
    place_keys(turn + 3);

    smem.total(score, turn % 2);
    float next[Tile::kKeys / 8][4] = {};
    if constexpr (!kLast) start_multiply<Tile>(next, smem.q, smem.k[(turn + 1) % 2]);
    uint32_t weight[Tile::kKeys / 8][2];
    weigh(weight, score, turn);
    start_accumulate<Tile>(out, weight, smem.v[turn % 2]);
    if constexpr (!kLast) {
      ptx::wgmma_wait<1>(next);
      smem.put(next, (turn + 1) % 2);
      __builtin_memcpy(score, next, sizeof score);
    }
    ptx::wgmma_wait<0>(out);
  };
  for (int turn = 0; turn < turns - 1; turn++) take_turn.template operator()<false>(turn);
  take_turn.template operator()<true>(turns - 1);
}

template <class T, class Tile, bool kSoftcap>
__global__ void __launch_bounds__(Tile::kThreads, kResidentBlocks<Tile>)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kHeadDim = Tile::kHeadDim, kRows = Tile::kRows, kKeys = Tile::kKeys;
  constexpr int kColumns = Tile::kColumns;
  if (Tile::kWgmma && !ptx::has_wgmma()) return ptx::trap();  // the launcher chose wrongly
  auto& smem = shared_memory<AttentionSmem<T, Tile>>();
  const int lane = threadIdx.x % 32, row_of_warp = Tile::row(), column_of_warp = Tile::column();

  const int g = blockIdx.y, split = blockIdx.z, group = p.q_heads / p.kv_heads;
  const RowTile of = row_tile(p.max_seqlen_q * group, kRows);
  const int b = of.b, first_row = of.tile * kRows;
  const Sequence s = sequence_at(p, b);
  if (p.cu_seqlens_q) fill_unowned<T>(p, s, of, g);
  // From here on; those beyond kRows are others'.
  const int rows = min(s.queries, p.max_seqlen_q) * group - first_row;
  if (rows <= 0) return;
  const int first_query = s.first() + first_row / group;
  const int last_query = s.first() + (first_row + min(rows, kRows) - 1) / group;
  KeyRange keys = split_at(p, s, split);
  keys.begin = max(keys.begin, visible_at(p, first_query, s.keys).begin);
  keys.end = min(keys.end, visible_at(p, last_query, s.keys).end);

  // Each lane keeps two rows of the warp's sixteen.
  KeyRange visible[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = first_row + row_of_warp + lane / 4 + i * 8;
    visible[i] = visible_at(p, s.first() + row / group, s.keys);
    visible[i].begin = max(visible[i].begin, keys.begin);
    visible[i].end = min(visible[i].end, keys.end);
  }
  // Keys [begin, end) that every row sees need no mask.
  const KeyRange by_all{max(keys.begin, visible_at(p, last_query, s.keys).begin),
                        min(keys.end, visible_at(p, first_query, s.keys).end)};

  const auto query_at = [&](int row) {
    const int r = min(first_row + row, s.queries * group - 1);
    return SourceRow<T>{static_cast<const T*>(p.q) + (s.q_begin + r / group) * p.q_stride +
                            (int64_t{g} * group + r % group) * p.q_head_stride,
                        row < rows};
  };
  const int turns = keys.begin < keys.end ? (keys.end - keys.begin + kKeys - 1) / kKeys : 0;
  // A thread a key finds where it lies; every copy would have to divide.
  const auto place_keys = [&](int turn) {
    const int key = keys.begin + turn * kKeys + static_cast<int>(threadIdx.x);
    if (threadIdx.x >= kKeys) return;
    smem.offset[turn % smem.kPlaces][threadIdx.x] =
        key_offset(p, s, b, g, min(key, keys.end - 1));
  };
  const auto copy_keys = [&](T* tile, const void* base, int turn) {
    const int64_t* offset = smem.offset[turn % smem.kPlaces];
    if (turn < turns)
      copy_rows<kHeadDim, kKeys, Tile::kThreads>(tile, [&](int row) {
        return SourceRow<T>{static_cast<const T*>(base) + offset[row],
                            keys.begin + turn * kKeys + row < keys.end};
      });
  };
  const auto copy_k = [&](int turn) {
    copy_keys(smem.k[turn % Tile::kStages], p.k, turn);
  };
  const auto copy_v = [&](int turn) {
    copy_keys(smem.v[turn % Tile::kStages], p.v, turn);
  };

  float out[kColumns / 8][4] = {};
  RunningSoftmax<Tile> softmax;
  const auto weigh = [&](uint32_t (&weight)[kKeys / 8][2], float (&score)[kKeys / 8][4], int turn) {
    const int key = keys.begin + turn * kKeys;
    // Scores become multiples of ln 2, which exp2 wants.
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        score[n][e] = kSoftcap ? softcap_fast(score[n][e] * p.scale, p.softcap) * kLog2e
                               : score[n][e] * (p.scale * kLog2e);
    if (key < by_all.begin || key + kKeys > by_all.end) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int j = key + n * 8 + lane % 4 * 2 + e % 2;
          if (j < visible[e / 2].begin || j >= visible[e / 2].end) score[n][e] = -INFINITY;
        }
    }
    softmax.template weigh<T>(weight, score, out);
  };

  if (turns > 0) {
    copy_rows<kHeadDim, kRows, Tile::kThreads>(smem.q, query_at);
    if constexpr (Tile::kWgmma)
      walk_keys_on_hopper<Tile>(smem, out, turns, place_keys, copy_k, copy_v, weigh);
    else
      walk_keys<Tile>(smem, out, turns, place_keys, copy_k, copy_v, weigh);
  }

  float (&sum)[2] = softmax.sum;
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
    inverse[i] = sum[i] > 0.0f ? 1.0f / sum[i] : sum[i];  // NaN stays NaN
    const int row = row_of_warp + lane / 4 + i * 8;
    if (row >= rows || column_of_warp != 0 || lane % 4 != 0) continue;
    const int query = (first_row + row) / group, head = g * group + (first_row + row) % group;
    const float lse = (softmax.highest[i] + log2f(sum[i])) * kLn2;  // without keys: -inf
    if (p.splits > 1)
      p.partial_lse[(split * p.tokens + s.q_begin + query) * p.q_heads + head] = lse;
    else if (p.lse)
      p.lse[p.cu_seqlens_q ? head * p.lse_head_stride + s.q_begin + query
                           : (int64_t{b} * p.q_heads + head) * p.lse_head_stride + query] = lse;
  }

  if (p.splits > 1) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = row_of_warp + lane / 4 + i * 8;
      if (row >= rows || sum[i] == 0.0f) continue;  // without keys: the merge knows from the lse
      const int query = (first_row + row) / group, head = g * group + (first_row + row) % group;
      float* to = p.partial_out +
                  ((split * p.tokens + s.q_begin + query) * p.q_heads + head) * int64_t{kHeadDim};
#pragma unroll
      for (int n = 0; n < kColumns / 8; n++)
        ptx::store_8(to + column_of_warp + n * 8 + lane % 4 * 2,
                     {__float_as_uint(out[n][2 * i] * inverse[i]),
                      __float_as_uint(out[n][2 * i + 1] * inverse[i])});
    }
    return;
  }

  write_rows<Tile>(smem.q, out, inverse, rows, [&](int row) {
    const int query = (first_row + row) / group, head = g * group + (first_row + row) % group;
    return static_cast<T*>(p.out) + ((s.q_begin + query) * p.q_heads + head) * int64_t{kHeadDim};
  });
}

}  // namespace gemma4
