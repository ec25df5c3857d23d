// Which rows and keys a block has, and where they lie.
#pragma once

#include "../common/indices.cuh"
#include "../common/platform.h"
#include "ops.h"

namespace gemma4 {

constexpr int kLeastKeysOfSplit = 64;

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
  const int64_t end = within(keys, p.ring.divisor > 0 ? INT32_MAX : p.capacity);
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

// How the keys that a sequence's queries see are divided. It follows from this sequence alone, so
// that a row's bits depend neither on the others nor on the memory that is reserved: fewer splits
// than there may be are enough for all keys in splits of the least size.
struct Splits {
  KeyRange all;
  int size;

  DEVICE Splits(const AttentionParams& p, const Sequence& s)
      : all{visible_at(p, s.first(), s.keys).begin, visible_at(p, s.keys - 1, s.keys).end} {
    const int keys = max(all.end - all.begin, 0);
    const int even = (keys + p.splits.divisor - 1) / p.splits;
    size = p.splits.divisor == 1 ? keys : max(kLeastKeysOfSplit, (even + 63) / 64 * 64);
  }
  DEVICE KeyRange at(int split) const {
    const int begin = min(all.begin + split * size, all.end);
    return {begin, min(begin + size, all.end)};
  }
};

// Where a key lies in k and in v alike, in elements.
DEVICE int64_t key_offset(const AttentionParams& p, const Sequence& s, int b, int g, int key) {
  int64_t outer = b, inner = s.k_begin + key;
  if (p.block_table.data) {
    outer = index_at(p.block_table, int64_t{b} * p.pages_per_row + key / p.page_size);
    inner = key % p.page_size;
  } else if (p.ring.divisor > 0) {
    inner = key % p.ring;
  }
  return outer * p.key_strides.outer + inner * p.key_strides.inner + g * p.key_strides.head;
}

// The rows of one KV head: (query, query head) pairs, the heads of one query beside each other.
struct QueryRows {
  Sequence s;
  int g;
  Divisor group;

  DEVICE int query(int row) const { return row / group; }
  DEVICE int head(int row) const { return g * group.divisor + row % group; }
  DEVICE int64_t token(int row) const { return s.q_begin + query(row); }
  DEVICE int position(int row) const { return s.first() + query(row); }
};

// A block's share of one sequence's rows: every `tiles`-th of those from `tile` on.
struct RowTile {
  int b, tile, tiles;
};

// Blocks in x are the tiles of the first sequence, then those of the second. The last rows see the
// most keys in the causal case: they start first.
DEVICE RowTile row_tile(const Divisor& tiles) {
  const int b = static_cast<int>(blockIdx.x) / tiles;
  return {b, (b + 1) * tiles.divisor - 1 - static_cast<int>(blockIdx.x), tiles.divisor};
}

}  // namespace gemma4
