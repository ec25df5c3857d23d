// How a launcher starts a kernel: one signature, a body for each compiler.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "platform.h"
#include "types.h"

namespace gemma4 {

constexpr int kWarpSize = 32;

// How many blocks a launch starts, which is counted in 64 bits until `launch` has looked at it.
// Only x is long: what grows with tokens, rows or sequences goes there, or is walked over.
struct Grid {
  int64_t x, y, z;
  Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
constexpr int64_t kMostBlocksY = 65535;

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
constexpr int round_up(int x, int multiple) { return ceil_div(x, multiple) * multiple; }

// Calls f.operator()<T>() with the C++ type of `dtype`.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f.template operator()<float>();
    case DType::kBFloat16:
      return f.template operator()<bf16>();
    case DType::kFloat16:
      return f.template operator()<fp16>();
  }
}

// Calls f.operator()<T, R, W>() with the types of x, of what it meets and of the weights.
template <class F>
void with_types(const DTypes& dtypes, F&& f) {
  with_type(dtypes.x, [&]<class T>() {
    if (dtypes.weight == dtypes.x) return f.template operator()<T, T, T>();
    if (dtypes.other == dtypes.x) return f.template operator()<T, T, float>();
    f.template operator()<T, float, float>();
  });
}

// The same for ops whose products tensor cores compute.
template <class F>
void with_half_type(const char* name, DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) return f.template operator()<bf16>();
  if (dtype == DType::kFloat16) return f.template operator()<fp16>();
  throw std::runtime_error(std::string(name) +
                           ": there are kernels for bfloat16 and float16 alone");
}

// Whether rows of T can be read and written 16 bytes at a time.
template <class T>
bool are_aligned(const void* p, int64_t row_stride, int64_t width) {
  constexpr int kWidth = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row_stride % kWidth == 0 &&
         width % kWidth == 0;
}

// Whether kernels run there that were compiled for Hopper, whose code alone has wgmma.
inline bool has_wgmma(const Device& device) {
#ifdef GEMMA4_EMULATION
  constexpr int kCompiledFor[] = {800, 900};
#else
  constexpr int kCompiledFor[] = {__CUDA_ARCH_LIST__};
#endif
  return device.capability == 9 && std::ranges::count(kCompiledFor, 900) > 0;
}

// The grid as a card takes it. Every card has these limits.
inline dim3 checked(const char* name, const Grid& grid) {
  if (grid.x > INT32_MAX || grid.y > kMostBlocksY || grid.z > kMostBlocksY)
    throw std::runtime_error(std::string(name) + ": no card starts " + std::to_string(grid.x) +
                             " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
                             " blocks");
  return dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
              static_cast<unsigned>(grid.z));
}

// What a kernel is started with. One that is `dependent` may start while the kernel before it still
// runs, where that is allowed (Device): it asks for its weights, calls
// ptx::wait_for_previous_kernel in every thread, and only then reads anything else, by loads that
// are not moved before the wait, or writes.
struct LaunchConfig {
  Grid grid;
  dim3 block;
  size_t smem_bytes = 0;
  bool dependent = false;
};

// Starts `kernel` for the op and the part of it that `name` names.
#ifdef GEMMA4_EMULATION

template <class Params>
void launch(const Device& device, const char* name, void (*kernel)(Params),
            const LaunchConfig& config, const std::type_identity_t<Params>& params) {
  struct Context {
    void (*kernel)(Params);
    Params params;
  } context{kernel, params};
  emulation::launch(
      name, checked(name, config.grid), config.block, config.smem_bytes,
      [](void* c) { static_cast<Context*>(c)->kernel(static_cast<Context*>(c)->params); }, &context,
      sizeof context, config.dependent && device.dependent_launches);
}

inline void clear(const Device&, const char*, void* p, size_t bytes) {
  __builtin_memset(p, 0, bytes);
}

#else

// CUDA keeps an error until it is asked for; left there, the next innocent call would find it.
inline void check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(name) + " does not start: " + cudaGetErrorString(status));
}

// Once for each kernel and device, for it takes longer than a launch: lets the kernel have as much
// shared memory as a block may have there, and finds out whether its code can wait. Code for older
// cards, which may have come to this one as PTX, cannot.
inline bool prepare(const Device& device, const char* name, const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> can_wait;
  const std::lock_guard lock(mutex);
  const auto found = can_wait.find({kernel, device.index});
  if (found != can_wait.end()) return found->second;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             device.max_smem_bytes),
        name);
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  return can_wait[{kernel, device.index}] = attributes.ptxVersion >= 90;
}

template <class Params>
void launch(const Device& device, const char* name, void (*kernel)(Params),
            const LaunchConfig& config, const std::type_identity_t<Params>& params) {
  const bool can_wait = prepare(device, name, reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = checked(name, config.grid);
  how.blockDim = config.block;
  how.dynamicSmemBytes = config.smem_bytes;
  how.stream = static_cast<cudaStream_t>(device.stream);
  how.attrs = &dependent;
  how.numAttrs = config.dependent && device.dependent_launches && can_wait;
  check(cudaLaunchKernelEx(&how, kernel, params), name);
}

inline void clear(const Device& device, const char* name, void* p, size_t bytes) {
  check(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(device.stream)), name);
}

#endif

template <class Params>
void launch(const Device& device, const char* name, void (*kernel)(Params), const Grid& grid,
            dim3 block, size_t smem_bytes, const std::type_identity_t<Params>& params) {
  launch(device, name, kernel, LaunchConfig{grid, block, smem_bytes}, params);
}

}  // namespace gemma4
