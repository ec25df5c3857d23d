#include "softcap_cross_entropy.cuh"

#include "../common/launch.h"

namespace gemma4 {

void softcap_cross_entropy(const CrossEntropyParams& p, DType dtype, const Device& device) {
  if (p.rows == 0) return;
  with_type(dtype, [&]<class T>() {
    const bool aligned = are_aligned<T>(p.logits, p.stride, p.width);
    const auto kernel = aligned ? softcap_cross_entropy_kernel<T, kFullWidth<T>>
                                : softcap_cross_entropy_kernel<T, 1>;
    launch(device, "softcap_cross_entropy", kernel, p.rows, kCrossEntropyThreads,
           sizeof(BlockLogSum), p);
  });
}

}  // namespace gemma4
