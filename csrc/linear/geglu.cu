#include "ops.h"

namespace gemma4 {

void geglu(const GeluMulParams& p, DType dtype, const Device& device) {
  gelu_mul("geglu", p, {dtype, dtype, dtype}, device);
}

}  // namespace gemma4
