// Reading arguments that come in one of several dtypes, and dividing by those that the host knows.
#pragma once

#include "divisor.h"
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

DEVICE int operator/(int n, const Divisor& d) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * d.magic >> d.shift);
}
DEVICE int operator%(int n, const Divisor& d) { return n - n / d * d.divisor; }

}  // namespace gemma4
