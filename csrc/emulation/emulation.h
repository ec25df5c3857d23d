// Runs CUDA kernel source on the CPU: what kernels and launchers see of the emulator.
//
// Each CUDA thread is a fiber; the fibers of a block take turns on one OS thread, in a seeded order
// that is unfair on purpose, and blocks run one after another, in a seeded order too. Switches
// happen only inside the calls below, so plain kernel code runs at native speed between them. The
// emulator does what hardware is allowed to do but seldom shows: shared memory starts as NaN,
// copies land as late as they may, a lane outside a shuffle's mask gives garbage.
//
// What it cannot show: speed, occupancy, weak memory order, the exact rounding of tensor cores and
// of approximate functions, and whatever ptx/ gets wrong in the PTX alone.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

struct uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define threadIdx (::emulation::self().thread)
#define blockIdx (::emulation::self().block)
#define blockDim (::emulation::self().block_dim)
#define gridDim (::emulation::self().grid_dim)

namespace emulation {

using Loc = std::source_location;
// Default argument of every call from a kernel, so that a report names the kernel's own line.
#define LOC ::emulation::Loc loc = ::emulation::Loc::current()

// ---- number formats -------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  _Float16 value;
};

inline float as_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float as_float(fp16 x) { return static_cast<float>(x.value); }
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline fp16 to_fp16(float x) { return {static_cast<_Float16>(x)}; }

// ---- host side: settings, buffers, launches, findings -----------------------------------------

enum class Policy {
  kFair,         // any runnable warp
  kRunAhead,     // a warp runs until it blocks
  kAdversarial,  // fixed random priorities, seldom redrawn: warps drift as far apart as barriers
                 // let
};

struct Settings {
  uint64_t seed = 1;
  Policy policy = Policy::kRunAhead;
  bool races = true;     // watch for accesses that no barrier orders
  bool profile = false;  // count bank wavefronts and sectors
  int sm_count = 3;      // few, so that persistent kernels take several turns
  int max_smem_bytes = 232448;
  bool has_wgmma = false;                  // what is compiled for Hopper
  uint64_t max_idle_switches = 2'000'000;  // without a completed barrier, collective or thread
  double max_seconds = 60;                 // of one launch
  bool dependent_launches = true;          // what may start while its predecessor runs
  std::set<std::string> parameters;        // buffers that no kernel before one has written
};
Settings& settings();

// The memory that the next launches may touch; anything else is out of bounds. An op allows its
// tensors and forgets them when it returns, so that a kernel that keeps a pointer is caught too.
void allow(const void* begin, size_t bytes, const std::string& name, bool writable);
void forget();

// Runs body(context) in every thread; `context` holds the kernel, at its begin, and its parameters.
void launch(const char* kernel, dim3 grid, dim3 block, size_t smem_bytes, void (*body)(void*),
            void* context, size_t context_bytes, bool dependent = false);

// One row for each source line, kind of access and buffer (none: shared memory).
struct SiteCount {
  std::string where, kind, buffer;
  uint64_t requests = 0, lanes = 0;
  uint64_t wavefronts = 0, ideal_wavefronts = 0;  // shared memory
  uint64_t sectors = 0, ideal_sectors = 0;        // global memory, 32 bytes each
};
// One row for each allowed buffer: what was asked for, and how many different sectors that were.
struct BufferCount {
  std::string name;
  uint64_t bytes = 0, read_bytes = 0, written_bytes = 0, sectors_touched = 0;
};
// One row for each launch: which kernel, as an address in its library, and what its launcher gave
// it.
struct LaunchCount {
  uint64_t kernel = 0;
  int threads = 0;
  uint64_t blocks = 0, smem_bytes = 0;
  bool dependent = false;
};
struct Counts {
  uint64_t launches = 0, switches = 0, collectives = 0, barriers = 0, mma = 0;
  std::vector<SiteCount> sites;
  std::vector<BufferCount> buffers;
  std::vector<LaunchCount> launched;
};
Counts& counts();

// ---- device side ------------------------------------------------------------------------------

struct View {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
// Constant for the life of a fiber, so the compiler may keep what it read.
View& self() __attribute__((const));

void* shared_memory(size_t bytes, size_t alignment);
uint32_t shared_address(const void* pointer, LOC);

void sync_threads(LOC);
void barrier_sync(int id, int threads, LOC);
void barrier_arrive(int id, int threads, LOC);
void sync_warp(uint32_t mask, LOC);
enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(Shuffle, uint32_t mask, uint64_t value, int argument, int width, Loc);
uint32_t ballot(uint32_t mask, bool predicate, LOC);
bool elect(LOC);
void fence(LOC);  // __threadfence
[[noreturn]] void trap(LOC);

void load(void* to, const void* from, int bytes, Loc);
void store(void* to, const void* from, int bytes, Loc);
// By instructions that know global memory alone: ld.global, ld.global.nc, st.global.
void load_global(void* to, const void* from, int bytes, Loc);
void load_read_only(void* to, const void* from, int bytes, Loc);
void store_global(void* to, const void* from, int bytes, Loc);
uint64_t atomic(void* p, int bytes, uint64_t (*update)(uint64_t old, uint64_t operand),
                uint64_t operand, bool acquires_and_releases, Loc);
void wait_for_previous_kernel();

void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t address, Loc);
void stmatrix(const uint32_t* registers, int matrices, bool transposed, uint32_t address, Loc);
void mma_16816(float* d, const uint32_t* a, const uint32_t* b, bool is_bf16, Loc);

void copy_async(uint32_t to, const void* from, int bytes, int bytes_read, Loc);
void copy_async_commit();
void copy_async_wait(int groups_left, Loc);

bool has_wgmma();
void fence_async_proxy();
void wgmma_fence(Loc);
void wgmma_commit(Loc);
void wgmma_wait(int groups_left, Loc);
void wgmma(float* d, int columns, uint64_t a, uint64_t b, bool a_transposed, bool b_transposed,
           bool is_bf16, Loc);
void wgmma_trans(float* d, int columns, const uint32_t* a, uint64_t b, bool is_bf16, Loc);

template <class T>
T shuffle_as(Shuffle kind, uint32_t mask, T value, int argument, int width, Loc loc) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, argument, width, loc);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

// ---- CUDA built-ins
// ------------------------------------------------------------------------------

#define __syncthreads() ::emulation::sync_threads()
inline void __syncwarp(unsigned mask = 0xffffffffu, LOC) { emulation::sync_warp(mask, loc); }
inline void __threadfence(LOC) { emulation::fence(loc); }
inline unsigned __ballot_sync(unsigned mask, int p, LOC) { return emulation::ballot(mask, p, loc); }
inline int __any_sync(unsigned mask, int p, LOC) { return emulation::ballot(mask, p, loc) != 0; }
template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32, LOC) {
  return emulation::shuffle_as(emulation::Shuffle::kIndex, mask, v, lane, width, loc);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, LOC) {
  return emulation::shuffle_as(emulation::Shuffle::kXor, mask, v, lanes, width, loc);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, LOC) {
  return emulation::shuffle_as(emulation::Shuffle::kUp, mask, v, int(delta), width, loc);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, LOC) {
  return emulation::shuffle_as(emulation::Shuffle::kDown, mask, v, int(delta), width, loc);
}
template <class T>
T atomicMax(T* p, T value, LOC) {
  static_assert(std::is_unsigned_v<T> && sizeof(T) >= 4);
  return static_cast<T>(emulation::atomic(
      p, sizeof(T), [](uint64_t a, uint64_t b) { return a > b ? a : b; }, value, false, loc));
}
template <class T>
T atomicAdd(T* p, T value, LOC) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "float atomics have no fixed order");
  return static_cast<T>(emulation::atomic(
      p, sizeof(T), [](uint64_t a, uint64_t b) { return a + b; }, static_cast<uint64_t>(value),
      false, loc));
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned places) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned made = 0;
  for (int i = 0; i < 4; i++) made |= (bytes >> 8 * (places >> 4 * i & 7) & 0xff) << 8 * i;
  return made;
}
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
