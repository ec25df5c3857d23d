// The router and its experts.
#pragma once

#include "../common/types.h"
#include "../linear/ops.h"

namespace gemma4 {

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

// In the place of the element type of a weight: a packed one.
template <int kBits>
struct Bits {};
template <class W>
constexpr int kBitsOf = 0;
template <int kBits>
constexpr int kBitsOf<Bits<kBits>> = kBits;

// An assignment a = t K + k is one expert of one token; there are A = T K. Sorted by expert, and
// within an expert in their order, they are named by `order`; those without an expert here are left
// out.
struct MoeExpertsParams {
  const void* x;         // [T, D]
  PackedWeight gate_up;  // [E, 2 F, D]
  PackedWeight down;     // [E, D, F]
  Indices experts;       // [A]; what lies outside 0..E - 1 is skipped
  Floats weights;        // [A]
  void* y;               // [T, D]
  int32_t* offsets;      // [E + 1], where each expert's part of `order` begins
  int32_t* order;        // [A]
  void* hidden;          // [A, F], sorted
  void* expert_out;      // [A, D], not sorted; unused if moe_experts_streams
  int64_t x_stride;
  int tokens, k, num_experts, width, hidden_width;  // T, K, E, D, F
  bool packed;  // both weights; else their codes are elements of the weights' dtype
};
void moe_experts(const MoeExpertsParams& params, const DTypes& dtypes, const Device& device);
void moe_products_packed(const MoeExpertsParams& params, DType dtype, const Device& device);
// Whether the tokens are so few that the weights are streamed past them.
bool moe_experts_streams(int64_t tokens, int64_t k, int64_t num_experts);

// What the backward launches of the forward, so that it is compiled once.
void moe_sort(const MoeExpertsParams& params, const Device& device);
void moe_combine(const MoeExpertsParams& params, DType dtype, const Device& device);

// The forward's arguments, dense; y is dx, hidden is times its routing weight, expert_out the parts
// of dx. A null pointer is a gradient that is not wanted, or what nobody wants.
struct MoeExpertsBackwardParams : MoeExpertsParams {
  const void* grad;  // [T, D], of y
  int64_t grad_stride;
  void* d_pair;      // [A, 2 F], of gate and up; sorted
  float* d_parts;    // [hidden_tiles, A], of the weights; sorted
  void* d_gate_up;   // [E, 2 F, D], of the weights' dtype
  void* d_down;      // [E, D, F], likewise
  int hidden_tiles;  // into which F is cut
  float* d_weights;  // [A]
};
void moe_experts_backward(const MoeExpertsBackwardParams& params, const DTypes& dtypes,
                          const Device& device);
constexpr int kMoeHiddenColumns = 64;  // of one of those tiles

// What opens both branches of a layer with experts; the OpeningParams' norm is the dense one's.
struct MoeOpenParams : OpeningParams {
  PackedWeight gate_up;       // [2 rows, width], gate rows first
  const void* expert_weight;  // [width]
  const void* router_scale;   // [width]
  const void* router;         // [num_experts, width]
  void* hidden;               // [tokens, rows]
  void* logits;               // [tokens, num_experts]
  void* expert_x;             // [tokens, width]
  int rows, num_experts;      // multiples of 8, of a packed gate_up 16
  bool packed;                // gate_up; else its codes are elements
  int dense_blocks;           // the launcher's
  float factor;               // width^-½
};
void moe_open(MoeOpenParams params, DType dtype, const Device& device);
void moe_open_packed(const MoeOpenParams& params, DType dtype, const Device& device);

constexpr int kMostSmallExperts = 128, kMostSmallAssignments = 128;
// Its experts and weights are chosen by the first launch, and the launcher's. `packed` is of all
// three weights, and dense has codes of as many bits as gate_up.
struct MoeExpertsSmallParams : MoeExpertsParams {
  const void* logits;     // [T, E]
  Floats scale;           // [E]
  int32_t* chosen;        // [A]
  float* chosen_weights;  // [A]
  const void* dense_x;    // [T, dense_width]
  PackedWeight dense;     // [D, dense_width]
  void* dense_y;          // [T, D]
  int64_t logits_stride, dense_stride;
  int dense_width;   // a multiple of 8, as is D
  int dense_blocks;  // the launcher's
};
void moe_experts_small(MoeExpertsSmallParams params, DType dtype, const Device& device);
void moe_experts_small_packed(const MoeExpertsSmallParams& params, DType dtype,
                              const Device& device);
// Its last launch; in moe_experts.cu, whose last it is too, so that the kernel is compiled once.
void moe_experts_small_down(const MoeExpertsParams& params, DType dtype, const Device& device);
void moe_experts_small_down_packed(const MoeExpertsParams& params, DType dtype,
                                   const Device& device);

}  // namespace gemma4
