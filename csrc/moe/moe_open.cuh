// What a layer with experts makes of r = residual + rms_norm(x) post_weight, for up to 16 tokens:
// hidden = geglu(rms_norm(r) norm_weight gate_upᵀ), the dense branch; logits = router_x routerᵀ,
// router_x = rms_norm(r) scale width^-½ being rounded after each product, as in moe_norm.cuh; and
// expert_x = rms_norm(r) expert_weight, which the experts read.
//
// As in linear_small.cuh, of two weights: the first `dense_blocks` blocks own tiles of gate_up,
// which may be packed, the others tiles of the router's rows. A block makes r for itself and keeps
// one a, its own branch's. The first block stores r, the router's first expert_x.
//
// Shared memory: sizeof(LinearSmallSmem) and a. Bound: the weights, from DRAM.
#pragma once

#include "../common/launch.h"
#include "../linear/linear_small_packed.cuh"
#include "ops.h"

namespace gemma4 {

template <class T, class W>
__global__ void __launch_bounds__(kLinearThreads, 2)
    moe_open_kernel(const __grid_constant__ MoeOpenParams p) {
  ptx::let_next_kernel_start();
  auto& smem = shared_memory<LinearSmallSmem<2>>();
  const bool routes = blockIdx.x >= p.dense_blocks;
  const int rows = routes ? p.num_experts : p.rows;
  const int first = static_cast<int>(routes ? blockIdx.x - p.dense_blocks : blockIdx.x);
  const int step = static_cast<int>(routes ? gridDim.x - p.dense_blocks : p.dense_blocks);
  T* a = reinterpret_cast<T*>(&smem + 1);
  const auto open = [&] {
    open_branch(p, a, smem.sum, [&](int token, int column, auto& y, float scale) {
      if (!routes) return scale_by(y, scale, p.norm_weight, column);
      if (blockIdx.x == p.dense_blocks) {
        auto expert_x = y;
        scale_by(expert_x, scale, p.expert_weight, column);
        store(static_cast<T*>(p.expert_x) + int64_t{token} * p.width + column, expert_x);
      }
      const auto s = load<8>(static_cast<const T*>(p.router_scale) + column);
#pragma unroll
      for (int j = 0; j < y.kWidth; j++) {
        y.set(j, y[j] * scale);
        y.set(j, y[j] * s[j]);
        y.set(j, y[j] * p.factor);
      }
    });
    return tokens_at(p, a);
  };
  if constexpr (kBitsOf<W> != 0) {
    if (!routes) {
      const int row_tiles = rows / kPackedRows;
      const PackedTiles tiles{.weight = p.gate_up,
                              .next = 1,
                              .next_set = row_tiles,
                              .lines = p.width / kPackedColumns,
                              .tiles = row_tiles,
                              .first = first,
                              .step = step};
      const auto finish = [&](int tile, int eight, const float4(&total)[2]) {
        const int row = tile * kPackedRows;
        write_lane_rows<T>(p.hidden, p.tokens, rows, eight, row,
                           gated<T>(scale_rows(p.gate_up, row, total[0]),
                                    scale_rows(p.gate_up, rows + row, total[1])));
      };
      return multiply_packed_tiles<T, kBitsOf<W>>(tiles, p.tokens, smem, open, finish);
    }
  }
  // Of the router's rows 16 a tile, or 8 where they are not whole tiles.
  const int sets = routes && rows % 16 != 0 ? 1 : 2, tile_rows = routes ? sets * 8 : 8;
  const WeightTiles<T> tiles{.weight = static_cast<const T*>(routes ? p.router : p.gate_up.codes),
                             .next_set = int64_t{routes ? 8 : rows} * p.width,
                             .width = p.width,
                             .tiles = rows / tile_rows,
                             .tile_rows = tile_rows,
                             .sets = sets,
                             .first = first,
                             .step = step};
  multiply_tiles(tiles, smem, open, [&](int tile, const float4(&total)[2]) {
    if (!routes)
      return write_rows<T>(p.hidden, p.tokens, rows, tile * 8, gated<T>(total[0], total[1]));
#pragma unroll
    for (int set = 0; set < 2; set++)
      if (set < sets)
        write_rows<T>(p.logits, p.tokens, rows, tile * tile_rows + set * 8, total[set]);
  });
}

// `tiles` of gate_up's rows.
template <class T, class W>
void launch_moe_open(MoeOpenParams p, int tiles, const Device& device) {
  p.a_stride = padded_row(p.width);
  const int router_tiles = p.num_experts / (p.num_experts % 16 == 0 ? 16 : 8);
  // As many blocks as are resident at once, of which the router has one a tile.
  const int resident = 2 * device.sm_count;
  p.dense_blocks = std::clamp(tiles, 1, std::max(resident - router_tiles, 1));
  launch(device, "moe_open", moe_open_kernel<T, W>,
         {.grid = p.dense_blocks + std::max(router_tiles, 1),
          .block = kLinearThreads,
          .smem_bytes = sizeof(LinearSmallSmem<2>) + sizeof(T) * p.tokens * p.a_stride,
          .dependent = true},
         p);
}

}  // namespace gemma4
