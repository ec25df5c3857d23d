// Of y = n weight and router_x = n scale width^-½, n being the norm of x: dx as NormGradient has
// it, from dn = dy weight + drouter_x scale width^-½, dweight = Σ_rows dy n and dscale = Σ_rows
// drouter_x n width^-½.
//
// Rows, sums and what comes ahead as in rms_norm_backward.cuh. Shared memory:
// sizeof(BlockSums<2>). Bound: width (3 sizeof(T) + sizeof(R)) bytes of DRAM a row.
#pragma once

#include "rows_backward.cuh"

namespace gemma4 {

template <class T, class R, int kColumns>
__global__ void __launch_bounds__(kMostThreads<kColumns>, 1)
    moe_norm_backward_kernel(const __grid_constant__ MoeNormBackwardParams p) {
  using Columns = OwnColumns<kColumns, T, R>;
  auto& smem = shared_memory<BlockSums<2>>();
  const Columns columns{p.width, threadIdx.x, blockDim.x};
  const auto weight = load_weight(columns, p.weight);
  auto scale = load_weight(columns, p.scale);
  columns.each([&](int i, int) {
#pragma unroll
    for (float& s : scale.vectors[i].data) s *= p.factor;
  });
  auto weight_sum = columns.load(static_cast<const float*>(nullptr), false);
  auto scale_sum = weight_sum;

  struct Held {
    decltype(columns.load(static_cast<const T*>(nullptr))) grad_y, x;
    decltype(columns.load(static_cast<const R*>(nullptr))) grad_router_x;
  };
  const auto load_row = [&](int64_t row) -> Held {
    const bool exists = row < p.rows;
    return {columns.load_once(static_cast<const T*>(p.grad_y) + row * p.grad_y_stride,
                              exists && p.grad_y),
            columns.load_once(static_cast<const T*>(p.x) + row * p.x_stride, exists),
            columns.load_once(static_cast<const R*>(p.grad_router_x) + row * p.grad_router_x_stride,
                              exists && p.grad_router_x)};
  };
  // Sixteen columns fill the registers as it is.
  constexpr bool kAhead = kColumns == 8;
  int parity = 0;
  Held next{};
  if (kAhead) next = load_row(blockIdx.x);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const Held held = kAhead ? next : load_row(row);
    if (kAhead) next = load_row(row + gridDim.x);
    const auto grad_n = [&](int i, int j) {
      return held.grad_y.vectors[i][j] * weight.vectors[i][j] +
             held.grad_router_x.vectors[i][j] * scale.vectors[i][j];
    };
    float sums[2] = {columns.sum_of_squares(held.x), 0.0f};
    columns.each([&](int i, int column) {
      const auto x = held.x.at(i, column);
#pragma unroll
      for (int j = 0; j < x.kWidth; j++) sums[1] += grad_n(i, j) * x[j];
    });
    block_sums(sums, smem, parity);
    const NormGradient dx(sums[0], sums[1], p.width, p.eps);
    columns.each([&](int i, int column) {
      auto x = held.x.at(i, column);
#pragma unroll
      for (int j = 0; j < x.kWidth; j++) {
        const float n = x[j] * dx.r;
        weight_sum.vectors[i].data[j] += held.grad_y.vectors[i][j] * n;
        scale_sum.vectors[i].data[j] += held.grad_router_x.vectors[i][j] * n * p.factor;
        x.set(j, dx(grad_n(i, j), x[j]));
      }
      if (p.grad_x) store(static_cast<T*>(p.grad_x) + row * p.width + column, x);
    });
  }
  store_sums(columns, p.weights.partial[0], weight_sum);
  store_sums(columns, p.weights.partial[1], scale_sum);
}

}  // namespace gemma4
