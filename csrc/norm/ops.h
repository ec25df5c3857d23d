// The norms, of rows and of heads.
#pragma once

#include "../common/types.h"

namespace gemma4 {

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
  float *k_scales, *v_scales;            // [slots, G] of k_out and v_out in e4m3, or null
  Indices positions;                     // [T]
  Indices slots;                         // [T], or null: token t goes to row t
  int64_t q_stride, k_stride, v_stride;  // between tokens
  int64_t q_head_stride, k_head_stride, v_head_stride;  // between heads
  int64_t tokens, num_slots;
  int q_heads, kv_heads, head_dim;
  float eps;
};
void qkv_norm_rope(const QkvNormRopeParams& params, const DTypes& dtypes, const Device& device);

// What a backward makes for up to two weights: each block writes the sums of its rows in fp32, and
// a second launch adds those of all blocks, in their order.
struct WeightGradients {
  float* partial[2];  // [blocks, width]
  void* sum[2];       // [width]; null: not wanted
  DType dtype[2];     // of the sums
  int blocks;         // as `weight_gradient_blocks` has it
};
// Few, for each costs a row of `partial`: as many as a multiprocessor holds at once, or half of it.
int weight_gradient_blocks(int64_t rows, int of_multiprocessor, const Device& device);
void add_weight_gradients(const WeightGradients& gradients, int width, const char* name,
                          const Device& device);

// Rows of the backward kernels hold whole vectors of every dtype, and no more than this.
constexpr int kRowMultiple = 8, kWidestRow = 6144;
constexpr int kRowBlocks = 2, kHeadBlocks = 3;  // that keep sums, of a multiprocessor

struct RmsNormBackwardParams {
  const void *grad, *x;  // [rows, width]
  Floats weight;         // [width] or null
  void* grad_x;          // [rows, width]; null: not wanted
  WeightGradients weights;
  int64_t rows, grad_stride, x_stride;
  int width;
  float eps;
};
void rms_norm_backward(const RmsNormBackwardParams& params, DType dtype, const Device& device);

struct AddRmsNormBackwardParams {
  const void *grad_residual, *grad_y;  // [rows, width], of the other dtype; null: zeros
  const void* x;                       // [rows, width]
  const void* new_residual;            // [rows, width], of the other dtype
  Floats post_weight, next_weight;     // [width]; without grad_y the second is not read
  Floats scale;                        // [1] or null
  void* grad_x;                        // [rows, width]; null: not wanted
  void* grad_old_residual;             // [rows, width], likewise
  WeightGradients weights;             // of post_weight and next_weight
  int64_t rows, grad_residual_stride, grad_y_stride, x_stride, new_residual_stride;
  int width;
  float eps;
};
void add_rms_norm_backward(const AddRmsNormBackwardParams& params, DType x, DType other,
                           const Device& device);

struct MoeNormBackwardParams {
  const void* grad_y;         // [rows, width]; null: zeros
  const void* grad_router_x;  // [rows, width], of the other dtype; null: zeros
  const void* x;              // [rows, width]
  Floats weight, scale;       // [width]
  void* grad_x;               // [rows, width]; null: not wanted
  WeightGradients weights;    // of weight and scale
  int64_t rows, grad_y_stride, grad_router_x_stride, x_stride;
  int width;
  float eps, factor;  // width^-½
};
void moe_norm_backward(const MoeNormBackwardParams& params, DType x, DType other,
                       const Device& device);

// Heads that need not lie beside each other.
struct Heads {
  const void* data;  // [T, heads, C] or null
  int64_t stride, head_stride;
};

struct QkvNormRopeBackwardParams {
  QkvNormRopeParams forward;     // whose outputs are the gradients of q, k and v; no weights
  Heads grad_q, grad_k, grad_v;  // null: zeros
  Floats q_weight, k_weight;     // [C]
  WeightGradients weights;       // of both
};
void qkv_norm_rope_backward(const QkvNormRopeBackwardParams& params, DType dtype,
                            const Device& device);

}  // namespace gemma4
