// d_logits = (exp(x - lse) (grad_nll + grad_lse) - grad_nll at the target) (1 - (x / cap)²), of x
// as in softcap_cross_entropy.cuh; zeros of an ignored row, which is not read; NaN where the target
// is no token.
//
// One thread, one vector, which it reads before it writes: d_logits may be the logits. Bound:
// 2 width sizeof(T) bytes of DRAM a row.
#pragma once

#include "../common/elementwise.cuh"
#include "../common/indices.cuh"
#include "../common/math.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

template <class T, int kWidth>
__global__ void __launch_bounds__(kElementwiseThreads)
    softcap_cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyBackwardParams p) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  each_row<kWidth>(p.rows, p.width, [&](int64_t row, int column) {
    const int64_t target = index_at(p.targets, row);
    Vec<T, kWidth> d{};
    if (target != kIgnoredTarget) {
      const auto x = load_fresh<kWidth>(static_cast<const T*>(p.logits) + row * p.stride + column);
      const bool known = 0 <= target && target < p.width;
      const float of_target = known ? p.grad_nll[row] : NAN, of_all = of_target + p.grad_lse[row];
      const float lse = p.lse[row];
#pragma unroll
      for (int j = 0; j < kWidth; j++) {
        Sloped y{x[j], 1.0f};
        if (p.cap > 0.0f) y = sloped_softcap(x[j], p.cap);
        float grad = of_all * ptx::exp2_approx((y.value - lse) * kLog2e);
        if (column + j == target) grad -= of_target;
        d.set(j, grad * y.slope);
      }
    }
    store(static_cast<T*>(p.d_logits) + row * p.width + column, d);
  });
}

}  // namespace gemma4
