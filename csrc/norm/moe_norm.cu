#include "moe_norm.cuh"

#include "row_plan.h"

namespace gemma4 {

void moe_norm(const MoeNormParams& p, const DTypes& dtypes, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_types(dtypes, [&]<class T, class R, class W>() {
    const bool in_pieces = in_pieces_of_16<T>(p.x, p.x_stride, p.width) &&
                           in_pieces_of_16<W>(p.weight, p.width, p.width) &&
                           in_pieces_of_16<W>(p.scale, p.width, p.width) &&
                           in_pieces_of_16<T>(p.y, p.width, p.width) &&
                           in_pieces_of_16<R>(p.router_x, p.width, p.width);
    const RowPlan plan = plan_rows<T, R>(p.rows, p.width, in_pieces, device);
    if (plan.pieces == 0)
      return launch(device, "moe_norm", moe_norm_ragged_kernel<T, R, W>, plan.blocks, plan.threads,
                    sizeof(BlockSum), p);
    with_pieces(plan, [&]<int kPieces>() {
      launch(device, "moe_norm", moe_norm_kernel<T, R, W, kPieces>, plan.blocks, plan.threads,
             sizeof(BlockSum), p);
    });
  });
}

}  // namespace gemma4
