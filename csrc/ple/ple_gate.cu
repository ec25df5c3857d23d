#include "../linear/gelu_mul.cuh"

namespace gemma4 {

void ple_gate(const GeluMulParams& p, const DTypes& dtypes, const Device& device) {
  with_types(dtypes, [&]<class T, class R, class>() { gelu_mul<T, R>("ple_gate", p, device); });
}

}  // namespace gemma4
