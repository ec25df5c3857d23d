#include "moe_stream.cuh"
#include "moe_tiles.cuh"

namespace gemma4 {

namespace {

// Eight tokens fill one column block, whatever they choose; up to 32 of an expert's share a load.
using SmallBatch = MoeBatch<8, kMostSmallAssignments>;
using MediumBatch = MoeBatch<32, 1024>;

bool is_small(int64_t tokens, int64_t k) {
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

template <class T, class W, class Batch>
void launch_gate_up(const MoeExpertsParams& p, const Device& device) {
  // At most kAssignments tiles.
  const Grid grid(ceil_div(p.hidden_width, kStreamRows), most_moe_tiles(p, Batch::kTokens));
  launch(device, "moe_experts, stream of gate_up", moe_stream_gate_up_kernel<T, W, Batch>, grid,
         kStreamWarps * 32, sizeof(GateUpSmem<T, Batch>), p);
}

// Calls f with what WeightRows is told of a weight.
template <class T, class F>
void with_weight(const MoeExpertsParams& p, const PackedWeight& weight, DType dtype, F&& f) {
  if (p.packed)
    bits_of(weight.numbers) == 4 ? f.template operator()<Packed<4>>()
                                 : f.template operator()<Packed<8>>();
  else
    dtype == DType::kFloat32 ? f.template operator()<float>() : f.template operator()<T>();
}

template <class T, class W, int kRows>
void launch_tiled(const MoeExpertsParams& p, const Device& device) {
  const int64_t row_tiles = most_moe_tiles(p, kRows);
  launch(device, "moe_experts, tiles of gate_up", moe_tiles_kernel<T, W, kRows, true>,
         row_tiles * ceil_div(p.hidden_width, kTileWeightRows / 2), kTileThreads,
         sizeof(MoeTilesSmem<T, kRows>), p);
  launch(device, "moe_experts, tiles of down", moe_tiles_kernel<T, W, kRows, false>,
         row_tiles * ceil_div(p.width, kTileWeightRows), kTileThreads,
         sizeof(MoeTilesSmem<T, kRows>), p);
  launch_elementwise(device, "moe_experts, combine", moe_combine_kernel<T>, p.tokens, p.width / 8,
                     p);
}

}  // namespace

bool moe_experts_streams(int64_t tokens, int64_t k, int64_t num_experts) {
  const int64_t assignments = tokens * k;
  return is_small(tokens, k) ||
         (assignments <= MediumBatch::kAssignments && assignments <= 8 * num_experts);
}

void moe_experts_small_down(const MoeExpertsParams& p, DType dtype, const Device& device) {
  const auto run = [&]<class T, class Batch>() {
    with_weight<T>(p, p.down, dtype, [&]<class W>() {
      if constexpr (!std::is_same_v<W, float>)
        launch_down<T, W, Batch>("moe_experts_small, down", true, p, device);
    });
  };
  with_half_type("moe_experts_small", dtype, [&]<class T>() {
    if (p.tokens <= SmallBatch::kTokens) return run.template operator()<T, SmallBatch>();
    run.template operator()<T, MoeBatch<2 * SmallBatch::kTokens, SmallBatch::kAssignments>>();
  });
}

void moe_experts(const MoeExpertsParams& p, const DTypes& dtypes, const Device& device) {
  const int64_t assignments = int64_t{p.tokens} * p.k;
  if (p.tokens == 0 || p.width == 0) return;
  if (assignments == 0 || p.num_experts == 0 || p.hidden_width == 0) {
    clear(device, "moe_experts", p.y, size_t{2} * p.tokens * p.width);
    return;
  }
  const int threads = assignments < 1024 ? round_up(static_cast<int>(assignments), 32) : 1024;
  launch(device, "moe_experts, sort", moe_sort_kernel<>, p.num_experts, threads,
         sizeof(MoeSortSmem), p);
  with_half_type("moe_experts", dtypes.x, [&]<class T>() {
    const auto stream = [&]<class Batch>() {
      with_weight<T>(p, p.gate_up, dtypes.weight,
                     [&]<class W>() { launch_gate_up<T, W, Batch>(p, device); });
      with_weight<T>(p, p.down, dtypes.weight, [&]<class W>() {
        launch_down<T, W, Batch>("moe_experts, stream of down", false, p, device);
      });
    };
    if (is_small(p.tokens, p.k)) return stream.template operator()<SmallBatch>();
    if (moe_experts_streams(p.tokens, p.k, p.num_experts))
      return stream.template operator()<MediumBatch>();
    const auto tiles = [&]<class W>() {
      assignments <= int64_t{64} * p.num_experts ? launch_tiled<T, W, 64>(p, device)
                                                 : launch_tiled<T, W, 128>(p, device);
    };
    dtypes.weight == DType::kFloat32 ? tiles.template operator()<float>()
                                     : tiles.template operator()<T>();
  });
}

}  // namespace gemma4
