#include "gelu_mul.cuh"

namespace gemma4 {

void gelu_mul(const char* name, const GeluMulParams& p, const DTypes& dtypes,
              const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_types(dtypes, [&]<class T, class R, class>() {
    constexpr int kWidth = kFullWidth<T, R>;
    const bool aligned = are_aligned<T>(p.gate, p.gate_stride, p.width) &&
                         are_aligned<R>(p.other, p.other_stride, p.width) &&
                         are_aligned<R>(p.y, p.width, p.width);
    const auto kernel = aligned ? gelu_mul_kernel<T, R, kWidth> : gelu_mul_kernel<T, R, 1>;
    launch_elementwise(device, name, kernel, p.rows, aligned ? p.width / kWidth : p.width, p);
  });
}

}  // namespace gemma4
