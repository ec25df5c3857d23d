// (value, index) pairs as integers, so that one maximum finds the largest value's lowest index.
#pragma once

#include "platform.h"

namespace gemma4 {

using Packed = unsigned long long;

// Orders as torch.argmax does: NaN above all, -0 equal to 0, of equals the lower index.
DEVICE Packed pack(float value, int index) {
  unsigned bits = __float_as_uint(value + 0.0f);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  if (value != value) bits = 0xffffffffu;
  return static_cast<Packed>(bits) << 32 | ~static_cast<unsigned>(index);
}

DEVICE float value_of(Packed packed) {
  const unsigned bits = static_cast<unsigned>(packed >> 32);
  return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

DEVICE int index_of(Packed packed) { return static_cast<int>(~static_cast<unsigned>(packed)); }

}  // namespace gemma4
