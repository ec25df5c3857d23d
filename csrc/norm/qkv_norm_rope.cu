#include "qkv_norm_rope.cuh"

#include "../common/launch.h"

namespace gemma4 {

namespace {

// Few tokens: the heads of each go to several blocks, so that a single token does not wait for one.
Grid plan_grid(const QkvNormRopeParams& p, int heads_in_block, const Device& device) {
  const int heads = p.q_heads + (p.k ? p.kv_heads : 0) + (p.v ? p.kv_heads : 0);
  const int64_t most = ceil_div(heads, heads_in_block);
  const int64_t wanted = ceil_div<int64_t>(2 * device.sm_count, p.tokens);
  const int64_t resident = 64LL * device.sm_count;  // more than fit: no tail of half-idle cards
  return Grid(std::min(p.tokens, resident), std::min(wanted, most));
}

template <class T, class W>
bool heads_are_aligned(const QkvNormRopeParams& p) {
  const auto fits = [&](const void* x, int64_t stride, int64_t head_stride) {
    return are_aligned<T>(x, stride, head_stride);
  };
  bool all = fits(p.q, p.q_stride, p.q_head_stride) && fits(p.k, p.k_stride, p.k_head_stride) &&
             fits(p.v, p.v_stride, p.v_head_stride) &&
             are_aligned<float>(p.inv_freq, p.head_dim / 2, p.head_dim / 2);
  for (const void* weight : {p.q_weight, p.k_weight})
    all = all && are_aligned<W>(weight, p.head_dim, p.head_dim);
  if (p.k_scales) return all && fits(p.q_out, p.head_dim, p.head_dim) && p.head_dim % 16 == 0;
  for (const void* out : {p.q_out, p.k_out, p.v_out})
    all = all && fits(out, p.head_dim, p.head_dim);
  return all;
}

template <class T, class W, int kHeadDim>
void launch_heads(const QkvNormRopeParams& p, const Device& device) {
  constexpr int kThreads = 256;
  const Grid grid = plan_grid(p, kThreads / HeadLanes<T, kHeadDim>::kLanes, device);
  launch(device, "qkv_norm_rope", qkv_norm_rope_kernel<T, W, kHeadDim>, grid, kThreads, 0, p);
}

}  // namespace

void qkv_norm_rope(const QkvNormRopeParams& p, const DTypes& dtypes, const Device& device) {
  if (p.tokens == 0 || p.head_dim == 0 || p.q_heads + p.kv_heads == 0) return;
  with_types(dtypes, [&]<class T, class, class W>() {
    const int head_dim = heads_are_aligned<T, W>(p) ? p.head_dim : 0;
    if (head_dim == 64) return launch_heads<T, W, 64>(p, device);
    if (head_dim == 128) return launch_heads<T, W, 128>(p, device);
    if (head_dim == 256) return launch_heads<T, W, 256>(p, device);
    if (head_dim == 512) return launch_heads<T, W, 512>(p, device);
    if (p.k_scales)
      throw std::runtime_error(
          "qkv_norm_rope: there are kernels for e4m3 of head_dim 64, 128, 256 and 512 in 16-byte "
          "rows alone");
    launch(device, "qkv_norm_rope", qkv_norm_rope_unaligned_kernel<T, W>, plan_grid(p, 8, device),
           256, 0, p);
  });
}

}  // namespace gemma4
