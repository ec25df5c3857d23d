#include "moe_experts_small.cuh"

namespace gemma4 {

void moe_experts_small(MoeExpertsSmallParams p, DType dtype, const Device& device) {
  if (p.tokens == 0) return;
  p.dense_blocks = p.width / (p.width % 16 == 0 ? 16 : 8);
  p.experts = {p.chosen, false};
  p.weights = {p.chosen_weights, DType::kFloat32};
  const auto run = [&]<class T, class Batch>() {
    const int64_t row_blocks = ceil_div(p.hidden_width, kStreamRows);
    launch(device, "moe_experts_small, gate_up", moe_small_gate_up_kernel<T, Batch>,
           {.grid = p.dense_blocks + row_blocks * most_moe_tiles(p, Batch::kTokens),
            .block = kStreamWarps * 32,
            .smem_bytes = sizeof(MoeSmallSmem<T, Batch>),
            .dependent = true},
           p);
  };
  with_half_type("moe_experts_small", dtype, [&]<class T>() {
    if (p.tokens <= 8) return run.template operator()<T, MoeBatch<8, kMostSmallAssignments>>();
    run.template operator()<T, MoeBatch<16, kMostSmallAssignments>>();
  });
  moe_experts_small_down(p, dtype, device);
}

}  // namespace gemma4
