// Gradients of the experts. With gate, up = gate_up x of an assignment (a token, an expert and its
// routing weight), hidden = gelu(gate) up, and dy the gradient of the token's y:
//
//   d_hidden = downᵀ dy;   d_weight = <hidden, d_hidden>, which is <down hidden, dy>
//   (d_gate, d_up) = weight d_hidden through GEGLU
//   dx = Σ_k gate_upᵀ (d_gate, d_up);   d_gate_up = Σ (d_gate, d_up) xᵀ
//   d_down = Σ dy (weight hidden)ᵀ, the last two over an expert's assignments
//
// moe_hidden_gradient_kernel makes the first two lines of a tile of 128 assignments and 64 hidden
// columns: of gate and up, made again, 16 bits stay in registers while d_hidden is summed, and
// nothing between the products meets memory. Of d_weight it leaves a part a tile, which
// moe_routing_gradient_kernel adds up.
// moe_tiles_kernel multiplies by gate_upᵀ and moe_combine_kernel adds the slots in their order.
// moe_weight_gradient_kernel makes a tile of 128 x 128 of an expert's weight, whole: sums over the
// expert's assignments, however many, so that no two blocks add to one number. An expert that
// nobody chose gets its zeros there, so that each weight's gradient is written once.
//
// Products are those of linear/tiles.cuh, of operands of which the first product transposes none,
// those with downᵀ and gate_upᵀ the weight, and the weights' gradients both. Shared memory:
// sizeof(ProductTiles), and what is known of rows. Bound: as the forward's tiles, L2 and tensor
// cores: eight products of F D an assignment for the forward's three, five where experts are
// frozen. Two of them make gate and up again. To keep these would take 4 F bytes an assignment
// until the backward comes, 5.5 GB of 26B's layers at 8,192 tokens, and save 2 of a step's 11
// products, or 8.
#pragma once

#include "moe_tiles.cuh"

namespace gemma4 {

constexpr int kGradientRows = 128;

template <class T>
struct MoeHiddenSmem {
  union {
    ProductTiles<T, kGradientRows> tiles;
    struct {  // at the end
      T pair[kGradientRows * 2 * kMoeHiddenColumns], hidden[kGradientRows * kMoeHiddenColumns];
    };
  };
  int source[kGradientRows];  // the token
  float weight[kGradientRows];
};

template <class T, class W>
__global__ void __launch_bounds__(kTileThreads)
    moe_hidden_gradient_kernel(const __grid_constant__ MoeExpertsBackwardParams p) {
  constexpr int kRows = kGradientRows, kColumns = kMoeHiddenColumns;
  auto& smem = shared_memory<MoeHiddenSmem<T>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column_tile = blockIdx.x % p.hidden_tiles, first = column_tile * kColumns;
  const MoeTile tile = moe_tile(p.offsets, p.num_experts, blockIdx.x / p.hidden_tiles, kRows);
  if (tile.rows == 0) return;

  for (int i = threadIdx.x; i < tile.rows; i += kTileThreads) {
    const int assignment = p.order[tile.begin + i];
    smem.source[i] = assignment / p.k;
    smem.weight[i] = float_at(p.weights, assignment);
  }
  __syncthreads();

  const int steps = (p.width + kTileColumns - 1) / kTileColumns;
  const auto stages = [&](const void* rows, int64_t stride, auto& weights) {
    return [&, rows, stride](auto& stage, int step) {
      const int column = step * kTileColumns;
      copy_rows<kTileColumns, kRows, kTileThreads>(
          stage.x,
          [&](int row) {
            const int64_t source = smem.source[min(row, tile.rows - 1)];
            return SourceRow<T>{static_cast<const T*>(rows) + source * stride + column,
                                row < tile.rows};
          },
          p.width - column);
      weights.load(stage.weight, step);
    };
  };
  uint32_t pairs[kRows / 64][16][2];  // of gate, then of up
  {
    float sum[kRows / 64][16][4] = {};
    StageWeights<T, W, true> weights(p.gate_up, tile.expert, first, p.hidden_width, p.width);
    multiply_stages(sum, smem.tiles, steps, tile.rows, stages(p.x, p.x_stride, weights));
#pragma unroll
    for (int i = 0; i < kRows / 64; i++)
#pragma unroll
      for (int n = 0; n < 16; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          pairs[i][n][half] =
              pack_pair<T>(saturate<T>(sum[i][n][2 * half]), saturate<T>(sum[i][n][2 * half + 1]));
    // Or compilers keep the halves apart until they are used, in a register each.
    ptx::fence_operand(pairs);
  }
  float d_hidden[kRows / 64][8][4] = {};
  TransposedWeights<T, W, kColumns> weights(p.down, tile.expert, first, p.hidden_width, p.width);
  multiply_stages<false, true>(d_hidden, smem.tiles, steps, tile.rows,
                               stages(p.grad, p.grad_stride, weights));

#pragma unroll
  for (int i = 0; i < kRows / 64; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = i * 64 + warp * 16 + lane / 4 + half * 8;
      const float weight = smem.weight[min(row, tile.rows - 1)];
      float d_weight = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        T gate[2], up[2];
        __builtin_memcpy(gate, &pairs[i][n][half], 4);
        __builtin_memcpy(up, &pairs[i][n + 8][half], 4);
        GatedGradient of[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float d = d_hidden[i][n][2 * half + e];
          of[e] = gated_gradient<T>(to_float(gate[e]), to_float(up[e]), weight * d);
          d_weight += of[e].product * d;
        }
        const auto put = [&](T* out, int chunk, float low, float high) {
          T* to = out + chunk_offset<kRows>(row, chunk) + lane % 4 * 2;
          *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(low, high);
        };
        put(smem.pair, n, of[0].d_gate, of[1].d_gate);
        put(smem.pair, n + 8, of[0].d_other, of[1].d_other);
        put(smem.hidden, n, weight * of[0].product, weight * of[1].product);
      }
      d_weight += __shfl_xor_sync(0xffffffffu, d_weight, 1);
      d_weight += __shfl_xor_sync(0xffffffffu, d_weight, 2);
      if (p.d_parts && lane % 4 == 0 && row < tile.rows)
        p.d_parts[int64_t{column_tile} * p.tokens * p.k + tile.begin + row] = d_weight;
    }
  __syncthreads();
  const auto store = [&](const T* made, void* out, int columns, int from) {
    if (!out) return;
    store_tile<kRows, kColumns>(made, tile.rows, p.hidden_width - first, [&](int row, int chunk) {
      return static_cast<T*>(out) + int64_t{tile.begin + row} * columns + from + first + chunk * 8;
    });
  };
  store(smem.pair, p.d_pair, 2 * p.hidden_width, 0);
  store(smem.pair + kRows * kColumns, p.d_pair, 2 * p.hidden_width, p.hidden_width);
  store(smem.hidden, p.hidden, p.hidden_width, 0);
}

// Rows that belong to assignments: of tokens, or sorted.
struct MoeRows {
  const void* data;
  int64_t stride;
  bool of_tokens;
};

// out[e] = Σ a bᵀ over the rows of e's assignments.
struct MoeWeightGradientParams {
  MoeRows a, b;
  void* out;  // [E, height, width]
  const int32_t *offsets, *order;
  Divisor k;
  int height, width;
};

constexpr int kSourceStages = 4;

template <class T>
struct MoeWeightGradientSmem {
  ProductTiles<T, kGradientRows> tiles;
  int source[kSourceStages][kTileColumns];  // the token
};

template <class T, class W>
__global__ void __launch_bounds__(kTileThreads)
    moe_weight_gradient_kernel(const __grid_constant__ MoeWeightGradientParams p) {
  constexpr int kRows = kGradientRows, kColumns = kTileWeightRows;
  auto& smem = shared_memory<MoeWeightGradientSmem<T>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column_tiles = (p.width + kColumns - 1) / kColumns;
  const int row_tiles = (p.height + kRows - 1) / kRows;
  const int first_column = blockIdx.x % column_tiles * kColumns;
  const int first_row = blockIdx.x / column_tiles % row_tiles * kRows;
  const int expert = blockIdx.x / column_tiles / row_tiles;
  const int rows = min(kRows, p.height - first_row);
  const int begin = p.offsets[expert], count = p.offsets[expert + 1] - begin;
  const int steps = (count + kTileColumns - 1) / kTileColumns;

  // A stage's tokens are there two stages ahead, and looked up a stage before that.
  const auto token_of = [&](int step) {
    const int i = step * kTileColumns + static_cast<int>(threadIdx.x);
    return threadIdx.x < kTileColumns && i < count ? p.order[begin + i] / p.k : 0;
  };
  const auto keep_token = [&](int step, int token) {
    if (threadIdx.x < kTileColumns) smem.source[step % kSourceStages][threadIdx.x] = token;
  };
  for (int step = 0; step < kTileStages - 1; step++) keep_token(step, token_of(step));
  int ahead = token_of(kTileStages - 1);
  __syncthreads();
  const auto load_stage = [&](auto& stage, int step) {
    const auto rows_of = [&](const MoeRows& of, int first) {
      return [&, first](int row) {
        const int i = step * kTileColumns + row;
        const int64_t from =
            of.of_tokens ? smem.source[step % kSourceStages][row] : begin + min(i, count - 1);
        return SourceRow<T>{static_cast<const T*>(of.data) + from * of.stride + first, i < count};
      };
    };
    copy_rows<kRows, kTileColumns, kTileThreads>(stage.x, rows_of(p.a, first_row),
                                                 p.height - first_row);
    copy_rows<kColumns, kTileColumns, kTileThreads>(stage.weight, rows_of(p.b, first_column),
                                                    p.width - first_column);
    keep_token(step + kTileStages - 1, ahead);
    ahead = token_of(step + kTileStages);
  };
  float sum[kRows / 64][16][4] = {};
  multiply_stages<true, true>(sum, smem.tiles, steps, rows, load_stage);

  W* out = static_cast<W*>(p.out) + int64_t{expert} * p.height * p.width;
#pragma unroll
  for (int i = 0; i < kRows / 64; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = i * 64 + warp * 16 + lane / 4 + half * 8;
#pragma unroll
      for (int n = 0; n < kColumns / 8; n++) {
        const float low = sum[i][n][2 * half], high = sum[i][n][2 * half + 1];
        if constexpr (std::is_same_v<T, W>) {
          T* to = smem.tiles.out + chunk_offset<kRows>(row, n) + lane % 4 * 2;
          *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(low, high);
        } else {  // four lanes write a sector
          const int column = first_column + n * 8 + lane % 4 * 2;
          if (row < rows && column < p.width) {
            const float2 two{low, high};
            uint2 bits;
            __builtin_memcpy(&bits, &two, 8);
            ptx::store_8(out + int64_t{first_row + row} * p.width + column, bits);
          }
        }
      }
    }
  if constexpr (std::is_same_v<T, W>) {
    __syncthreads();
    store_tile<kRows, kColumns>(
        smem.tiles.out, rows, p.width - first_column, [&](int row, int chunk) {
          return out + int64_t{first_row + row} * p.width + first_column + chunk * 8;
        });
  }
}

// d_weights, of zeros before, = the sums of the parts, in their order. A thread, an assignment.
// Bound: 4 bytes of DRAM a part.
constexpr int kSumThreads = 256;
template <int = 0>
__global__ void __launch_bounds__(kSumThreads)
    moe_routing_gradient_kernel(const __grid_constant__ MoeExpertsBackwardParams p) {
  const int64_t all = int64_t{p.tokens} * p.k;
  const int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (i >= p.offsets[p.num_experts]) return;
  float sum = 0.0f;
  for (int tile = 0; tile < p.hidden_tiles; tile++) sum += p.d_parts[tile * all + i];
  p.d_weights[p.order[i]] = sum;
}

}  // namespace gemma4
