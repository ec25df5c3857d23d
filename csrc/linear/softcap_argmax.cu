#include "softcap_argmax.cuh"

#include "../common/launch.h"

namespace gemma4 {

void softcap_argmax(const SoftcapArgmaxParams& params, DType dtype, const Device& device) {
  constexpr int kThreads = 256;
  // A row needs a block in y.
  for (int64_t first = 0; first < params.rows; first += kMostBlocksY) {
    SoftcapArgmaxParams p = params;
    p.rows = std::min(params.rows - first, kMostBlocksY);
    p.index = static_cast<int64_t*>(params.index) + first;
    clear(device, "softcap_argmax", p.index, p.rows * sizeof(int64_t));
    with_type(dtype, [&]<class T>() {
      p.logits = static_cast<const T*>(params.logits) + first * p.stride;
      const bool aligned = are_aligned<T>(p.logits, p.stride, p.width);
      const int width = aligned ? kFullWidth<T> : 1;
      // Enough blocks to fill the card, and at least four vectors a thread.
      const int64_t most = ceil_div<int64_t>(p.width, 4 * kThreads * width);
      const int64_t wanted = ceil_div<int64_t>(4 * device.sm_count, p.rows);
      const Grid grid(std::min(wanted, most), p.rows);
      launch(device, "softcap_argmax",
             aligned ? softcap_argmax_kernel<T, kFullWidth<T>> : softcap_argmax_kernel<T, 1>, grid,
             kThreads, sizeof(BlockMax), p);
    });
    launch(device, "softcap_argmax, unpack", softcap_argmax_unpack_kernel<>,
           ceil_div<int64_t>(p.rows, kThreads), kThreads, 0, p);
  }
}

}  // namespace gemma4
