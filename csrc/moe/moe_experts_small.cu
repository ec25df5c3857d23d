#include "moe_experts_small.cuh"

namespace gemma4 {

void moe_experts_small(MoeExpertsSmallParams p, DType dtype, const Device& device) {
  if (p.tokens == 0) return;
  p.dense_blocks = p.width / (p.width % 16 == 0 ? 16 : 8);
  p.experts = {p.chosen, false};
  p.weights = {p.chosen_weights, DType::kFloat32};
  if (p.packed)
    moe_experts_small_packed(p, dtype, device);
  else
    with_half_type("moe_experts_small", dtype,
                   [&]<class T>() { launch_small_gate_up<T, T>(p, device); });
  moe_experts_small_down(p, dtype, device);
}

}  // namespace gemma4
