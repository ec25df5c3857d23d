// Attention, forward and backward.
#pragma once

#include "../common/divisor.h"
#include "../common/types.h"

namespace gemma4 {

// Between the outer parts that hold keys (rows of a cache, pages), between the keys of one, and
// between the heads of one key; in elements.
struct KeyStrides {
  int64_t outer, inner, head;
};

// One sequence's keys lie in one of three ways: packed behind those of others (cu_seqlens_k), in a
// row of a cache (outer b, inner j, or j mod ring), or in pages (outer block_table[b][j /
// page_size], inner j mod page_size).
//
// Lengths are the device's to know and cannot be refused. What they say beyond `tokens` and
// `capacity`, or below zero, counts as those and as zero; rows of out that no sequence owns or that
// lie at max_seqlen_q of their sequence and beyond become 0, and their lse -inf.
struct AttentionParams {
  const void* q;                               // [tokens, H, C]
  const void *k, *v;                           // heads of C contiguous elements
  const float *k_scales, *v_scales;            // of k and v in e4m3, which are contiguous, or null
  void* out;                                   // [tokens, H, C]
  float* lse;                                  // log-sum-exp of each row, or null
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [B + 1], or null: new_tokens and seq_lens
  const int32_t* seq_lens;                     // [B]
  Indices block_table;                         // [B, pages_per_row] or null
  int64_t q_stride, q_head_stride;
  KeyStrides key_strides;  // of k and of v: one offset finds both
  int64_t lse_head_stride;
  int64_t tokens;
  int64_t capacity;  // keys that there is memory for: of all sequences if packed, else of each
  int batch, new_tokens, max_seqlen_q;
  int q_heads, kv_heads, head_dim;
  Divisor group;  // query heads of one KV head
  Divisor tiles;  // of one sequence's rows; a launcher knows
  int pages_per_row;
  Divisor page_size, ring;   // 0: none
  float scale, softcap;      // softcap 0: none
  int window, window_right;  // 0 and -1: no bound; causal is window_right 0
  Divisor splits;            // parts that the keys are divided into
  float* partial_out;        // [splits and knots, tokens, H, C], if there is more than one
  float* partial_lse;        // [splits and knots, tokens, H], likewise
};
void attention_prefill(const AttentionParams& params, DType dtype, const Device& device);
void attention_decode(const AttentionParams& params, DType dtype, const Device& device);

// How many parts the keys of sequences are divided into of which at most `keys` are visible.
int attention_decode_splits(const AttentionParams& params, int64_t keys, const Device& device);
// How many merges of some of so many splits are kept behind them.
int attention_decode_knots(int splits);

// attention_decode of one new token a sequence, whose q, k and v are still to be normed and turned,
// and whose k and v go into the cache.
struct QkvAttentionDecodeParams {
  AttentionParams attention;
  const void *k, *v;                // [B, G, C]; k null: the key is there; v null: made from k
  const void *q_weight, *k_weight;  // [C], in fp32 if wide_weights
  const float* inv_freq;            // [C / 2]
  void *k_cache, *v_cache;          // those of `attention`
  float *k_scales, *v_scales;       // the same
  Indices positions;                // [B]
  int64_t k_stride, v_stride, k_head_stride, v_head_stride;
  unsigned* counters;  // [B, G, kDecodeCounters], zeros before and after
  float eps;
  bool wide_weights;
};
constexpr int kDecodeCounters = 9;
void qkv_attention_decode(const QkvAttentionDecodeParams& params, DType dtype,
                          const Device& device);

struct AttentionBackwardParams {
  AttentionParams forward;  // its arguments and its results, keys not in pages
  const void* grad_out;     // [tokens, H, C]
  const float* grad_lse;    // [H, tokens]
  float* delta;             // [H, tokens], made on the way
  void* grad_q;             // [tokens, H, C]
  void *grad_k, *grad_v;    // [capacity, G, C]
  int max_seqlen_k;
};
void attention_prefill_backward(const AttentionBackwardParams& params, DType dtype,
                                const Device& device);

}  // namespace gemma4
