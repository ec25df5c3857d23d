#include "attention_prefill_backward.cuh"

namespace gemma4 {

void attention_prefill_backward(const AttentionBackwardParams& p, DType dtype,
                                const Device& device) {
  constexpr const char* name = "attention_prefill_backward";
  const AttentionParams& f = p.forward;
  // No sequence need hold a token: its gradient is zero.
  clear(device, name, p.grad_q, size_t{2} * f.tokens * f.q_heads * f.head_dim);
  clear(device, name, p.grad_k, size_t{2} * f.capacity * f.kv_heads * f.head_dim);
  clear(device, name, p.grad_v, size_t{2} * f.capacity * f.kv_heads * f.head_dim);
  if (f.batch == 0 || f.tokens == 0 || f.capacity == 0 || f.q_heads == 0) return;
  with_half_type(name, dtype, [&]<class T>() {
    launch(device, "attention_prefill_backward, delta", attention_delta_kernel<T>,
           ceil_div<int64_t>(f.tokens * f.q_heads, kDeltaWarps), kDeltaWarps * 32, 0, p);
    with_backward_tile<T>(f.head_dim, device.max_smem_bytes, [&]<class Tile>() {
      const int64_t q_rows = int64_t{f.max_seqlen_q} * f.group.divisor;
      const size_t smem_bytes = sizeof(BackwardSmem<T, Tile>);
      const auto launch_of = [&](const char* of, auto kernel, int64_t rows) {
        if (rows == 0) return;
        AttentionBackwardParams own = p;
        own.forward.tiles = Divisor(static_cast<int>(ceil_div<int64_t>(rows, Tile::kRows)));
        const Grid grid(int64_t{own.forward.tiles.divisor} * f.batch, f.kv_heads);
        launch(device, of, kernel, grid, Tile::kThreads, smem_bytes, own);
      };
      launch_of("attention_prefill_backward, of queries", attention_backward_kernel<T, Tile, false>,
                q_rows);
      launch_of("attention_prefill_backward, of keys", attention_backward_kernel<T, Tile, true>,
                p.max_seqlen_k);
    });
  });
}

}  // namespace gemma4
