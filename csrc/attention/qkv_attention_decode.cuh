// One decoded token of each sequence: q = rope(rms_norm(q) q_weight), its k and v likewise into the
// cache, and out = softmax(softcap(scale q kᵀ)) v over the keys with the new one.
//
// A block owns the query heads of one KV head, at most 16, and a split of its keys; attention.cuh's
// tile of 16 rows and its loop do the rest. Every block norms and turns the heads of q itself,
// under the copy of its first keys. The block whose split ends with the newest key first makes it,
// so that its own copy finds it; nobody else reads it.
//
// Of blocks that share their rows the last to arrive merges: of kFan neighbours one, and of those
// that merged one again, so that no block reads more than kFan parts. They are read in their order,
// whoever is last, and counters go back to zero for the next launch.
//
// Shared memory: sizeof(QkvAttentionDecodeSmem), that of attention.cuh's 16 rows. Bound: DRAM (k
// and v once), and with few keys the latency of its steps.
#pragma once

#include "../norm/heads.cuh"
#include "epilogue.cuh"
#include "key_tiles.cuh"
#include "mainloop.cuh"
#include "merge.cuh"
#include "softmax.cuh"

namespace gemma4 {

static_assert(kDecodeCounters == kFan + 1);  // of kFan knots and of what they are merged into

template <class T, class Tile>
struct QkvAttentionDecodeSmem : AttentionSmem<T, Tile> {
  bool is_last;
};

// The group's heads of q into the tile, zeros below them; and k and v of the newest key, if the
// block has it, into the cache at `newest`, else -1.
template <class T, class W, class Tile>
DEVICE void norm_and_turn(const QkvAttentionDecodeParams& p, T* q_tile, int b, int g,
                          int64_t newest) {
  using Lanes = HeadLanes<T, Tile::kHeadDim>;
  using Head = HeadRow<T, Tile::kHeadDim>;
  constexpr int kHeadsAtOnce = Tile::kThreads / Lanes::kLanes;
  const AttentionParams& a = p.attention;
  const int group = a.group.divisor, of_lanes = threadIdx.x / Lanes::kLanes;
  const Rotation<T, Tile::kHeadDim> rotation(p.inv_freq,
                                             static_cast<float>(index_at(p.positions, b)));
  if (newest >= 0 && p.k) {
    const bool is_k = of_lanes == 0, is_v = of_lanes == 1 && p.v;
    const T* k = static_cast<const T*>(p.k) + b * p.k_stride + g * p.k_head_stride;
    const T* v = static_cast<const T*>(p.v) + b * p.v_stride + g * p.v_head_stride;
    const Head head(is_v ? v : k, is_k || is_v, p.eps);
    const bool makes_v = is_v || (is_k && !p.v);
    const auto* k_weight = static_cast<const W*>(p.k_weight);
    if constexpr (Tile::kCoded) {
      HeadCodes<T, Tile::kHeadDim> key, value;
      if (is_k) head.turned(k_weight, rotation, key.hold());
      if (makes_v) head.normed(value.hold());
      key.store(is_k, p.k_cache, p.k_scales, newest / Tile::kHeadDim);
      value.store(makes_v, p.v_cache, p.v_scales, newest / Tile::kHeadDim);
    } else {
      const auto to = [&](void* cache) {
        T* row = static_cast<T*>(cache) + newest;
        return [row](int column, const auto& vector) { store(row + column, vector); };
      };
      if (is_k) head.turned(k_weight, rotation, to(p.k_cache));
      if (makes_v) head.normed(to(p.v_cache));
    }
  }
  for (int first = 0; first < Tile::kRows; first += kHeadsAtOnce) {
    const int row = first + of_lanes;
    const auto to_tile = [&](int column, const auto& vector) {
      uint4 bits;
      __builtin_memcpy(&bits, &vector, sizeof bits);
      if (row < Tile::kRows)
        store_shared(reinterpret_cast<uint4*>(q_tile + chunk_offset<Tile::kRows>(row, column / 8)),
                     bits);
    };
    if (first >= group) {
      Lanes::half().each([&](int, int column) {
        to_tile(column, typename Lanes::Vector{});
        to_tile(Lanes::kHalf + column, typename Lanes::Vector{});
      });
      continue;
    }
    const T* q = static_cast<const T*>(a.q) + b * a.q_stride + (g * group + row) * a.q_head_stride;
    const Head head(q, row < group, p.eps);
    head.turned(static_cast<const W*>(p.q_weight), rotation, to_tile);
  }
}

// The last block of each kFan that are there merges what they stored, and goes on with the others
// that did: `parts` of them, this one's being `part`, the first of them `first`.
template <class T, class Tile>
DEVICE void merge_splits(const QkvAttentionDecodeParams& p, bool& is_last, int b, int g, int part,
                         int parts) {
  constexpr int kThreadsOfRow = Tile::kHeadDim / 4;
  constexpr int kRowsAtOnce = Tile::kThreads / kThreadsOfRow;
  const AttentionParams& a = p.attention;
  const int column = threadIdx.x % kThreadsOfRow * 4;
  unsigned* counters = p.counters + (int64_t{b} * a.kv_heads + g) * kDecodeCounters;
  for (int first = 0;; first = a.splits.divisor, counters += kFan) {
    const int knot = part / kFan, count = min(parts - knot * kFan, kFan);
    __syncthreads();  // what all threads stored goes before the arrival
    if (threadIdx.x == 0) {
      is_last = ptx::arrive(counters + knot) == count - 1u;
      if (is_last) counters[knot] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    const bool is_all = parts <= kFan;
    for (int row = threadIdx.x / kThreadsOfRow; row < a.group.divisor; row += kRowsAtOnce) {
      const int head = g * a.group.divisor + row;
      const Part merged = merge_parts(a, first + knot * kFan, count, b, head, column);
      if (is_all)
        store_columns(
            static_cast<T*>(a.out) + (int64_t{b} * a.q_heads + head) * a.head_dim + column, merged);
      else
        PartRow(a, a.splits.divisor + knot, b, head).store(column, merged);
    }
    if (is_all) return;
    part = knot, parts = (parts + kFan - 1) / kFan;
  }
}

template <class T, class Tile, bool kSoftcap>
__global__ void __launch_bounds__(Tile::kThreads, kResidentBlocks<Tile>)
    qkv_attention_decode_kernel(const __grid_constant__ QkvAttentionDecodeParams p) {
  constexpr int kKeys = Tile::kKeys;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  auto& smem = shared_memory<QkvAttentionDecodeSmem<T, Tile>>();
  const AttentionParams& a = p.attention;
  const int b = blockIdx.x, g = blockIdx.y, split = blockIdx.z, rows = a.group.divisor;
  const Sequence s = sequence_at(a, b);
  const Splits splits(a, s);
  const KeyRange range = splits.at(split);
  // A sequence without keys has one split, of nothing, which makes zeros.
  if (range.begin == range.end && split > 0) return;

  float out[Tile::kColumns / 8][4] = {};
  OnlineSoftmax<Tile> softmax;
  if (range.begin < range.end) {
    const int iterations = (range.end - range.begin + kKeys - 1) / kKeys;
    const KeyTiles<T, Tile> keys{a, smem, s, b, g, range, iterations};
    // A length beyond the memory has no newest key there.
    const bool has_newest = range.end == s.keys && a.seq_lens[b] == s.keys;
    const int64_t newest = has_newest ? key_offset(a, s, b, g, s.keys - 1) : -1;
    if (!has_newest) start_mainloop(keys);
    if (p.wide_weights)
      norm_and_turn<T, float, Tile>(p, smem.q, b, g, newest);
    else
      norm_and_turn<T, T, Tile>(p, smem.q, b, g, newest);
    if (has_newest) start_mainloop(keys);  // behind its barrier the key is there to be copied
    const KeyRange visible[2] = {range, range};
    mainloop<Tile>(
        smem, out, keys,
        [&](uint32_t (&weight)[kKeys / 8][2], float (&score)[kKeys / 8][4], int iteration) {
          const int key = keys.first_key(iteration);
          keys.scale_scores(score, iteration);
          scale_scores<kSoftcap>(score, a);
          if (key + kKeys > range.end) mask_scores(score, key, visible);
          softmax.template update<T>(weight, score, out, [&](float x, int n, int e) {
            return keys.of_codes(x, iteration, n, e);
          });
        });
  }

  softmax.reduce();
  const float inverse[2] = {softmax.inverse(0), softmax.inverse(1)};
  const int used =
      max((splits.all.end - splits.all.begin + splits.size - 1) / max(splits.size, 1), 1);
  if (used == 1)
    return store_rows<Tile>(smem.q, out, inverse, rows, [&](int row) {
      return static_cast<T*>(a.out) + (int64_t{b} * a.q_heads + g * rows + row) * Tile::kHeadDim;
    });
  const float lse[2] = {softmax.lse(0), softmax.lse(1)};
  const QueryRows queries{s, g, a.group};
  store_lse<Tile>(a, lse, queries, b, split, 0, rows);
  store_split<Tile>(a, out, inverse, softmax.row_sum, queries, split, 0, rows);
  merge_splits<T, Tile>(p, smem.is_last, b, g, split, used);
}

}  // namespace gemma4
