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
// Shared memory: sizeof(AttentionSmem): kRows + 2 kKeys rows of q, k and v, 2 KB per warp and 32
// keys of partial scores, and the keys' places. Bound: tensor cores in prefill, DRAM (k and v once)
// in decode.
#pragma once

#include "../common/indices.cuh"
#include "../common/launch.h"
#include "../common/math.cuh"
#include "../common/vec.cuh"
#include "../ops.h"
#include "attention_warp.cuh"

namespace gemma4 {

template <class T, class Tile>
struct AttentionSmem : ScoreExchange<Tile> {
  alignas(128) T q[Tile::kRows * Tile::kHeadDim];  // at the end: out
  alignas(128) T k[Tile::kKeys * Tile::kHeadDim];
  alignas(128) T v[Tile::kKeys * Tile::kHeadDim];
  int64_t key_offset[2][Tile::kKeys];  // of this tile's keys and the next one's
};

// Blocks that a multiprocessor must hold. Decoding waits for memory, and more of them hide it;
// without a number the compiler picks one that it cannot keep everywhere.
template <class Tile>
constexpr int kResidentBlocks = Tile::kRows == 16 && Tile::kHeadDim <= 256 ? 3 : 1;

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;
constexpr int kLeastKeysOfSplit = 256, kMostSplits = 64;

// Where one sequence's queries and keys are.
struct Sequence {
  int64_t q_begin, k_begin;
  int queries, keys;

  // Query i stands at key position `first` + i: the queries are the tail of the keys.
  DEVICE int first() const { return keys - queries; }
};

DEVICE Sequence sequence_at(const AttentionParams& p, int b) {
  Sequence s;
  s.q_begin = p.cu_seqlens_q ? p.cu_seqlens_q[b] : int64_t{b} * p.new_tokens;
  s.queries = p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] : p.new_tokens;
  s.k_begin = p.cu_seqlens_k && !p.block_table.data ? p.cu_seqlens_k[b] : 0;
  s.keys = p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b] : p.seq_lens[b];
  // Lengths come from the device and cannot be refused; what is past the memory is not read.
  s.queries = static_cast<int>(min(int64_t{s.queries}, p.tokens - s.q_begin));
  if (p.ring == 0) s.keys = static_cast<int>(min(int64_t{s.keys}, p.capacity - s.k_begin));
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
// bits do not depend on what else is in the batch.
DEVICE KeyRange split_at(const AttentionParams& p, const Sequence& s, int split) {
  const KeyRange all{visible_at(p, s.first(), s.keys).begin, visible_at(p, s.keys - 1, s.keys).end};
  if (p.splits == 1) return all;
  const int even = (max(all.end - all.begin, 0) + kMostSplits - 1) / kMostSplits;
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
  return outer * p.outer_stride + inner * p.inner_stride + g * p.kv_head_stride;
}

template <class T, class Tile, bool kSoftcap>
__global__ void __launch_bounds__(Tile::kThreads, kResidentBlocks<Tile>)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kHeadDim = Tile::kHeadDim, kRows = Tile::kRows, kKeys = Tile::kKeys;
  constexpr int kColumns = Tile::kColumns;
  auto& smem = shared_memory<AttentionSmem<T, Tile>>();
  const int lane = threadIdx.x % 32, row_of_warp = Tile::row(), column_of_warp = Tile::column();

  const int g = blockIdx.y, b = blockIdx.z, group = p.q_heads / p.kv_heads;
  const int split = blockIdx.x % p.splits;
  // The last rows see the most keys in the causal case: they start first.
  const int first_row = (gridDim.x / p.splits - 1 - blockIdx.x / p.splits) * kRows;
  const Sequence s = sequence_at(p, b);
  const int rows = s.queries * group - first_row;  // from here on; those beyond kRows are others'
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
  // A thread a key finds where it lies, once for k and v; every copy would have to divide.
  const auto place_keys = [&](int turn, int first_key) {
    if (threadIdx.x < kKeys)
      smem.key_offset[turn % 2][threadIdx.x] =
          key_offset(p, s, b, g, min(first_key + static_cast<int>(threadIdx.x), keys.end - 1));
  };
  const auto keys_from = [&](const void* base, int turn, int first_key) {
    return [=, &smem](int row) {
      return SourceRow<T>{static_cast<const T*>(base) + smem.key_offset[turn % 2][row],
                          first_key + row < keys.end};
    };
  };

  float out[kColumns / 8][4] = {};
  float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  if (keys.begin < keys.end) {
    copy_rows<kHeadDim, kRows, Tile::kThreads>(smem.q, query_at);
    place_keys(0, keys.begin);
    __syncthreads();
    copy_rows<kHeadDim, kKeys, Tile::kThreads>(smem.k, keys_from(p.k, 0, keys.begin));
  }
  ptx::cp_async_commit();

  for (int key = keys.begin, turn = 0; key < keys.end; key += kKeys, turn++) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    copy_rows<kHeadDim, kKeys, Tile::kThreads>(smem.v, keys_from(p.v, turn, key));
    ptx::cp_async_commit();
    place_keys(turn + 1, key + kKeys);

    float score[kKeys / 8][4] = {};
    multiply<Tile>(score, smem.q, smem.k);
    smem.put(score);
    __syncthreads();
    if (key + kKeys < keys.end)
      copy_rows<kHeadDim, kKeys, Tile::kThreads>(smem.k, keys_from(p.k, turn + 1, key + kKeys));
    ptx::cp_async_commit();
    smem.total(score);

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

    uint32_t probability[kKeys / 8][2];
    float decay[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float new_highest = highest[i];
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++)
        new_highest = fmaxf(new_highest, fmaxf(score[n][2 * i], score[n][2 * i + 1]));
      new_highest = fmaxf(new_highest, __shfl_xor_sync(0xffffffffu, new_highest, 1));
      new_highest = fmaxf(new_highest, __shfl_xor_sync(0xffffffffu, new_highest, 2));
      // A row that has seen no key yet: -inf - -inf would be NaN.
      const float base = new_highest == -INFINITY ? 0.0f : new_highest;
      decay[i] = ptx::exp2_approx(highest[i] - base);
      highest[i] = new_highest;
      sum[i] *= decay[i];
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
        const float low = ptx::exp2_approx(score[n][2 * i] - base);
        const float high = ptx::exp2_approx(score[n][2 * i + 1] - base);
        sum[i] += low + high;
        probability[n][i] = pack_pair<T>(low, high);
      }
    }
    // Once the maxima stand still, which is soon, there is nothing to rescale.
    if (__any_sync(0xffffffffu, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) out[n][e] *= decay[e / 2];
    }

    ptx::cp_async_wait<1>();
    __syncthreads();
    accumulate<Tile>(out, probability, smem.v);
  }
  ptx::cp_async_wait<0>();

  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
    inverse[i] = sum[i] > 0.0f ? 1.0f / sum[i] : sum[i];  // NaN stays NaN
    const int row = row_of_warp + lane / 4 + i * 8;
    if (row >= rows || column_of_warp != 0 || lane % 4 != 0) continue;
    const int query = (first_row + row) / group, head = g * group + (first_row + row) % group;
    const float lse = (highest[i] + log2f(sum[i])) * kLn2;  // without keys: -inf
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
