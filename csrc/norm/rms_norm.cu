#include "rms_norm.cuh"

#include "row_plan.h"

namespace gemma4 {

void rms_norm(const RmsNormParams& p, const DTypes& dtypes, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_types(dtypes, [&]<class T, class, class W>() {
    const bool in_pieces = in_pieces_of_16<T>(p.x, p.x_stride, p.width) &&
                           in_pieces_of_16<W>(p.weight, 0, p.width) &&
                           in_pieces_of_16<T>(p.y, p.width, p.width);
    const RowPlan plan = plan_rows<T>(p.rows, p.width, in_pieces, device);
    if (plan.pieces == 0)
      return launch(device, "rms_norm", rms_norm_ragged_kernel<T, W>, plan.blocks, plan.threads,
                    sizeof(BlockSum), p);
    with_pieces(plan, [&]<int kPieces>() {
      launch(device, "rms_norm", rms_norm_kernel<T, W, kPieces>, plan.blocks, plan.threads,
             sizeof(BlockSum), p);
    });
  });
}

}  // namespace gemma4
