#include "geglu.cuh"

#include "../common/pieces.h"

namespace gemma4 {

void geglu(const GegluParams& p, DType dtype, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_type(dtype, [&]<class T>() {
    const bool aligned =
        are_aligned<T>(p.gate_up, p.stride, p.width) && are_aligned<T>(p.y, p.width, p.width);
    const auto kernel = aligned ? geglu_kernel<T, kFullWidth<T>> : geglu_kernel<T, 1>;
    const PiecePlan plan = plan_pieces(p.rows, aligned ? p.width / kFullWidth<T> : p.width);
    launch(device, "geglu", kernel, plan.grid, plan.block, 0, p);
  });
}

}  // namespace gemma4
