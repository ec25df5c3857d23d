// The whole C++ surface: the parameters of each op and the function that launches it.
//
// Plain pointers and numbers, known to neither torch nor CUDA. Rows are `stride` elements apart and
// contiguous within; an absent tensor is a null pointer. Shape letters as in reference.py.
#pragma once

#include <cstdint>

namespace gemma4 {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Of an op's x, of what x meets (a residual, a table) and of its weights. `other` is x's dtype or
// float32, and `weight` is `other` or float32: the mixes that autocast makes.
struct DTypes {
  DType x, other, weight;
};

// Where and on what a launch happens; read once per call by the bindings.
struct Device {
  void* stream;
  int sm_count;
  int max_smem_bytes;  // of one block
  int capability;      // the major number: 9 on Hopper
};

// int32 or int64, as they come: positions, slots, ids.
struct Indices {
  const void* data;
  bool is_64;
};

// Numbers that need not have the op's dtype: what a router made.
struct Floats {
  const void* data;
  DType dtype;
};

struct RmsNormParams {
  const void* x;       // [rows, width]
  const void* weight;  // [width] or null
  void* y;             // [rows, width]
  int64_t rows, x_stride;
  int width;
  float eps;
};
void rms_norm(const RmsNormParams& params, const DTypes& dtypes, const Device& device);

struct AddRmsNormParams {
  const void* x;            // [rows, width]
  const void* residual;     // [rows, width], of the other dtype, as are both results
  const void* post_weight;  // [width]
  const void* next_weight;  // [width] or null
  const void* scale;        // [1] or null
  void *new_residual, *y;   // [rows, width]; y null without next_weight
  int64_t rows, x_stride, residual_stride;
  int width;
  float eps;
};
void add_rms_norm(const AddRmsNormParams& params, const DTypes& dtypes, const Device& device);

struct MoeNormParams {
  const void* x;               // [rows, width]
  const void *weight, *scale;  // [width]
  void* y;                     // [rows, width]
  void* router_x;              // [rows, width], of the other dtype
  int64_t rows, x_stride;
  int width;
  float eps, factor;  // width^-½
};
void moe_norm(const MoeNormParams& params, const DTypes& dtypes, const Device& device);

struct QkvNormRopeParams {
  const void *q, *k, *v;                 // [T, H, C], [T, G, C] twice; k null: only q is made
  const void *q_weight, *k_weight;       // [C]
  const float* inv_freq;                 // [C / 2]
  void *q_out, *k_out, *v_out;           // q_out [T, H, C]; k_out, v_out [slots, G, C]
  Indices positions;                     // [T]
  Indices slots;                         // [T], or null: token t goes to row t
  int64_t q_stride, k_stride, v_stride;  // between tokens
  int64_t q_head_stride, k_head_stride, v_head_stride;  // between heads
  int64_t tokens, num_slots;
  int q_heads, kv_heads, head_dim;
  float eps;
};
void qkv_norm_rope(const QkvNormRopeParams& params, const DTypes& dtypes, const Device& device);

struct GegluParams {
  const void* gate_up;  // [rows, 2 width]
  void* y;              // [rows, width]
  int64_t rows, stride;
  int width;
};
void geglu(const GegluParams& params, DType dtype, const Device& device);

struct MoeRouteParams {
  const void* logits;  // [T, E]
  Floats scale;        // [E]
  float* weights;      // [T, K]
  int32_t* experts;    // [T, K]
  int64_t tokens, stride;
  int num_experts, k;
};
void moe_route(const MoeRouteParams& params, DType dtype, const Device& device);
constexpr int kMostRoutedExperts = 512, kMostRoutes = 32;

// An assignment a = t K + k is one expert of one token; there are A = T K. Sorted by expert, and
// within an expert in their order, they are named by `order`; those without an expert here are left
// out.
struct MoeExpertsParams {
  const void* x;        // [T, D]
  const void* gate_up;  // [E, 2 F, D], of the weights' dtype
  const void* down;     // [E, D, F], likewise
  Indices experts;      // [A]; what lies outside 0..E - 1 is skipped
  Floats weights;       // [A]
  void* y;              // [T, D]
  int32_t* offsets;     // [E + 1], where each expert's part of `order` begins
  int32_t* order;       // [A]
  void* hidden;         // [A, F], sorted
  void* expert_out;     // [A, D], not sorted; unused if moe_experts_streams
  int64_t x_stride;
  int tokens, k, num_experts, width, hidden_width;  // T, K, E, D, F
};
void moe_experts(const MoeExpertsParams& params, const DTypes& dtypes, const Device& device);
// Whether the tokens are so few that the weights are streamed past them.
bool moe_experts_streams(int64_t tokens, int64_t k, int64_t num_experts);

struct PleEmbedParams {
  Indices ids;            // [T]
  const void* table;      // [V, layers width], of the other dtype; may lie in pinned host memory
  const void* projected;  // [T, layers width]
  const void* weight;     // [width]
  void* y;                // [T, layers, width], of the other dtype
  int64_t tokens, vocabulary, table_stride, projected_stride;
  int layers, width;
  float token_scale, eps;
};
void ple_embed(const PleEmbedParams& params, const DTypes& dtypes, const Device& device);

struct PleGateParams {
  const void* gate;  // [T, width]
  const void* ple;   // the layer's slice of [T, L, width], of the other dtype
  void* y;           // [T, width], of the other dtype
  int64_t rows, gate_stride, ple_stride;
  int width;
};
void ple_gate(const PleGateParams& params, const DTypes& dtypes, const Device& device);

struct SoftcapParams {
  const void* logits;  // [rows, width]
  void* y;             // [rows, width]
  int64_t rows, stride;
  int width;
  float cap;
};
void softcap(const SoftcapParams& params, DType dtype, const Device& device);

struct SoftcapArgmaxParams {
  const void* logits;  // [rows, width]
  void* index;         // [rows] int64; until the last kernel a packed (value, index) each
  int64_t rows, stride;
  int width;
  float cap;
};
void softcap_argmax(const SoftcapArgmaxParams& params, DType dtype, const Device& device);

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
