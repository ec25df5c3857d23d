#include "attention_prefill_backward.cuh"

namespace gemma4 {

namespace {

// Calls f.operator()<Tile>() with the largest tile that fits.
template <class T, class F>
void with_backward_tile(int head_dim, size_t max_smem_bytes, F&& f) {
  const auto either = [&]<class Large, class Small>() {
    if (sizeof(BackwardSmem<T, Large>) <= max_smem_bytes) return f.template operator()<Large>();
    if (sizeof(BackwardSmem<T, Small>) <= max_smem_bytes) return f.template operator()<Small>();
    throw std::runtime_error("attention_prefill_backward: no tile of head_dim " +
                             std::to_string(head_dim) + " fits in " +
                             std::to_string(max_smem_bytes) + " bytes of shared memory");
  };
  switch (head_dim) {
    case 64:
      return f.template operator()<AttentionTile<64, 64, 64, 1>>();
    case 128:
      return f.template operator()<AttentionTile<128, 64, 32, 1>>();
    case 256:
      return either
          .template operator()<AttentionTile<256, 64, 32, 2>, AttentionTile<256, 64, 16, 2>>();
    case 512:
      return either
          .template operator()<AttentionTile<512, 32, 16, 4>, AttentionTile<512, 16, 16, 4>>();
    default:
      throw std::runtime_error(
          "attention_prefill_backward: there are kernels for head_dim 64, 128, 256 and 512, got " +
          std::to_string(head_dim));
  }
}

}  // namespace

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
