// Reading arguments that come in one of several dtypes.
#pragma once

#include "platform.h"
#include "types.h"

namespace gemma4 {

DEVICE int64_t index_at(const Indices& indices, int64_t i) {
  return indices.is_64 ? static_cast<const int64_t*>(indices.data)[i]
                       : static_cast<const int32_t*>(indices.data)[i];
}

DEVICE float float_at(const Floats& floats, int64_t i) {
  if (floats.dtype == DType::kFloat32) return static_cast<const float*>(floats.data)[i];
  if (floats.dtype == DType::kBFloat16) return to_float(static_cast<const bf16*>(floats.data)[i]);
  return to_float(static_cast<const fp16*>(floats.data)[i]);
}

}  // namespace gemma4
