#include "ops.h"

namespace gemma4 {

void ple_gate(const GeluMulParams& p, const DTypes& dtypes, const Device& device) {
  gelu_mul("ple_gate", p, dtypes, device);
}

}  // namespace gemma4
