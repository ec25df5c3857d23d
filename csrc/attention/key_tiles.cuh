// What attention's forward kernels know of the keys that they walk over.
#pragma once

#include "plan.h"
#include "sequence.cuh"

namespace gemma4 {

// Blocks that a multiprocessor must hold. Decoding waits for memory, and more of them hide it;
// without a number the compiler picks one that it cannot keep everywhere.
template <class Tile>
constexpr int kResidentBlocks = Tile::kRows == 16 && Tile::kHeadDim <= 256 ? 3 : 1;

// A block's tiles of keys, one an iteration; of iterations that do not exist, nothing is copied.
template <class T, class Tile>
struct KeyTiles {
  const AttentionParams& p;
  AttentionSmem<T, Tile>& smem;
  const Sequence& s;
  int b, g;
  KeyRange range;
  int iterations;

  DEVICE int first_key(int iteration) const { return range.begin + iteration * Tile::kKeys; }

  // A thread a key finds where it lies, once for k and v; every copy would have to divide.
  DEVICE void load_offsets(int iteration) const {
    const int key = first_key(iteration) + static_cast<int>(threadIdx.x);
    if (threadIdx.x < Tile::kKeys)
      smem.offset[iteration % smem.kOffsets][threadIdx.x] =
          key_offset(p, s, b, g, min(key, range.end - 1));
  }
  // The scales of both come with k: weights want those of v before it has landed.
  DEVICE void copy_k(int iteration) const {
    copy(smem.k[iteration % Tile::kStages], p.k, iteration);
    if constexpr (Tile::kCoded) copy_scales(iteration);
  }
  DEVICE void copy_v(int iteration) const {
    copy(smem.v[iteration % Tile::kStages], p.v, iteration);
  }

  // Products with codes become scores.
  DEVICE void scale_scores(float (&score)[Tile::kKeys / 8][4], int iteration) const {
    if constexpr (Tile::kCoded) {
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) score[n][e] *= scale(0, iteration, n, e % 2);
    }
  }
  // What a value's codes are multiplied with, of a weight of column e of score[n].
  DEVICE float of_codes(float weight, int iteration, int n, int e) const {
    if constexpr (Tile::kCoded) return weight * scale(1, iteration, n, e);
    return weight;
  }

 private:
  using Key = typename AttentionSmem<T, Tile>::Key;

  DEVICE void copy(Key* tile, const void* base, int iteration) const {
    if (iteration < iterations)
      copy_rows<Tile::kHeadDim, Tile::kKeys, Tile::kThreads>(tile, [&](int row) {
        return SourceRow<Key>{
            static_cast<const Key*>(base) + smem.offset[iteration % smem.kOffsets][row],
            first_key(iteration) + row < range.end};
      });
  }
  // Scales lie as heads do, one for each.
  DEVICE void copy_scales(int iteration) const {
    static_assert(Tile::kThreads >= 2 * Tile::kKeys);
    const int key = threadIdx.x % Tile::kKeys, of_v = threadIdx.x / Tile::kKeys;
    if (iteration >= iterations || of_v > 1) return;
    ptx::cp_async<4>(ptx::shared_address(&smem.scale[iteration % smem.kOffsets][of_v][key]),
                     (of_v ? p.v_scales : p.k_scales) +
                         smem.offset[iteration % smem.kOffsets][key] / Tile::kHeadDim,
                     first_key(iteration) + key < range.end ? 4 : 0);
  }
  DEVICE float scale(int of_v, int iteration, int n, int e) const {
    return smem.scale[iteration % smem.kOffsets][of_v][n * 8 + threadIdx.x % 4 * 2 + e] * kOfCodes;
  }
};

}  // namespace gemma4
