// One head, normed and turned, in the registers of neighbouring lanes: they hold vectors of its
// first half and those that pair with them, so that the rotation never leaves a lane.
#pragma once

#include "../common/e4m3.cuh"
#include "../common/math.cuh"
#include "../common/reduce.cuh"
#include "../common/row.cuh"

namespace gemma4 {

template <class T, int kHeadDim>
struct HeadLanes {
  static constexpr int kWidth = kFullWidth<T>, kHalf = kHeadDim / 2;
  static constexpr int kVectorsOfHalf = kHalf / kWidth;
  static constexpr int kLanes = kVectorsOfHalf < 32 ? kVectorsOfHalf : 32;
  static constexpr int kVectors = kVectorsOfHalf / kLanes;  // of each half, a lane
  using Vector = Vec<T, kWidth>;

  DEVICE static Columns<kVectors, kWidth> half() { return {kHalf, threadIdx.x % kLanes, kLanes}; }
};

// sin and cos of position · inv_freq: of one token, the same for each of its heads.
template <class T, int kHeadDim>
struct Rotation {
  using Lanes = HeadLanes<T, kHeadDim>;
  float sin[Lanes::kVectors][Lanes::kWidth], cos[Lanes::kVectors][Lanes::kWidth];

  DEVICE Rotation(const float* inv_freq, float position FROM_HERE) {
    Lanes::half().each([&](int i, int column) {
#pragma unroll
      for (int j = 0; j < Lanes::kWidth; j += 4) {
        const auto frequency = load<4>(inv_freq + column + j HERE);
#pragma unroll
        for (int l = 0; l < 4; l++) sin_cos(position * frequency[l], sin[i][j + l], cos[i][j + l]);
      }
    });
  }
};

// store(column, vector) takes the results of `normed` and `turned`.
template <class T, int kHeadDim>
struct HeadRow {
  using Lanes = HeadLanes<T, kHeadDim>;
  using Vector = typename Lanes::Vector;
  Row<T, Lanes::kWidth, Lanes::kVectors> a, b;
  float scale;

  // All lanes of the warp; of a head that does not exist, zeros.
  DEVICE HeadRow(const T* head, bool exists, float eps FROM_HERE)
      : a(Lanes::half().load_fresh(head, exists HERE)),
        b(Lanes::half().load_fresh(head + Lanes::kHalf, exists HERE)) {
    float sum = 0.0f;
    Lanes::half().each([&](int i, int) {
      sum +=
          sum_of_squares<Lanes::kWidth>(a.vectors[i]) + sum_of_squares<Lanes::kWidth>(b.vectors[i]);
    });
    scale = inv_rms(lane_sum<Lanes::kLanes>(sum), kHeadDim, eps);
  }

  template <class Store>
  DEVICE void normed(const Store& store) const {
    Lanes::half().each([&](int i, int column) {
      Vector out_a, out_b;
#pragma unroll
      for (int j = 0; j < Lanes::kWidth; j++) {
        out_a.set(j, a.vectors[i][j] * scale);
        out_b.set(j, b.vectors[i][j] * scale);
      }
      store(column, out_a);
      store(Lanes::kHalf + column, out_b);
    });
  }

  template <class W, class Store>
  DEVICE void turned(const W* weight, const Rotation<T, kHeadDim>& by,
                     const Store& store FROM_HERE) const {
    Lanes::half().each([&](int i, int column) {
      const auto weight_a = load<Lanes::kWidth>(weight + column HERE);
      const auto weight_b = load<Lanes::kWidth>(weight + Lanes::kHalf + column HERE);
      Vector out_a, out_b;
#pragma unroll
      for (int j = 0; j < Lanes::kWidth; j++) {
        const float x = a.vectors[i][j] * scale * weight_a[j];
        const float y = b.vectors[i][j] * scale * weight_b[j];
        out_a.set(j, x * by.cos[i][j] - y * by.sin[i][j]);
        out_b.set(j, y * by.cos[i][j] + x * by.sin[i][j]);
      }
      store(column, out_a);
      store(Lanes::kHalf + column, out_b);
    });
  }
};

// A row of `normed` or `turned` on its way into a cache of e4m3, with a scale of its own.
template <class T, int kHeadDim>
struct HeadCodes {
  using Lanes = HeadLanes<T, kHeadDim>;
  using Vector = typename Lanes::Vector;
  static_assert(Lanes::kWidth == 8 && Lanes::kVectors == 1);
  Vector halves[2] = {};

  DEVICE auto hold() {
    return [this](int column, const Vector& vector) { halves[column / Lanes::kHalf] = vector; };
  }

  // All lanes of the warp, to head `row` of codes and of scales if it exists.
  DEVICE void store(bool exists, void* codes, float* scales, int64_t row FROM_HERE) const {
    // As bits sizes have the order of the numbers, and NaN is the largest.
    unsigned most = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) most = max(most, __float_as_uint(fabsf(halves[i / 8][i % 8])));
    most = lane_max<Lanes::kLanes>(most);
    if (!exists) return;
    const float scale = e4m3_scale(__uint_as_float(most));
    const int lane = threadIdx.x % Lanes::kLanes;
    auto* to = static_cast<e4m3*>(codes) + row * kHeadDim + lane * 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t words[2] = {};
#pragma unroll
      for (int i = 0; i < 8; i++) words[i / 4] |= e4m3_code(halves[half][i] / scale) << i % 4 * 8;
      ptx::store_8(to + half * Lanes::kHalf, {words[0], words[1]} HERE);
    }
    if (lane == 0) scales[row] = scale;
  }
};

}  // namespace gemma4
