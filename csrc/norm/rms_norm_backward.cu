#include "rms_norm_backward.cuh"

namespace gemma4 {

void rms_norm_backward(const RmsNormBackwardParams& p, DType dtype, const Device& device) {
  with_type(dtype, [&]<class T>() {
    launch_rows_backward(device, "rms_norm_backward", p, sizeof(BlockSums<2>),
                         []<int kColumns>() { return rms_norm_backward_kernel<T, kColumns>; });
  });
}

}  // namespace gemma4
