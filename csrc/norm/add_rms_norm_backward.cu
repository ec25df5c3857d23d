#include "add_rms_norm_backward.cuh"

namespace gemma4 {

void add_rms_norm_backward(const AddRmsNormBackwardParams& p, DType x, DType other,
                           const Device& device) {
  with_types({x, other, other}, [&]<class T, class R, class>() {
    launch_rows_backward(
        device, "add_rms_norm_backward", p, sizeof(AddBackwardSmem),
        []<int kColumns>() { return add_rms_norm_backward_kernel<T, R, kColumns>; });
  });
}

}  // namespace gemma4
