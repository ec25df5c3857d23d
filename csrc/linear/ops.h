// What stands behind a linear layer: the gated product and the cap on logits.
#pragma once

#include "../common/types.h"

namespace gemma4 {

struct GegluParams {
  const void* gate_up;  // [rows, 2 width]
  void* y;              // [rows, width]
  int64_t rows, stride;
  int width;
};
void geglu(const GegluParams& params, DType dtype, const Device& device);

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
