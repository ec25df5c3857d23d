#include "ple_gate.cuh"

#include "../common/pieces.h"

namespace gemma4 {

void ple_gate(const PleGateParams& p, DType dtype, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_type(dtype, [&]<class T>() {
    const bool in_pieces = in_pieces_of_16<T>(p.gate, p.gate_stride, p.width) &&
                           in_pieces_of_16<T>(p.ple, p.ple_stride, p.width) &&
                           in_pieces_of_16<T>(p.y, p.width, p.width);
    const auto kernel = in_pieces ? ple_gate_kernel<T, kFullWidth<T>> : ple_gate_kernel<T, 1>;
    const PiecePlan plan = plan_pieces(p.rows, in_pieces ? p.width / kFullWidth<T> : p.width);
    launch(device, "ple_gate", kernel, plan.grid, plan.block, 0, p);
  });
}

}  // namespace gemma4
