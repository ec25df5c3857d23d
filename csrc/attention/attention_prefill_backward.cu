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
      const int64_t q_rows = int64_t{f.max_seqlen_q} * (f.q_heads / f.kv_heads);
      const size_t smem_bytes = sizeof(BackwardSmem<T, Tile>);
      const auto grid = [&](int64_t rows) {
        return Grid(ceil_div<int64_t>(rows, Tile::kRows) * f.batch, f.kv_heads);
      };
      if (q_rows > 0)
        launch(device, "attention_prefill_backward, of queries",
               attention_backward_kernel<T, Tile, false>, grid(q_rows), Tile::kThreads, smem_bytes,
               p);
      if (p.max_seqlen_k > 0)
        launch(device, "attention_prefill_backward, of keys",
               attention_backward_kernel<T, Tile, true>, grid(p.max_seqlen_k), Tile::kThreads,
               smem_bytes, p);
    });
  });
}

}  // namespace gemma4
