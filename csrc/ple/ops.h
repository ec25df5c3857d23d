// Per-layer embeddings.
#pragma once

#include "../common/types.h"
#include "../linear/ops.h"

namespace gemma4 {

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

// `other` is the layer's slice of [T, L, width].
void ple_gate(const GeluMulParams& params, const DTypes& dtypes, const Device& device);
void ple_gate_backward(const GeluMulBackwardParams& params, const DTypes& dtypes,
                       const Device& device);

}  // namespace gemma4
