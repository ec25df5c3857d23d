// Neighbouring elements that travel together: 16 bytes, or one element where a row does not allow
// it. Beside vectors of 16 bytes stand those of as many elements of another size, in 8 or 32.
#pragma once

#include <algorithm>

#include "ptx.h"

namespace gemma4 {

template <class T, int kWidth_>
struct alignas(kWidth_ * sizeof(T)) Vec {
  static constexpr int kWidth = kWidth_, kBytes = kWidth * sizeof(T);
  static_assert(kWidth == 1 || kBytes == 8 || kBytes == 16 || kBytes == 32);
  T data[kWidth];

  DEVICE float operator[](int i) const { return to_float(data[i]); }
  DEVICE void set(int i, float value) { data[i] = from_float<T>(value); }
};

// How many elements of each type go together, the widest in 16 bytes.
template <class... T>
constexpr int kFullWidth = 16 / std::max({sizeof(T)...});

// How few blocks a multiprocessor may hold: where weights are wider than what they are multiplied
// with, the compiler would rather spill than give up one. 0 leaves it the choice.
template <class X, class W>
constexpr int kLeastBlocks = sizeof(W) > sizeof(X) ? 1 : 0;

enum class Read {
  kConstant,  // nobody writes it while the kernel runs: compilers may move the load anywhere
  kOnce,      // nor is it read again
  kFirst,     // parameters, before a dependent kernel waits, and never behind the wait
  kFresh,     // what a kernel that this one waited for may have written: never before the wait
};

template <int kWidth, Read kHow = Read::kConstant, class T>
DEVICE Vec<T, kWidth> load(const T* p FROM_HERE) {
  Vec<T, kWidth> v;
  if constexpr (kWidth == 1) {
    v.data[0] = *p;
  } else if constexpr (v.kBytes == 8) {
    uint2 bits;
    if constexpr (kHow == Read::kConstant) bits = ptx::load_8(p HERE);
    if constexpr (kHow == Read::kOnce) bits = ptx::load_8_once(p HERE);
    if constexpr (kHow == Read::kFirst) bits = ptx::load_8_first(p HERE);
    if constexpr (kHow == Read::kFresh) bits = ptx::load_8_coherent(p HERE);
    __builtin_memcpy(&v, &bits, 8);
  } else if constexpr (v.kBytes == 16) {
    uint4 bits;
    if constexpr (kHow == Read::kConstant) bits = ptx::load_16(p HERE);
    if constexpr (kHow == Read::kOnce) bits = ptx::load_16_once(p HERE);
    if constexpr (kHow == Read::kFirst) bits = ptx::load_16_first(p HERE);
    if constexpr (kHow == Read::kFresh) bits = ptx::load_16_coherent(p HERE);
    __builtin_memcpy(&v, &bits, 16);
  } else {
    constexpr int kHalf = kWidth / 2;
    const Vec<T, kHalf> halves[] = {load<kHalf, kHow>(p HERE), load<kHalf, kHow>(p + kHalf HERE)};
    __builtin_memcpy(&v, halves, 32);
  }
  return v;
}

template <int kWidth, class T>
DEVICE Vec<T, kWidth> load_once(const T* p FROM_HERE) {
  return load<kWidth, Read::kOnce>(p HERE);
}
template <int kWidth, class T>
DEVICE Vec<T, kWidth> load_fresh(const T* p FROM_HERE) {
  return load<kWidth, Read::kFresh>(p HERE);
}

template <class T, int kWidth>
DEVICE void store(T* p, const Vec<T, kWidth>& v FROM_HERE) {
  if constexpr (kWidth == 1) {
    *p = v.data[0];
  } else if constexpr (v.kBytes == 32) {
    Vec<T, kWidth / 2> halves[2];
    __builtin_memcpy(halves, &v, 32);
    store(p, halves[0] HERE);
    store(p + kWidth / 2, halves[1] HERE);
  } else if constexpr (v.kBytes == 8) {
    uint2 bits;
    __builtin_memcpy(&bits, &v, 8);
    ptx::store_8(p, bits HERE);
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
