#include "rms_norm.cuh"

#include "row_plan.h"

namespace gemma4 {

void rms_norm(const RmsNormParams& p, const DTypes& dtypes, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_types(dtypes, [&]<class T, class, class W>() {
    const bool aligned = are_aligned<T>(p.x, p.x_stride, p.width) &&
                         are_aligned<W>(p.weight, 0, p.width) &&
                         are_aligned<T>(p.y, p.width, p.width);
    launch_rows<T>(device, "rms_norm", p, aligned,
                   []<int kVectors>() { return rms_norm_kernel<T, W, kVectors>; });
  });
}

}  // namespace gemma4
