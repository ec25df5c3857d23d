#include "ops.h"

namespace gemma4 {

void geglu_backward(const GeluMulBackwardParams& p, DType dtype, const Device& device) {
  gelu_mul_backward("geglu_backward", p, {dtype, dtype, dtype}, device);
}

}  // namespace gemma4
