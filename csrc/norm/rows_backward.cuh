// What the backward of the row norms shares: a thread owns the same 8 or 16 columns of every row of
// its block, so that the gradients of weights are sums in its registers.
#pragma once

#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "../common/row.cuh"
#include "ops.h"

namespace gemma4 {

// How many threads a block has at most, of so many columns each.
template <int kColumns>
constexpr int kMostThreads = kColumns == 8 ? 512 : kWidestRow / 16;

// A thread's columns of rows whose widest type is one of T.
template <int kColumns, class... T>
using OwnColumns = ColumnsOf<kColumns / kFullWidth<T...>, T...>;

template <int kWidth>
DEVICE Vec<float, kWidth> load_floats(const Floats& x, int column FROM_HERE) {
  const auto load_as = [&]<class T>(T) {
    const auto loaded = load<kWidth>(static_cast<const T*>(x.data) + column HERE);
    Vec<float, kWidth> floats;
#pragma unroll
    for (int j = 0; j < kWidth; j++) floats.set(j, loaded[j]);
    return floats;
  };
  if (x.dtype == DType::kFloat32) return load_as(float());
  return x.dtype == DType::kBFloat16 ? load_as(bf16()) : load_as(fp16());
}

// Ones where there is no weight.
template <int kVectors, int kWidth>
DEVICE Row<float, kWidth, kVectors> load_weight(const Columns<kVectors, kWidth>& columns,
                                                const Floats& weight FROM_HERE) {
  Row<float, kWidth, kVectors> held;
  columns.each([&](int i, int column) {
    if (weight.data) held.vectors[i] = load_floats<kWidth>(weight, column HERE);
#pragma unroll
    for (int j = 0; j < kWidth; j++)
      if (!weight.data) held.vectors[i].data[j] = 1.0f;
  });
  return held;
}

// Of n = x r, r = (mean x² + eps)^-½: dx = r (dn - n mean(dn n)).
struct NormGradient {
  float r, mean;  // the second is mean(dn x) r²

  // Of the sums of x² and of dn x.
  DEVICE NormGradient(float squares, float products, int width, float eps)
      : r(inv_rms(squares, width, eps)), mean(products / width * r * r) {}

  DEVICE float operator()(float dn, float x) const { return r * (dn - x * mean); }
};

template <int kVectors, int kWidth>
DEVICE void store_sums(const Columns<kVectors, kWidth>& columns, float* partial,
                       const Row<float, kWidth, kVectors>& sums FROM_HERE) {
  if (!partial) return;
  columns.each([&](int i, int column) {
    store(partial + int64_t{blockIdx.x} * columns.width + column, sums.vectors[i] HERE);
  });
}

// Starts kernel<kColumns>() and, where gradients of weights are wanted, what adds their parts.
template <class Params, class Kernel>
void launch_rows_backward(const Device& device, const char* name, const Params& p,
                          size_t smem_bytes, Kernel&& kernel) {
  if (p.width % kRowMultiple != 0 || p.width > kWidestRow)
    throw std::runtime_error(std::string(name) + ": there are kernels for rows of a multiple of " +
                             std::to_string(kRowMultiple) + " columns alone, at most " +
                             std::to_string(kWidestRow));
  const bool sums = p.weights.sum[0] || p.weights.sum[1];
  const auto start = [&]<int kColumns>() {
    const int threads = round_up(ceil_div(p.width, kColumns), kWarpSize);
    const int64_t resident = device.sm_count * (2048 / threads);  // or more, if they need registers
    const int64_t blocks = sums ? p.weights.blocks : std::min(p.rows, resident);
    launch(device, name, kernel.template operator()<kColumns>(), blocks, threads, smem_bytes, p);
  };
  if (p.rows > 0 && p.width <= 8 * kMostThreads<8>)
    start.template operator()<8>();
  else if (p.rows > 0)
    start.template operator()<16>();
  if (sums) add_weight_gradients(p.weights, p.width, name, device);
}

}  // namespace gemma4
