#include "moe_norm_backward.cuh"

namespace gemma4 {

void moe_norm_backward(const MoeNormBackwardParams& p, DType x, DType other, const Device& device) {
  with_types({x, other, other}, [&]<class T, class R, class>() {
    launch_rows_backward(device, "moe_norm_backward", p, sizeof(BlockSums<2>),
                         []<int kColumns>() { return moe_norm_backward_kernel<T, R, kColumns>; });
  });
}

}  // namespace gemma4
