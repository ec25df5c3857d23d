#include "ple_embed.cuh"

#include "../common/launch.h"

namespace gemma4 {

void ple_embed(const PleEmbedParams& p, const DTypes& dtypes, const Device& device) {
  if (p.tokens == 0 || p.layers == 0) return;
  constexpr int kWarps = 8;
  const Grid grid(std::min<int64_t>(p.tokens, INT32_MAX),
                  std::min<int64_t>(ceil_div(p.layers, kWarps), kMostBlocksY));
  with_types(dtypes, [&]<class T, class R, class W>() {
    constexpr int kWidth = kFullWidth<T, R>;
    const bool aligned = are_aligned<R>(p.table, p.table_stride, p.width) &&
                         are_aligned<T>(p.projected, p.projected_stride, p.width) &&
                         are_aligned<W>(p.weight, 0, p.width) &&
                         are_aligned<R>(p.y, p.width, p.width);
    const auto start = [&](auto kernel) {
      launch(device, "ple_embed", kernel,
             {.grid = grid, .block = kWarps * kWarpSize, .dependent = true}, p);
    };
    if (aligned && p.width <= 32 * kWidth) return start(ple_embed_kernel<T, R, W, 1>);
    if (aligned && p.width <= 64 * kWidth) return start(ple_embed_kernel<T, R, W, 2>);
    start(ple_embed_kernel<T, R, W, 0>);
  });
}

}  // namespace gemma4
