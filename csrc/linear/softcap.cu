#include "softcap.cuh"

#include "../common/pieces.h"

namespace gemma4 {

void softcap(const SoftcapParams& p, DType dtype, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_type(dtype, [&]<class T>() {
    const bool aligned =
        are_aligned<T>(p.logits, p.stride, p.width) && are_aligned<T>(p.y, p.width, p.width);
    const auto kernel = aligned ? softcap_kernel<T, kFullWidth<T>> : softcap_kernel<T, 1>;
    const PiecePlan plan = plan_pieces(p.rows, aligned ? p.width / kFullWidth<T> : p.width);
    launch(device, "softcap", kernel, plan.grid, plan.block, 0, p);
  });
}

}  // namespace gemma4
