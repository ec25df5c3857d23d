#include "softcap_cross_entropy_backward.cuh"

namespace gemma4 {

void softcap_cross_entropy_backward(const CrossEntropyBackwardParams& p, DType dtype,
                                    const Device& device) {
  if (p.rows == 0) return;
  with_type(dtype, [&]<class T>() {
    constexpr int kWidth = kFullWidth<T>;
    const bool aligned =
        are_aligned<T>(p.logits, p.stride, p.width) && are_aligned<T>(p.d_logits, p.width, p.width);
    const auto kernel = aligned ? softcap_cross_entropy_backward_kernel<T, kWidth>
                                : softcap_cross_entropy_backward_kernel<T, 1>;
    launch_elementwise(device, "softcap_cross_entropy_backward", kernel, p.rows,
                       aligned ? p.width / kWidth : p.width, p);
  });
}

}  // namespace gemma4
