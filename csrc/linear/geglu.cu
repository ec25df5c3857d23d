#include "geglu.cuh"

#include "../common/pieces.h"

namespace gemma4 {

void geglu(const GegluParams& p, DType dtype, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_type(dtype, [&]<class T>() {
    const bool in_pieces = in_pieces_of_16<T>(p.gate_up, p.stride, p.width) &&
                           in_pieces_of_16<T>(p.y, p.width, p.width);
    const auto kernel = in_pieces ? geglu_kernel<T, kFullWidth<T>> : geglu_kernel<T, 1>;
    const PiecePlan plan = plan_pieces(p.rows, in_pieces ? p.width / kFullWidth<T> : p.width);
    launch(device, "geglu", kernel, plan.grid, plan.block, 0, p);
  });
}

}  // namespace gemma4
