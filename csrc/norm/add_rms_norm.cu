#include "add_rms_norm.cuh"

#include "row_plan.h"

namespace gemma4 {

void add_rms_norm(const AddRmsNormParams& p, const DTypes& dtypes, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_types(dtypes, [&]<class T, class R, class W>() {
    bool in_pieces = in_pieces_of_16<T>(p.x, p.x_stride, p.width) &&
                     in_pieces_of_16<R>(p.residual, p.residual_stride, p.width);
    for (const void* result : {p.new_residual, p.y})
      in_pieces = in_pieces && in_pieces_of_16<R>(result, p.width, p.width);
    for (const void* weight : {p.post_weight, p.next_weight})
      in_pieces = in_pieces && in_pieces_of_16<W>(weight, p.width, p.width);
    const RowPlan plan = plan_rows<T, R>(p.rows, p.width, in_pieces, device);
    if (plan.pieces == 0)
      return launch(device, "add_rms_norm", add_rms_norm_ragged_kernel<T, R, W>, plan.blocks,
                    plan.threads, sizeof(BlockSum), p);
    with_pieces(plan, [&]<int kPieces>() {
      launch(device, "add_rms_norm", add_rms_norm_kernel<T, R, W, kPieces>, plan.blocks,
             plan.threads, sizeof(BlockSum), p);
    });
  });
}

}  // namespace gemma4
