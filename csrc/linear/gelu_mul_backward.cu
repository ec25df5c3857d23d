#include "gelu_mul_backward.cuh"

namespace gemma4 {

void gelu_mul_backward(const char* name, const GeluMulBackwardParams& p, const DTypes& dtypes,
                       const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_types(dtypes, [&]<class T, class R, class>() {
    constexpr int kWidth = kFullWidth<T, R>;
    const bool aligned = are_aligned<R>(p.grad, p.grad_stride, p.width) &&
                         are_aligned<T>(p.gate, p.gate_stride, p.width) &&
                         are_aligned<R>(p.other, p.other_stride, p.width) &&
                         are_aligned<T>(p.d_gate, p.d_stride, p.width) &&
                         are_aligned<R>(p.d_other, p.d_stride, p.width);
    const auto kernel =
        aligned ? gelu_mul_backward_kernel<T, R, kWidth> : gelu_mul_backward_kernel<T, R, 1>;
    launch_elementwise(device, name, kernel, p.rows, aligned ? p.width / kWidth : p.width, p);
  });
}

}  // namespace gemma4
