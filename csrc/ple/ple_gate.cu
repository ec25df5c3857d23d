#include "ple_gate.cuh"

#include "../common/pieces.h"

namespace gemma4 {

void ple_gate(const PleGateParams& p, const DTypes& dtypes, const Device& device) {
  if (p.rows == 0 || p.width == 0) return;
  with_types(dtypes, [&]<class T, class R, class>() {
    constexpr int kWidth = kFullWidth<T, R>;
    const bool aligned = are_aligned<T>(p.gate, p.gate_stride, p.width) &&
                         are_aligned<R>(p.ple, p.ple_stride, p.width) &&
                         are_aligned<R>(p.y, p.width, p.width);
    const auto kernel = aligned ? ple_gate_kernel<T, R, kWidth> : ple_gate_kernel<T, R, 1>;
    const PiecePlan plan = plan_pieces(p.rows, aligned ? p.width / kWidth : p.width);
    launch(device, "ple_gate", kernel, plan.grid, plan.block, 0, p);
  });
}

}  // namespace gemma4
