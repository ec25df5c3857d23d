#include "moe_norm.cuh"

#include "row_plan.h"

namespace gemma4 {

void moe_norm(const MoeNormParams& p, DType dtype, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_type(dtype, [&]<class T>() {
    bool in_pieces = in_pieces_of_16<T>(p.x, p.x_stride, p.width);
    for (const void* dense :
         {p.weight, p.scale, static_cast<const void*>(p.y), static_cast<const void*>(p.router_x)})
      in_pieces = in_pieces && in_pieces_of_16<T>(dense, p.width, p.width);
    const RowPlan plan = plan_rows<T>(p.rows, p.width, in_pieces, device);
    if (plan.pieces == 0)
      return launch(device, "moe_norm", moe_norm_ragged_kernel<T>, plan.blocks, plan.threads,
                    sizeof(BlockSum), p);
    with_pieces(plan, [&]<int kPieces>() {
      launch(device, "moe_norm", moe_norm_kernel<T, kPieces>, plan.blocks, plan.threads,
             sizeof(BlockSum), p);
    });
  });
}

}  // namespace gemma4
