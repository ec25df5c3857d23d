#include "rms_norm.cuh"

#include "row_plan.h"

namespace gemma4 {

void rms_norm(const RmsNormParams& p, DType dtype, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_type(dtype, [&]<class T>() {
    const bool in_pieces = in_pieces_of_16<T>(p.x, p.x_stride, p.width) &&
                           in_pieces_of_16<T>(p.weight, 0, p.width) &&
                           in_pieces_of_16<T>(p.y, p.width, p.width);
    const RowPlan plan = plan_rows<T>(p.rows, p.width, in_pieces, device);
    if (plan.pieces == 0)
      return launch(device, "rms_norm", rms_norm_ragged_kernel<T>, plan.blocks, plan.threads,
                    sizeof(BlockSum), p);
    with_pieces(plan, [&]<int kPieces>() {
      launch(device, "rms_norm", rms_norm_kernel<T, kPieces>, plan.blocks, plan.threads,
             sizeof(BlockSum), p);
    });
  });
}

}  // namespace gemma4
