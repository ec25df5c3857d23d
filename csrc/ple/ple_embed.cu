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
    const bool in_pieces = in_pieces_of_16<R>(p.table, p.table_stride, p.width) &&
                           in_pieces_of_16<T>(p.projected, p.projected_stride, p.width) &&
                           in_pieces_of_16<W>(p.weight, 0, p.width) &&
                           in_pieces_of_16<R>(p.y, p.width, p.width);
    const auto start = [&](auto kernel) {
      launch(device, "ple_embed", kernel, grid, kWarps * kWarpSize, 0, p);
    };
    if (in_pieces && p.width <= 32 * kWidth) return start(ple_embed_kernel<T, R, W, kWidth, 1>);
    if (in_pieces && p.width <= 64 * kWidth) return start(ple_embed_kernel<T, R, W, kWidth, 2>);
    start(ple_embed_ragged_kernel<T, R, W>);
  });
}

}  // namespace gemma4
