#include "ops.h"

namespace gemma4 {

void ple_gate_backward(const GeluMulBackwardParams& p, const DTypes& dtypes, const Device& device) {
  gelu_mul_backward("ple_gate_backward", p, dtypes, device);
}

}  // namespace gemma4
