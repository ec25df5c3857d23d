// How the experts are launched. `with(weight, f)` calls f with the type that kernels are told of a
// weight: moe_experts.cu knows the dense ones, moe_experts_packed.cu the packed ones, so that they
// are compiled beside each other.
#pragma once

#include "moe_stream.cuh"
#include "moe_tiles.cuh"

namespace gemma4 {

// Eight tokens fill one column block, whatever they choose; up to 32 of an expert's share a load.
using SmallBatch = MoeBatch<8, kMostSmallAssignments>;
using MediumBatch = MoeBatch<32, 1024>;

inline bool is_small(int64_t tokens, int64_t k) {
  return tokens <= SmallBatch::kTokens && tokens * k <= SmallBatch::kAssignments;
}

// One that is dependent waits by itself, and so may start early behind a launch that lets it.
template <class T, class W, class Batch>
void launch_down(const char* name, bool dependent, const MoeExpertsParams& p,
                 const Device& device) {
  launch(device, name, moe_stream_down_kernel<T, W, Batch>,
         {.grid = ceil_div(p.width, kStreamRows),
          .block = kStreamWarps * 32,
          .smem_bytes = sizeof(DownSmem<Batch>),
          .dependent = dependent},
         p);
}

template <class T, class With>
void launch_small_down(const MoeExpertsParams& p, const Device& device, With&& with) {
  with(p.down, [&]<class W>() {
    const auto run = [&]<class Batch>() {
      launch_down<T, W, Batch>("moe_experts_small, down", true, p, device);
    };
    if (p.tokens <= SmallBatch::kTokens) return run.template operator()<SmallBatch>();
    run.template operator()<MoeBatch<2 * SmallBatch::kTokens, SmallBatch::kAssignments>>();
  });
}

template <class T, class Batch, class With>
void launch_streamed(const MoeExpertsParams& p, const Device& device, With&& with) {
  // At most kAssignments tiles.
  const Grid grid(ceil_div(p.hidden_width, kStreamRows), most_moe_tiles(p, Batch::kTokens));
  with(p.gate_up, [&]<class W>() {
    launch(device, "moe_experts, stream of gate_up", moe_stream_gate_up_kernel<T, W, Batch>, grid,
           kStreamWarps * 32, sizeof(GateUpSmem<T, Batch>), p);
  });
  with(p.down, [&]<class W>() {
    launch_down<T, W, Batch>("moe_experts, stream of down", false, p, device);
  });
}

template <class T, int kRows, class With>
void launch_tiled(const MoeExpertsParams& p, const Device& device, With&& with) {
  const int64_t row_tiles = most_moe_tiles(p, kRows);
  with(p.gate_up, [&]<class W>() {
    launch(device, "moe_experts, tiles of gate_up", moe_tiles_kernel<T, W, kRows, true>,
           row_tiles * ceil_div(p.hidden_width, kTileWeightRows / 2), kTileThreads,
           sizeof(MoeTilesSmem<T, kRows>), p);
  });
  with(p.down, [&]<class W>() {
    launch(device, "moe_experts, tiles of down", moe_tiles_kernel<T, W, kRows, false>,
           row_tiles * ceil_div(p.width, kTileWeightRows), kTileThreads,
           sizeof(MoeTilesSmem<T, kRows>), p);
  });
}

// The two products, over assignments that are sorted: in tiles of 64 rows if they suffice for most
// experts, else of kManyRows.
template <class T, int kManyRows, class With>
void launch_products(const MoeExpertsParams& p, const Device& device, With&& with) {
  if (is_small(p.tokens, p.k))
    launch_streamed<T, SmallBatch>(p, device, with);
  else if (moe_experts_streams(p.tokens, p.k, p.num_experts))
    launch_streamed<T, MediumBatch>(p, device, with);
  else if (int64_t{p.tokens} * p.k <= int64_t{64} * p.num_experts)
    launch_tiled<T, 64>(p, device, with);
  else
    launch_tiled<T, kManyRows>(p, device, with);
}

}  // namespace gemma4
