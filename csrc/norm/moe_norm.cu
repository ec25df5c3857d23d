#include "moe_norm.cuh"

#include "row_plan.h"

namespace gemma4 {

void moe_norm(const MoeNormParams& p, const DTypes& dtypes, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_types(dtypes, [&]<class T, class R, class W>() {
    const bool aligned =
        are_aligned<T>(p.x, p.x_stride, p.width) && are_aligned<W>(p.weight, p.width, p.width) &&
        are_aligned<W>(p.scale, p.width, p.width) && are_aligned<T>(p.y, p.width, p.width) &&
        are_aligned<R>(p.router_x, p.width, p.width);
    launch_rows<T, R>(device, "moe_norm", p, aligned,
                      []<int kVectors>() { return moe_norm_kernel<T, R, W, kVectors>; });
  });
}

}  // namespace gemma4
