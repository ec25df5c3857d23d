// The experts of up to 16 tokens and the choice among them, beside the dense branch's last product:
// y = Σ_k weight down geglu(gate_up x) of the k largest logits, dense_y = dense_x denseᵀ.
//
// The three weights are all packed or none is. Two launches. The first one's first blocks own 16
// rows of `dense` each, as in linear_small.cuh: they need no choice, so that weights are on their
// way while the others make it. Each of the others makes all of it for itself (moe_route.cuh's a
// warp a token, then the order of moe_sort.cuh by counting), takes its tile and goes on as in
// moe_stream.cuh; the first stores the choice and the order for the second launch, which is
// moe_stream.cuh's `down`.
//
// Shared memory: sizeof(MoeSmallSmem). Bound: the touched experts' weights and `dense`, from DRAM.
#pragma once

#include "../linear/linear_small_packed.cuh"
#include "moe_route.cuh"
#include "moe_stream.cuh"

namespace gemma4 {

static_assert(kLinearThreads == kStreamWarps * 32);

// What moe_sort makes in global memory, and what it reads.
struct MoeChoice {
  int32_t experts[kMostSmallAssignments], order[kMostSmallAssignments];
  float weights[kMostSmallAssignments];
  int32_t offsets[kMostSmallExperts + 1];
};

template <class T, class W, class Batch>
struct MoeSmallSmem {
  MoeChoice choice;
  union {
    GateUpSmem<T, Batch> gate_up;
    LinearSmallSmem<kBitsOf<W> ? 1 : 2> dense;
  };
};

template <class T>
DEVICE void choose(const MoeExpertsSmallParams& p, MoeChoice& choice) {
  const int lane = threadIdx.x % 32, all = p.tokens * p.k;
  for (int token = threadIdx.x / 32; token < p.tokens; token += kStreamWarps) {
    const Route route = route_of_lane<T, kMostSmallExperts / 32>(
        static_cast<const T*>(p.logits) + token * p.logits_stride, p.num_experts, p.k, p.scale);
    if (lane >= p.k) continue;
    choice.experts[token * p.k + lane] = route.expert;
    choice.weights[token * p.k + lane] = route.weight;
  }
  __syncthreads();
  static_assert(kMostSmallExperts < kLinearThreads && kMostSmallAssignments <= kLinearThreads);
  const int i = threadIdx.x, own = i < all ? choice.experts[i] : 0;
  int lower = 0, before = 0;  // assignments to experts below i; those that stand before number i
  for (int a = 0; a < all; a++) {
    const int expert = choice.experts[a];
    lower += expert < i;
    before += expert < own || (expert == own && a < i);
  }
  if (i <= p.num_experts) choice.offsets[i] = lower;
  if (i < all) choice.order[before] = i;
  __syncthreads();
}

// The block's rows of dense_y.
template <class T, class W, class Smem>
DEVICE void multiply_dense(const MoeExpertsSmallParams& p, Smem& smem) {
  const auto open = [&] {
    ptx::wait_for_previous_kernel();
    return [&](int t, int from) {
      return load_fresh_if(t < p.tokens && from < p.dense_width,
                           static_cast<const T*>(p.dense_x) + t * p.dense_stride + from);
    };
  };
  if constexpr (kBitsOf<W> != 0) {
    const PackedTiles tiles{.weight = p.dense,
                            .next = 1,
                            .next_set = 0,
                            .lines = p.dense_width / kPackedColumns,
                            .tiles = p.width / kPackedRows,
                            .first = static_cast<int>(blockIdx.x),
                            .step = p.dense_blocks};
    const auto finish = [&](int tile, int eight, const float4(&total)[1]) {
      const int row = tile * kPackedRows;
      write_lane_rows<T>(p.dense_y, p.tokens, p.width, eight, row,
                         scale_rows(p.dense, row, total[0]));
    };
    multiply_packed_tiles<T, kBitsOf<W>>(tiles, p.tokens, smem, open, finish);
  } else {
    const int sets = p.width % 16 == 0 ? 2 : 1;
    const WeightTiles<T> tiles{.weight = static_cast<const T*>(p.dense.codes),
                               .next_set = int64_t{8} * p.dense_width,
                               .width = p.dense_width,
                               .tiles = p.width / (8 * sets),
                               .tile_rows = 8 * sets,
                               .sets = sets,
                               .first = static_cast<int>(blockIdx.x),
                               .step = p.dense_blocks};
    multiply_tiles(tiles, smem, open, [&](int tile, const float4(&total)[2]) {
#pragma unroll
      for (int set = 0; set < 2; set++)
        if (set < sets)
          write_rows<T>(p.dense_y, p.tokens, p.width, (tile * sets + set) * 8, total[set]);
    });
  }
}

template <class T, class W, class Batch>
__global__ void __launch_bounds__(kStreamWarps * 32, 2)
    moe_small_gate_up_kernel(const __grid_constant__ MoeExpertsSmallParams p) {
  ptx::let_next_kernel_start();
  auto& smem = shared_memory<MoeSmallSmem<T, W, Batch>>();
  const int i = threadIdx.x;
  if (blockIdx.x < p.dense_blocks) return multiply_dense<T, W>(p, smem.dense);
  ptx::wait_for_previous_kernel();
  MoeChoice& choice = smem.choice;
  choose<T>(p, choice);
  const int block = blockIdx.x - p.dense_blocks;
  if (block == 0) {
    if (i < p.tokens * p.k) {
      p.chosen[i] = choice.experts[i], p.order[i] = choice.order[i];
      p.chosen_weights[i] = choice.weights[i];
    }
    if (i <= p.num_experts) p.offsets[i] = choice.offsets[i];
  }
  const int row_blocks = (p.hidden_width + kStreamRows - 1) / kStreamRows;
  const MoeTile tile = moe_tile(choice.offsets, p.num_experts, block / row_blocks, Batch::kTokens);
  if (tile.rows == 0) return;
  stream_gate_up<T, W, Batch>(p, tile, choice.order + tile.begin, block % row_blocks * kStreamRows,
                              smem.gate_up);
}

template <class T, class W>
void launch_small_gate_up(const MoeExpertsSmallParams& p, const Device& device) {
  const auto run = [&]<class Batch>() {
    const int64_t row_blocks = ceil_div(p.hidden_width, kStreamRows);
    launch(device, "moe_experts_small, gate_up", moe_small_gate_up_kernel<T, W, Batch>,
           {.grid = p.dense_blocks + row_blocks * most_moe_tiles(p, Batch::kTokens),
            .block = kStreamWarps * 32,
            .smem_bytes = sizeof(MoeSmallSmem<T, W, Batch>),
            .dependent = true},
           p);
  };
  if (p.tokens <= 8) return run.template operator()<MoeBatch<8, kMostSmallAssignments>>();
  run.template operator()<MoeBatch<16, kMostSmallAssignments>>();
}

}  // namespace gemma4
