#include "gelu_mul.cuh"

namespace gemma4 {

void geglu(const GeluMulParams& p, DType dtype, const Device& device) {
  with_type(dtype, [&]<class T>() { gelu_mul<T, T>("geglu", p, device); });
}

}  // namespace gemma4
