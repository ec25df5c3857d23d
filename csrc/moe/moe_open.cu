#include "moe_open.cuh"

#include "../common/launch.h"

namespace gemma4 {

void moe_open(MoeOpenParams p, DType dtype, const Device& device) {
  if (p.tokens == 0) return;
  p.a_stride = padded_row(p.width);
  const int router_tiles = p.num_experts / (p.num_experts % 16 == 0 ? 16 : 8);
  // As many blocks as are resident at once, of which the router has one a tile.
  const int dense_tiles = p.rows / 8, resident = 2 * device.sm_count;
  p.dense_blocks = std::clamp(dense_tiles, 1, std::max(resident - router_tiles, 1));
  with_half_type("moe_open", dtype, [&]<class T>() {
    launch(device, "moe_open", moe_open_kernel<T>,
           {.grid = p.dense_blocks + std::max(router_tiles, 1),
            .block = kLinearThreads,
            .smem_bytes = sizeof(LinearSmallSmem<2>) + sizeof(T) * p.tokens * p.a_stride,
            .dependent = true},
           p);
  });
}

}  // namespace gemma4
