#include "moe_open.cuh"

namespace gemma4 {

void moe_open(MoeOpenParams p, DType dtype, const Device& device) {
  if (p.tokens == 0) return;
  if (p.packed) return moe_open_packed(p, dtype, device);
  with_half_type("moe_open", dtype,
                 [&]<class T>() { launch_moe_open<T, T>(p, p.rows / 8, device); });
}

}  // namespace gemma4
