// Of y = n weight, n = x (mean x² + eps)^-½: dx as NormGradient has it, from dn = dy weight, and
// dweight = Σ_rows dy n.
//
// A block owns a row at a time, as in rms_norm.cuh, and asks for its next row before it sums up the
// one that it holds. dweight stays in registers from row to row, a row of fp32 that each block
// writes in the end. Shared memory: sizeof(BlockSums<2>). Bound: 3 width sizeof(T) bytes of DRAM a
// row.
#pragma once

#include "rows_backward.cuh"

namespace gemma4 {

template <class T, int kColumns>
__global__ void __launch_bounds__(kMostThreads<kColumns>, 1)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBackwardParams p) {
  using Columns = OwnColumns<kColumns, T>;
  auto& smem = shared_memory<BlockSums<2>>();
  const Columns columns{p.width, threadIdx.x, blockDim.x};
  const auto weight = load_weight(columns, p.weight);
  auto weight_sum = columns.load(static_cast<const float*>(nullptr), false);

  struct Held {
    decltype(columns.load(static_cast<const T*>(nullptr))) grad, x;
  };
  const auto load_row = [&](int64_t row) -> Held {
    const bool exists = row < p.rows;
    return {columns.load_once(static_cast<const T*>(p.grad) + row * p.grad_stride, exists),
            columns.load_once(static_cast<const T*>(p.x) + row * p.x_stride, exists)};
  };
  int parity = 0;
  Held next = load_row(blockIdx.x);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const Held held = next;
    next = load_row(row + gridDim.x);
    float sums[2] = {columns.sum_of_squares(held.x), 0.0f};
    columns.each([&](int i, int column) {
      const auto grad = held.grad.at(i, column), x = held.x.at(i, column);
#pragma unroll
      for (int j = 0; j < x.kWidth; j++) sums[1] += grad[j] * weight.vectors[i][j] * x[j];
    });
    block_sums(sums, smem, parity);
    const NormGradient dx(sums[0], sums[1], p.width, p.eps);
    columns.each([&](int i, int column) {
      const auto grad = held.grad.at(i, column);
      auto x = held.x.at(i, column);
#pragma unroll
      for (int j = 0; j < x.kWidth; j++) {
        weight_sum.vectors[i].data[j] += grad[j] * (x[j] * dx.r);
        x.set(j, dx(grad[j] * weight.vectors[i][j], x[j]));
      }
      if (p.grad_x) store(static_cast<T*>(p.grad_x) + row * p.width + column, x);
    });
  }
  store_sums(columns, p.weights.partial[0], weight_sum);
}

}  // namespace gemma4
