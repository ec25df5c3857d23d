#include "add_rms_norm.cuh"

#include "row_plan.h"

namespace gemma4 {

void add_rms_norm(const AddRmsNormParams& p, DType dtype, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_type(dtype, [&]<class T>() {
    bool in_pieces = in_pieces_of_16<T>(p.x, p.x_stride, p.width) &&
                     in_pieces_of_16<T>(p.residual, p.residual_stride, p.width);
    for (const void* dense :
         {p.post_weight, p.next_weight, static_cast<const void*>(p.new_residual),
          static_cast<const void*>(p.y)})
      in_pieces = in_pieces && in_pieces_of_16<T>(dense, p.width, p.width);
    const RowPlan plan = plan_rows<T>(p.rows, p.width, in_pieces, device);
    if (plan.pieces == 0)
      return launch(device, "add_rms_norm", add_rms_norm_ragged_kernel<T>, plan.blocks,
                    plan.threads, sizeof(BlockSum), p);
    with_pieces(plan, [&]<int kPieces>() {
      launch(device, "add_rms_norm", add_rms_norm_kernel<T, kPieces>, plan.blocks, plan.threads,
             sizeof(BlockSum), p);
    });
  });
}

}  // namespace gemma4
