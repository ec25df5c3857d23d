#include "attention.cuh"

namespace gemma4 {

void attention(const char* name, const AttentionParams& params, DType dtype, const Device& device) {
  AttentionParams p = params;
  const int64_t rows = int64_t{p.max_seqlen_q} * p.group.divisor;
  with_half_type(name, dtype, [&]<class T>() {
    const auto start = [&]<class Tile>(void (*kernel)(AttentionParams)) {
      p.tiles = Divisor(static_cast<int>(ceil_div<int64_t>(rows, Tile::kRows)));
      const Grid grid(int64_t{p.tiles.divisor} * p.batch, p.kv_heads, p.splits.divisor);
      launch(device, name, kernel, grid, Tile::kThreads, sizeof(AttentionSmem<T, Tile>), p);
    };
    if (p.k_scales)
      return with_coded_tile(name, p.head_dim, [&]<class Tile>() {
        start.template operator()<Tile>(attention_kernel<T, Tile, false>);
      });
    with_tile<T>(name, p.head_dim, rows, device, [&]<class Tile>() {
      start.template operator()<Tile>(p.softcap > 0 ? attention_kernel<T, Tile, true>
                                                    : attention_kernel<T, Tile, false>);
    });
  });
}

}  // namespace gemma4
