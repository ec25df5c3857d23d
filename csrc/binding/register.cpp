// The ops for torch's dispatcher, on libtorch's stable ABI, so that one binary serves every torch
// from the target version on. The schemas are defined in Python, once more for compiled code; here
// they get their implementation for one device: CUDA, or, with GEMMA4_EMULATION, the CPU in a
// namespace of the test suite's own.
#include "device.h"
#include "register.h"

#ifdef GEMMA4_EMULATION
STABLE_TORCH_LIBRARY_IMPL(GEMMA4_EMULATION, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(gemma4_kernels_compiled, CUDA, m) {
#endif
  binding::register_norm(m);
  binding::register_attention(m);
  binding::register_moe(m);
  binding::register_ple(m);
  binding::register_linear(m);
}

// Takes no tensor, so that no device's key would find it.
#ifdef GEMMA4_EMULATION
STABLE_TORCH_LIBRARY_IMPL(GEMMA4_EMULATION, CompositeExplicitAutograd, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(gemma4_kernels_compiled, CompositeExplicitAutograd, m) {
#endif
  m.impl("set_dependent_launches", TORCH_BOX(&binding::set_dependent_launches));
}
