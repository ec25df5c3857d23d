// Rows of the last dimension, each shared by neighbouring threads that hold it in registers, so
// that it is read once. A row of any width and alignment (kVectors 0) goes element by element, is
// held by nobody and read again, from L2.
#pragma once

#include "vec.cuh"

namespace gemma4 {

// A row's part in one thread: vectors of kWidth elements, at most kVectors of them, zeros where
// there is none.
template <class T, int kWidth, int kVectors>
struct Row {
  Vec<T, kWidth> vectors[kVectors] = {};

  DEVICE Vec<T, kWidth> at(int i, int) const { return vectors[i]; }

  // Writes a vector into `row`, which is then the row that this holds.
  DEVICE void store(T* row, int i, int column, const Vec<T, kWidth>& vector FROM_HERE) {
    vectors[i] = vector;
    gemma4::store(row + column, vector HERE);
  }
};

template <class T>
struct Row<T, 1, 0> {
  const T* data = nullptr;

  DEVICE Vec<T, 1> at(int, int column) const { return data ? load<1>(data + column) : Vec<T, 1>{}; }

  DEVICE void store(T* row, int, int column, const Vec<T, 1>& element) {
    row[column] = element.data[0];
    data = row;
  }
};

// The vectors of a row that are a thread's: of `threads` neighbours, number `thread` has the
// vectors thread, thread + threads, ...
template <int kVectors, int kWidth>
struct Columns {
  static_assert(kVectors > 0 || kWidth == 1);
  int width;
  unsigned thread, threads;

  // Calls f(i, column) for each.
  template <class F>
  DEVICE void each(F&& f) const {
    if constexpr (kVectors == 0) {
      for (int column = thread; column < width; column += threads) f(0, column);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; i++) {
        const int column = (i * threads + thread) * kWidth;
        if (column < width) f(i, column);
      }
    }
  }

  // A row of zeros where none exists.
  template <Read kHow = Read::kConstant, class T>
  DEVICE Row<T, kWidth, kVectors> load(const T* row, bool exists = true FROM_HERE) const {
    Row<T, kWidth, kVectors> held;
    if constexpr (kVectors == 0)
      held.data = exists ? row : nullptr;
    else if (exists)
      each([&](int i, int column) {
        held.vectors[i] = gemma4::load<kWidth, kHow>(row + column HERE);
      });
    return held;
  }

  template <class T>
  DEVICE Row<T, kWidth, kVectors> load_once(const T* row, bool exists = true FROM_HERE) const {
    return load<Read::kOnce>(row, exists HERE);
  }
  template <class T>
  DEVICE Row<T, kWidth, kVectors> load_first(const T* row, bool exists = true FROM_HERE) const {
    return load<Read::kFirst>(row, exists HERE);
  }
  template <class T>
  DEVICE Row<T, kWidth, kVectors> load_fresh(const T* row, bool exists = true FROM_HERE) const {
    return load<Read::kFresh>(row, exists HERE);
  }

  // The thread's share of the row's.
  template <class T>
  DEVICE float sum_of_squares(const Row<T, kWidth, kVectors>& row) const {
    float sum = 0.0f;
    if constexpr (kVectors == 0) {
      each([&](int i, int column) {
        const float x = row.at(i, column)[0];
        sum += x * x;
      });
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; i++) sum += gemma4::sum_of_squares<kWidth>(row.vectors[i]);
    }
    return sum;
  }
};

// With as many elements in a vector as the widest of T allows.
template <int kVectors, class... T>
using ColumnsOf = Columns<kVectors, kVectors == 0 ? 1 : kFullWidth<T...>>;

// (mean x² + eps)^-½
DEVICE float inv_rms(float sum_of_squares, int width, float eps) {
  return 1.0f / sqrtf(sum_of_squares / width + eps);
}

}  // namespace gemma4
