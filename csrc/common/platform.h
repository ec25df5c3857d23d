// One source, two compilers: nvcc makes GPU code of it; g++ with GEMMA4_EMULATION makes code that
// csrc/emulation runs on the CPU. Kernel files look like ordinary CUDA: what differs stands here,
// in launch.h, in ptx/ and in tile.cuh's accesses of 16 bytes. Kernels see of it FROM_HERE and HERE
// in the signatures of their own wrappers.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef GEMMA4_EMULATION
#include "../emulation/emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// A wrapper's last parameter and argument: under emulation the caller's place in the source, so
// that reports and counts name the kernel's line and not the wrapper's.
#ifdef GEMMA4_EMULATION
#define FROM_HERE , ::emulation::Loc loc = ::emulation::Loc::current()
#define HERE , loc
#else
#define FROM_HERE
#define HERE
#endif

namespace gemma4 {

#ifdef GEMMA4_EMULATION
using bf16 = emulation::bf16;
using fp16 = emulation::fp16;
#define DEVICE inline
#else
using bf16 = __nv_bfloat16;
using fp16 = __half;
#define DEVICE __device__ __forceinline__
#endif

DEVICE float to_float(float x) { return x; }

// Rounds to nearest even, as torch does.
template <class T>
DEVICE T from_float(float x);

template <>
DEVICE float from_float<float>(float x) {
  return x;
}

#ifdef GEMMA4_EMULATION
DEVICE float to_float(bf16 x) { return emulation::as_float(x); }
DEVICE float to_float(fp16 x) { return emulation::as_float(x); }
template <>
DEVICE bf16 from_float<bf16>(float x) {
  return emulation::to_bf16(x);
}
template <>
DEVICE fp16 from_float<fp16>(float x) {
  return emulation::to_fp16(x);
}
#else
DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
DEVICE float to_float(fp16 x) { return __half2float(x); }
template <>
DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
DEVICE fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}
#endif

// x as T can hold it: what is too large for fp16 becomes its largest value and not infinity. For
// products of activations, which leave fp16's range where a checkpoint was made for bf16. NaN
// stays.
template <class T>
DEVICE float saturate(float x) {
  constexpr float kMost = 65504.0f;
  if constexpr (std::is_same_v<T, fp16>) return x > kMost ? kMost : x < -kMost ? -kMost : x;
  return x;
}

// A kernel's shared memory is one struct, and this is the one way to reach it: sizeof(Smem) is the
// formula, the launcher passes it, and the emulator can poison and watch every byte.
#ifdef GEMMA4_EMULATION
template <class Smem>
DEVICE Smem& shared_memory() {
  return *static_cast<Smem*>(emulation::shared_memory(sizeof(Smem), alignof(Smem)));
}
#else
template <class Smem>
DEVICE Smem& shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return *reinterpret_cast<Smem*>(memory);
}
#endif

}  // namespace gemma4
