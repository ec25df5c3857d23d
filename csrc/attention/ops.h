// Attention, forward and backward.
#pragma once

#include "../common/types.h"

namespace gemma4 {

// One sequence's keys lie in one of three ways: packed behind those of others (cu_seqlens_k), in a
// row of a cache (outer b, inner j, or j mod ring), or in pages (outer block_table[b][j /
// page_size], inner j mod page_size).
struct AttentionParams {
  const void *q, *k, *v;                       // q [tokens, H, C]
  void* out;                                   // [tokens, H, C]
  float* lse;                                  // log-sum-exp of each row, or null
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [B + 1], or null: new_tokens and seq_lens
  const int32_t* seq_lens;                     // [B]
  Indices block_table;                         // [B, pages_per_row] or null
  int64_t q_stride, q_head_stride;
  int64_t outer_stride, inner_stride, kv_head_stride;  // of k and v alike
  int64_t lse_head_stride;
  int64_t tokens;
  int64_t capacity;  // keys that there is memory for: of all sequences if packed, else of each
  int batch, new_tokens, max_seqlen_q;
  int q_heads, kv_heads, head_dim;
  int pages_per_row, page_size, ring;  // 0: none
  float scale, softcap;                // softcap 0: none
  int window, window_right;            // 0 and -1: no bound; causal is window_right 0
  int splits;                          // parts that the keys are divided into
  float *partial_out, *partial_lse;  // [splits, tokens, H, C], [splits, tokens, H], if more than 1
};
void attention_prefill(const AttentionParams& params, DType dtype, const Device& device);
void attention_decode(const AttentionParams& params, DType dtype, const Device& device);
// How many splits attention_decode wants for sequences of which at most `keys` are visible.
int attention_decode_splits(int64_t keys);

struct AttentionBackwardParams {
  AttentionParams forward;         // its arguments and its results, keys not in pages
  const void* grad_out;            // [tokens, H, C]
  const float* grad_lse;           // [H, tokens]
  float* delta;                    // [H, tokens], made on the way
  void *grad_q, *grad_k, *grad_v;  // [tokens, H, C], [capacity, G, C] twice
  int max_seqlen_k;
};
void attention_prefill_backward(const AttentionBackwardParams& params, DType dtype,
                                const Device& device);

}  // namespace gemma4
