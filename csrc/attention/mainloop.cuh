// The loop over tiles of keys, with mma and one stage of k and v: three barriers an iteration. k
// has landed and v is free; k is free, the partial scores and the offsets of the next keys are
// there; v has landed. The copy of the next k runs under the softmax and p v, that of v under q kᵀ.
#pragma once

#include "products.cuh"

namespace gemma4 {

// Before the loop; what is copied or stored into shared memory until then is there in it.
template <class Keys>
DEVICE void start_mainloop(const Keys& keys) {
  keys.load_offsets(0);
  __syncthreads();
  keys.copy_k(0);
  ptx::cp_async_commit();
}

// `keys` is KeyTiles; online_softmax(weight, score, iteration) makes weights of an iteration's
// scores.
template <class Tile, class Smem, class Keys, class Softmax>
DEVICE void mainloop(Smem& smem, float (&out)[Tile::kColumns / 8][4], const Keys& keys,
                     const Softmax& online_softmax) {
  for (int iteration = 0; iteration < keys.iterations; iteration++) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    keys.copy_v(iteration);
    ptx::cp_async_commit();
    keys.load_offsets(iteration + 1);

    float score[Tile::kKeys / 8][4] = {};
    multiply<Tile>(score, smem.q, smem.k[0]);
    smem.store_partial(score);
    __syncthreads();
    keys.copy_k(iteration + 1);
    ptx::cp_async_commit();
    smem.reduce(score);
    uint32_t weight[Tile::kKeys / 8][2];
    online_softmax(weight, score, iteration);

    ptx::cp_async_wait<1>();
    __syncthreads();
    accumulate<Tile, typename Smem::Operand>(out, weight, smem.v[0]);
  }
}

}  // namespace gemma4
