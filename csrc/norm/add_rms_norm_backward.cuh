// Of r' = (residual + n post_weight) scale and y = n' next_weight, n and n' being the norms of x
// and of r': with NormGradient,
//   dr' += norm-backward(dy next_weight, r'),  dresidual = dr' scale,
//   dx = norm-backward(dresidual post_weight, x),
//   dpost_weight = Σ_rows dresidual n,  dnext_weight = Σ_rows dy n'.
//
// One pass over rows that a block owns as in rms_norm_backward.cuh, with two barriers a row: dr'
// must be whole before what it does to x can be summed. The output r' is read and not the input
// residual, which nobody need keep. Shared memory: sizeof(AddBackwardSmem). Bound: width (2
// sizeof(T) + 4 sizeof(R)) bytes of DRAM a row.
#pragma once

#include "rows_backward.cuh"

namespace gemma4 {

struct AddBackwardSmem {
  BlockSums<3> first;
  BlockSum second;
};

template <class T, class R, int kColumns>
__global__ void __launch_bounds__(kMostThreads<kColumns>, 1)
    add_rms_norm_backward_kernel(const __grid_constant__ AddRmsNormBackwardParams p) {
  using Columns = OwnColumns<kColumns, T, R>;
  auto& smem = shared_memory<AddBackwardSmem>();
  const Columns columns{p.width, threadIdx.x, blockDim.x};
  const auto post_weight = load_weight(columns, p.post_weight);
  const auto next_weight = load_weight(columns, p.next_weight);
  const float scale = p.scale.data ? load_floats<1>(p.scale, 0)[0] : 1.0f;
  auto post_sum = columns.load(static_cast<const float*>(nullptr), false);
  auto next_sum = post_sum;

  struct Held {
    decltype(columns.load(static_cast<const T*>(nullptr))) x;
    decltype(columns.load(static_cast<const R*>(nullptr))) residual, grad_residual, grad_y;
  };
  const auto load_row = [&](int64_t row) -> Held {
    const bool exists = row < p.rows;
    const auto of = [&](const void* rows, int64_t stride, bool wanted) {
      return columns.load_once(static_cast<const R*>(rows) + row * stride, exists && wanted);
    };
    return {columns.load_once(static_cast<const T*>(p.x) + row * p.x_stride, exists),
            of(p.new_residual, p.new_residual_stride, p.grad_y),
            of(p.grad_residual, p.grad_residual_stride, p.grad_residual),
            of(p.grad_y, p.grad_y_stride, p.grad_y)};
  };
  int parity = 0, second_parity = 0;
  // Sixteen columns of four rows fill the registers as it is.
  constexpr bool kAhead = kColumns == 8;
  Held next{};
  if (kAhead) next = load_row(blockIdx.x);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const Held held = kAhead ? next : load_row(row);
    if (kAhead) next = load_row(row + gridDim.x);
    float sums[3] = {columns.sum_of_squares(held.x), columns.sum_of_squares(held.residual), 0.0f};
    columns.each([&](int i, int column) {
      const auto grad = held.grad_y.at(i, column), r = held.residual.at(i, column);
#pragma unroll
      for (int j = 0; j < r.kWidth; j++) sums[2] += grad[j] * next_weight.vectors[i][j] * r[j];
    });
    block_sums(sums, smem.first, parity);
    const NormGradient through_y(sums[1], sums[2], p.width, p.eps);

    auto grad_sum = columns.load(static_cast<const float*>(nullptr), false);
    float products = 0.0f;
    columns.each([&](int i, int column) {
      auto total = held.grad_residual.at(i, column);
      const auto x = held.x.at(i, column);
      const auto grad = held.grad_y.at(i, column), r = held.residual.at(i, column);
#pragma unroll
      for (int j = 0; j < x.kWidth; j++) {
        float sum = total[j];
        if (p.grad_y) {
          sum += through_y(grad[j] * next_weight.vectors[i][j], r[j]);
          next_sum.vectors[i].data[j] += grad[j] * (r[j] * through_y.r);
        }
        sum *= scale;
        grad_sum.vectors[i].data[j] = sum;
        products += sum * post_weight.vectors[i][j] * x[j];
        total.set(j, sum);
      }
      if (p.grad_old_residual)
        store(static_cast<R*>(p.grad_old_residual) + row * p.width + column, total);
    });
    const float product = block_sum(products, smem.second, second_parity);
    const NormGradient dx(sums[0], product, p.width, p.eps);
    columns.each([&](int i, int column) {
      auto x = held.x.at(i, column);
#pragma unroll
      for (int j = 0; j < x.kWidth; j++) {
        const float sum = grad_sum.vectors[i][j];
        post_sum.vectors[i].data[j] += sum * (x[j] * dx.r);
        x.set(j, dx(sum * post_weight.vectors[i][j], x[j]));
      }
      if (p.grad_x) store(static_cast<T*>(p.grad_x) + row * p.width + column, x);
    });
  }
  store_sums(columns, p.weights.partial[0], post_sum);
  store_sums(columns, p.weights.partial[1], next_sum);
}

}  // namespace gemma4
