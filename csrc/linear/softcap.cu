#include "softcap.cuh"

namespace gemma4 {

void softcap(const SoftcapParams& p, DType dtype, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_type(dtype, [&]<class T>() {
    constexpr int kWidth = kFullWidth<T>;
    const bool aligned =
        are_aligned<T>(p.logits, p.stride, p.width) && are_aligned<T>(p.y, p.width, p.width);
    const auto kernel = aligned ? softcap_kernel<T, kWidth> : softcap_kernel<T, 1>;
    launch_elementwise(device, "softcap", kernel, p.rows, aligned ? p.width / kWidth : p.width, p);
  });
}

}  // namespace gemma4
