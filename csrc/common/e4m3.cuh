// Numbers of eight bits (OCP E4M3: a sign, four exponent bits with bias 7, three of the mantissa,
// no infinity, at most 448) that are kept with a scale: x = code · scale.
#pragma once

#include <cmath>

#include "ptx.h"

namespace gemma4 {

struct e4m3 {
  uint8_t bits;
};

constexpr float kMostE4m3 = 448.0f;

// The scale of numbers of which `most` is the largest; 1 where there is nothing to scale.
DEVICE float e4m3_scale(float most) {
  const float scale = most / kMostE4m3;
  return scale == 0.0f ? 1.0f : scale;
}

// The code nearest to x, of two the even one; beyond 448 the last one. Of NaN it is any: the scale
// is NaN there.
DEVICE uint32_t e4m3_code(float x) {
  const float size = fminf(fabsf(x), kMostE4m3);
  const uint32_t bits = __float_as_uint(size), sign = __float_as_uint(x) >> 24 & 0x80;
  // Below 2^-6 codes are multiples of 2^-9, which is what a sum with 2^14 is rounded to.
  const uint32_t small = __float_as_uint(size + 0x1p14f) - __float_as_uint(0x1p14f);
  const uint32_t rounded = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
  return sign | (size < 0x1p-6f ? small : rounded - ((127 - 7) << 3));
}

template <class T>
constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
// The same number of T twice, by its bits.
template <uint32_t kBits>
constexpr uint32_t kTwice = kBits << 16 | kBits;

// Codes that are the upper bytes of both halves of a word, times 2^-120 in bf16 and 2^-8 in fp16.
template <class T>
DEVICE uint32_t e4m3_pair_unscaled(uint32_t pair) {
  const uint32_t size =
      kIsBf16<T> ? pair >> 4 & kTwice<(0x7f << 4)> : pair >> 1 & kTwice<(0x7f << 7)>;
  return size | (pair & kTwice<0x8000>);
}

// What pairs of codes are made into for the tensor cores: exactly code / 256 each, which is fp16's
// as the bits come to lie.
constexpr float kOfCodes = 256.0f;

template <class T>
DEVICE uint32_t upper_codes(uint32_t word) {
  const uint32_t pair = e4m3_pair_unscaled<T>(word);
  // Of 2^-120 times the code 2^112 leaves 2^-8.
  return kIsBf16<T> ? ptx::fma_pair<T>(pair, kTwice<0x7780>, kTwice<0x8000>) : pair;
}

// Codes 0 and 2 of a word, and 1 and 3.
template <class T>
DEVICE void unpack_codes(uint32_t word, uint32_t& even, uint32_t& odd) {
  even = upper_codes<T>(word << 8);
  odd = upper_codes<T>(word);
}

}  // namespace gemma4
