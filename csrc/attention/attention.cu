#include "attention.cuh"

namespace gemma4 {

void attention(const char* name, const AttentionParams& p, DType dtype, const Device& device) {
  const int64_t rows = int64_t{p.max_seqlen_q} * (p.q_heads / p.kv_heads);
  with_half_type(name, dtype, [&]<class T>() {
    with_tile<T>(name, p.head_dim, rows, device, [&]<class Tile>() {
      const Grid grid(ceil_div<int64_t>(rows, Tile::kRows) * p.batch, p.kv_heads, p.splits);
      const auto kernel =
          p.softcap > 0 ? attention_kernel<T, Tile, true> : attention_kernel<T, Tile, false>;
      launch(device, name, kernel, grid, Tile::kThreads, sizeof(AttentionSmem<T, Tile>), p);
    });
  });
}

}  // namespace gemma4
