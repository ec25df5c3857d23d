// The router and its experts.
#pragma once

#include "../common/types.h"

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

}  // namespace gemma4
