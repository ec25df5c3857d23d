// Neighbouring elements that travel together: 16 bytes, or one element where a row does not allow
// it.
#pragma once

#include "ptx.h"

namespace gemma4 {

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vec {
  static_assert(kWidth == 1 || kWidth * sizeof(T) == 16);
  T data[kWidth];

  DEVICE float operator[](int i) const { return to_float(data[i]); }
  DEVICE void set(int i, float value) { data[i] = from_float<T>(value); }
};

template <class T>
constexpr int kFullWidth = 16 / sizeof(T);

// Of memory that no thread writes during the launch.
template <int kWidth, class T>
DEVICE Vec<T, kWidth> load(const T* p FROM_HERE) {
  Vec<T, kWidth> v;
  if constexpr (kWidth == 1) {
    v.data[0] = *p;
  } else {
    const uint4 bits = ptx::load_16(p HERE);
    __builtin_memcpy(&v, &bits, 16);
  }
  return v;
}

// The same for what is read once and never again.
template <int kWidth, class T>
DEVICE Vec<T, kWidth> load_once(const T* p FROM_HERE) {
  Vec<T, kWidth> v;
  if constexpr (kWidth == 1) {
    v.data[0] = *p;
  } else {
    const uint4 bits = ptx::load_16_once(p HERE);
    __builtin_memcpy(&v, &bits, 16);
  }
  return v;
}

template <class T, int kWidth>
DEVICE void store(T* p, const Vec<T, kWidth>& v FROM_HERE) {
  if constexpr (kWidth == 1) {
    *p = v.data[0];
  } else {
    uint4 bits;
    __builtin_memcpy(&bits, &v, 16);
    ptx::store_16(p, bits HERE);
  }
}

template <int kWidth>
DEVICE float sum_of_squares(const auto& v) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWidth; i++) sum += v[i] * v[i];
  return sum;
}

}  // namespace gemma4
