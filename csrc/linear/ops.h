// What stands behind a linear layer: the gated product and the cap on logits.
#pragma once

#include "../common/types.h"

namespace gemma4 {

struct GeluMulParams {
  const void* gate;   // [rows, width]
  const void* other;  // [rows, width], of ple_gate's other dtype
  void* y;            // [rows, width], likewise
  int64_t rows, gate_stride, other_stride;
  int width;
};
void geglu(const GeluMulParams& params, DType dtype, const Device& device);

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

}  // namespace gemma4
