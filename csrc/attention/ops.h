// Attention, forward and backward.
#pragma once

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
  int pages_per_row, page_size, ring;  // 0: none
  float scale, softcap;                // softcap 0: none
  int window, window_right;            // 0 and -1: no bound; causal is window_right 0
  int splits;                          // parts that the keys are divided into
  float* partial_out;                  // [splits, tokens, H, C], if there is more than one
  float* partial_lse;                  // [splits, tokens, H], likewise
};
void attention_prefill(const AttentionParams& params, DType dtype, const Device& device);
void attention_decode(const AttentionParams& params, DType dtype, const Device& device);

// How many parts attention_decode divides the keys of sequences into of which at most `keys` are
// visible, if the results of one part take `bytes`.
int attention_decode_splits(int64_t keys, int64_t bytes);

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
