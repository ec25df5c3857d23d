#include "moe_experts_small.cuh"

namespace gemma4 {

void moe_experts_small_packed(const MoeExpertsSmallParams& p, DType dtype, const Device& device) {
  with_half_type("moe_experts_small", dtype, [&]<class T>() {
    bits_of(p.gate_up.numbers) == 4 ? launch_small_gate_up<T, Bits<4>>(p, device)
                                    : launch_small_gate_up<T, Bits<8>>(p, device);
  });
}

}  // namespace gemma4
