// What a layer with experts makes of r = residual + rms_norm(x) post_weight, for up to 16 tokens:
// hidden = geglu(rms_norm(r) norm_weight gate_upᵀ), the dense branch; logits = router_x routerᵀ,
// router_x = rms_norm(r) scale width^-½ being rounded after each product, as in moe_norm.cuh; and
// expert_x = rms_norm(r) expert_weight, which the experts read.
//
// As in linear_small.cuh, of two weights: the first `dense_blocks` blocks own tiles of gate_up, the
// others tiles of the router's rows. A block makes r for itself and keeps one a, its own branch's.
// The first block stores r, the router's first expert_x.
//
// Shared memory: sizeof(LinearSmallSmem) and a. Bound: the weights, from DRAM.
#pragma once

#include "../linear/linear_small.cuh"
#include "ops.h"

namespace gemma4 {

template <class T>
__global__ void __launch_bounds__(kLinearThreads, 2)
    moe_open_kernel(const __grid_constant__ MoeOpenParams p) {
  ptx::let_next_kernel_start();
  auto& smem = shared_memory<LinearSmallSmem<2>>();
  const bool routes = blockIdx.x >= p.dense_blocks;
  const int rows = routes ? p.num_experts : p.rows;
  // Of the router's rows 16 a tile, or 8 where they are not whole tiles.
  const int sets = routes && rows % 16 != 0 ? 1 : 2, tile_rows = routes ? sets * 8 : 8;
  const WeightTiles<T> tiles{
      .weight = static_cast<const T*>(routes ? p.router : p.gate_up),
      .next_set = int64_t{routes ? 8 : rows} * p.width,
      .width = p.width,
      .tiles = rows / tile_rows,
      .tile_rows = tile_rows,
      .sets = sets,
      .first = static_cast<int>(routes ? blockIdx.x - p.dense_blocks : blockIdx.x),
      .step = static_cast<int>(routes ? gridDim.x - p.dense_blocks : p.dense_blocks)};
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
  multiply_tiles(tiles, smem, open, [&](int tile, const float4(&total)[2]) {
    if (!routes)
      return write_rows<T>(p.hidden, p.tokens, rows, tile * 8, gated<T>(total[0], total[1]));
#pragma unroll
    for (int set = 0; set < 2; set++)
      if (set < sets)
        write_rows<T>(p.logits, p.tokens, rows, tile * tile_rows + set * 8, total[set]);
  });
}

}  // namespace gemma4
