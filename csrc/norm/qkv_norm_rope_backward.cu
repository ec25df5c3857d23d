#include "qkv_norm_rope_backward.cuh"

namespace gemma4 {

void qkv_norm_rope_backward(const QkvNormRopeBackwardParams& p, DType dtype, const Device& device) {
  constexpr const char* name = "qkv_norm_rope_backward";
  const QkvNormRopeParams& f = p.forward;
  const bool sums = p.weights.sum[0] || p.weights.sum[1];
  const auto start = [&]<class T, int kHeadDim>() {
    const int64_t resident = 16LL * device.sm_count;  // more than fit: no tail of half-idle cards
    const int64_t blocks = sums ? p.weights.blocks : std::min(f.tokens, resident);
    launch(device, name, qkv_norm_rope_backward_kernel<T, kHeadDim>, blocks, kHeadThreads,
           sizeof(HeadSums<T, kHeadDim>), p);
  };
  with_type(dtype, [&]<class T>() {
    if (f.head_dim != 256 && f.head_dim != 512)
      throw std::runtime_error(std::string(name) + ": there are kernels for head_dim 256 and 512");
    if (f.tokens == 0 || f.q_heads + f.kv_heads == 0) return;
    if (f.head_dim == 256) return start.template operator()<T, 256>();
    start.template operator()<T, 512>();
  });
  if (sums) add_weight_gradients(p.weights, f.head_dim, name, device);
}

}  // namespace gemma4
