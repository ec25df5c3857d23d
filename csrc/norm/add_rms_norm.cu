#include "add_rms_norm.cuh"

#include "row_plan.h"

namespace gemma4 {

void add_rms_norm(const AddRmsNormParams& p, const DTypes& dtypes, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_types(dtypes, [&]<class T, class R, class W>() {
    bool aligned = are_aligned<T>(p.x, p.x_stride, p.width) &&
                   are_aligned<R>(p.residual, p.residual_stride, p.width);
    for (const void* result : {p.new_residual, p.y})
      aligned = aligned && are_aligned<R>(result, p.width, p.width);
    for (const void* weight : {p.post_weight, p.next_weight})
      aligned = aligned && are_aligned<W>(weight, p.width, p.width);
    launch_rows<T, R>(device, "add_rms_norm", p, aligned,
                      []<int kVectors>() { return add_rms_norm_kernel<T, R, W, kVectors>; });
  });
}

}  // namespace gemma4
