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
  DEVICE void copy_k(int iteration) const {
    copy(smem.k[iteration % Tile::kStages], p.k, iteration);
  }
  DEVICE void copy_v(int iteration) const {
    copy(smem.v[iteration % Tile::kStages], p.v, iteration);
  }

 private:
  DEVICE void copy(T* tile, const void* base, int iteration) const {
    if (iteration < iterations)
      copy_rows<Tile::kHeadDim, Tile::kKeys, Tile::kThreads>(tile, [&](int row) {
        return SourceRow<T>{
            static_cast<const T*>(base) + smem.offset[iteration % smem.kOffsets][row],
            first_key(iteration) + row < range.end};
      });
  }
};

}  // namespace gemma4
