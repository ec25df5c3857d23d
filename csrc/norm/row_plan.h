// How many threads share a row, and how many vectors each of them holds.
#pragma once

#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace gemma4 {

// Starts kernel<kVectors>(), which is dependent, of rows whose widest type is one of T. Few vectors
// a thread keep every load of a single row in flight at once; at most 256 threads keep several rows
// on a multiprocessor, so that one row's block sum hides behind another's loads. Rows beyond 16 KB,
// wider than any Gemma 4 in 16 bits, go element by element, as do those that are not aligned.
template <class... T, class Params, class Kernel>
void launch_rows(const Device& device, const char* name, const Params& p, bool aligned,
                 Kernel&& kernel) {
  const int vectors_in_row = ceil_div(p.width, kFullWidth<T...>);
  const auto start = [&]<int kVectors>(int threads) {
    const int64_t resident = device.sm_count * (2048 / threads);
    launch(device, name, kernel.template operator()<kVectors>(),
           {.grid = std::min(p.rows, resident),
            .block = threads,
            .smem_bytes = sizeof(BlockSum),
            .dependent = true},
           p);
  };
  const auto start_vectors = [&]<int kVectors>() {
    start.template operator()<kVectors>(round_up(ceil_div(vectors_in_row, kVectors), kWarpSize));
  };
  if (!aligned || vectors_in_row > 4 * 256)
    return start.template operator()<0>(p.width < 256 ? round_up(p.width, kWarpSize) : 256);
  if (vectors_in_row <= 256) return start_vectors.template operator()<1>();
  if (vectors_in_row <= 2 * 256) return start_vectors.template operator()<2>();
  start_vectors.template operator()<4>();
}

}  // namespace gemma4
