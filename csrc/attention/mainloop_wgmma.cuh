// The loop over tiles of keys on Hopper, where four warps that own the same columns of 64 rows let
// the tensor cores read tiles where they lie: start_multiply and start_accumulate, whose sums stand
// where those of multiply and accumulate do once they are waited for.
//
// k and v have two stages each, and one barrier an iteration is enough: before it, the next k and
// this v have landed and the partial scores are there; after it, the tiles of the next but one k
// and of the next v are free. The next q kᵀ starts first: it runs under the copies into those two,
// which look up where keys lie, and under this tile's softmax.
#pragma once

#include "products.cuh"

namespace gemma4 {

template <int kHeadDim, int kRows, int kKeys, int kColumnWarps>
struct HopperTile : AttentionTile<kHeadDim, kRows, kKeys, kColumnWarps> {
  static constexpr bool kWgmma = true;
  static constexpr int kStages = 2;
  static_assert(kRows % 64 == 0 && (kKeys == 32 || kKeys == 64));
  static_assert(kHeadDim / kColumnWarps % 128 == 0);
};

// Marks x as warp-uniform, so that descriptions of tiles need no vector registers.
DEVICE int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// multiply, as one group of wgmmas.
template <class Tile, class T>
DEVICE void start_multiply(float (&d)[Tile::kKeys / 8][4], const T* a_tile, const T* b_tile) {
  const int row = warp_uniform(Tile::row() / 64 * 64), column = warp_uniform(Tile::column());
  const uint64_t a = wgmma_tile<Tile::kRows>(a_tile, row, column);
  const uint64_t b = wgmma_tile<Tile::kKeys>(b_tile, 0, column);
  ptx::wgmma_fence(d);
#pragma unroll
  for (int c = 0; c < Tile::kColumns; c += 16) {
    const uint64_t a_at = a + wgmma_step<Tile::kRows>(0, c);
    const uint64_t b_at = b + wgmma_step<Tile::kKeys>(0, c);
    if constexpr (Tile::kKeys == 32)
      ptx::wgmma_64x32x16<T>(d, a_at, b_at);
    else
      ptx::wgmma_64x64x16<T>(d, a_at, b_at);
  }
  ptx::wgmma_commit();
}

// accumulate, as one group of wgmmas.
template <class Tile, class T>
DEVICE void start_accumulate(float (&d)[Tile::kColumns / 8][4], uint32_t (&a)[Tile::kKeys / 8][2],
                             const T* b_tile) {
  const uint64_t b = wgmma_tile<Tile::kKeys>(b_tile, 0, warp_uniform(Tile::column()));
  ptx::fence_operand(a);
  ptx::wgmma_fence(d);
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 16; n++) {
    const uint32_t operand[4] = {a[2 * n][0], a[2 * n][1], a[2 * n + 1][0], a[2 * n + 1][1]};
#pragma unroll
    for (int m = 0; m < Tile::kColumns / 128; m++)
      ptx::wgmma_64x128x16_trans<T>(&d[m * 16], operand,
                                    b + wgmma_step<Tile::kKeys>(n * 16, m * 128));
  }
  ptx::wgmma_commit();
}

// As `mainloop`.
template <class Tile, class Smem, class Keys, class Softmax>
DEVICE void mainloop_wgmma(Smem& smem, float (&out)[Tile::kColumns / 8][4], const Keys& keys,
                           const Softmax& online_softmax) {
  keys.load_offsets(0);
  keys.load_offsets(1);
  keys.load_offsets(2);
  __syncthreads();
  keys.copy_k(0);
  ptx::cp_async_commit();
  keys.copy_k(1);
  keys.copy_v(0);
  ptx::cp_async_commit();

  float score[Tile::kKeys / 8][4] = {};
  ptx::cp_async_wait<1>();
  ptx::fence_async_proxy();
  __syncthreads();
  start_multiply<Tile>(score, smem.q, smem.k[0]);
  ptx::wgmma_wait<0>(score);
  smem.store_partial(score);

  // The last iteration apart: wgmmas that only some iterations start would make the compiler
  // wait for all.
  const auto iterate = [&]<bool kLast>(int iteration) {
    ptx::cp_async_wait<0>();
    ptx::fence_async_proxy();
    __syncthreads();
    float next[Tile::kKeys / 8][4] = {};
    if constexpr (!kLast) start_multiply<Tile>(next, smem.q, smem.k[(iteration + 1) % 2]);
    keys.copy_k(iteration + 2);
    keys.copy_v(iteration + 1);
    ptx::cp_async_commit();
    keys.load_offsets(iteration + 3);

    smem.reduce(score, iteration % 2);
    uint32_t weight[Tile::kKeys / 8][2];
    online_softmax(weight, score, iteration);
    start_accumulate<Tile>(out, weight, smem.v[iteration % 2]);
    if constexpr (!kLast) {
      ptx::wgmma_wait<1>(next);
      smem.store_partial(next, (iteration + 1) % 2);
      __builtin_memcpy(score, next, sizeof score);
    }
    ptx::wgmma_wait<0>(out);
  };
  for (int iteration = 0; iteration < keys.iterations - 1; iteration++)
    iterate.template operator()<false>(iteration);
  iterate.template operator()<true>(keys.iterations - 1);
}

}  // namespace gemma4
