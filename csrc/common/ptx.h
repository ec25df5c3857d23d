// Every instruction that CUDA C++ does not offer as such: a wrapper in PTX, and below, in the same
// order, its twin for the emulator. The only file with inline assembly.
//
// The compiler checks the PTX for syntax alone; that a wrapper and its twin mean the same is for
// the reader to see, which is why they stand in one file.
#pragma once

#include <type_traits>

#include "platform.h"

// A wrapper's last parameter and argument: under emulation the caller's place in the source, so
// that reports and counts name the kernel's line and not the wrapper's.
#ifdef GEMMA4_EMULATION
#define FROM_HERE , ::emulation::Loc loc = ::emulation::Loc::current()
#define HERE , loc
#else
#define FROM_HERE
#define HERE
#endif

namespace gemma4::ptx {

#ifndef GEMMA4_EMULATION

// ---- global memory, 16 or 8 bytes at a time

// Read-only for the whole launch, so the compiler may move it and batch it with others.
DEVICE uint4 load_16(const void* p) {
  uint4 v;
  asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

// The same for what nobody reads again: it must not push weights out of L1.
DEVICE uint4 load_16_once(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

DEVICE uint2 load_8(const void* p) {
  uint2 v;
  asm("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

DEVICE uint2 load_8_once(const void* p) {
  uint2 v;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

DEVICE void store_16(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

DEVICE void store_8(void* p, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

// ---- shared memory

DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8x8 matrices of 16-bit values; lanes 8i..8i+7 give the 16-byte aligned rows of matrix i.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

#if __CUDA_ARCH__ >= 900
DEVICE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
#endif

// Copies kBytes (4, 8 or 16, both sides aligned to them) of which the last kBytes - bytes_read are
// zeros and not read. Lands when its group is waited for, and not before.
template <int kBytes>
DEVICE void cp_async(uint32_t to, const void* from, int bytes_read) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(bytes_read)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(bytes_read)
                 : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kGroupsLeft>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// ---- barriers of some of a block's warps; 0 is __syncthreads' own

DEVICE void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- arithmetic

// d [16x8] += a [16x16] b [16x8], fp32 accumulators.
template <class T>
DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
DEVICE void mma_16816<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
DEVICE void mma_16816<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x within 2 ulp; subnormal results are zero.
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Hopper's products: four warps multiply tiles that lie in shared memory, asynchronously

// Whether this code runs where they exist. A constant, so that the other way is not compiled.
DEVICE constexpr bool has_wgmma() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  return true;
#else
  return false;
#endif
}

// Ends the launch with an error.
DEVICE void trap() { asm volatile("trap;"); }

// Between writing shared memory the ordinary way (cp.async too) and a barrier after which wgmma
// reads it.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The compiler takes a wgmma's sums for written, and its operands in registers for read, when it is
// issued. What it computes of them before or after may not pass this place.
template <class Registers>
DEVICE void hold(Registers& registers) {
  using Value = std::remove_all_extents_t<Registers>;
#pragma unroll
  for (int i = 0; i < int(sizeof(Registers) / 4); i++)
    if constexpr (std::is_same_v<Value, float>)
      asm volatile("" : "+f"(reinterpret_cast<Value*>(&registers)[i])::"memory");
    else
      asm volatile("" : "+r"(reinterpret_cast<Value*>(&registers)[i])::"memory");
}

// Before the first wgmma that adds to these sums, and before each that follows another access to
// them.
template <class Sums>
DEVICE void wgmma_fence(Sums& sums) {
  hold(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last groups are done; `sums` are theirs.
template <int kGroupsLeft, class Sums>
DEVICE void wgmma_wait(Sums& sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
  hold(sums);
}

// d [64 x n] += a [64x16] bᵀ, b [n x 16], both in tiles as wgmma_tile describes them; _trans: d +=
// a b, a being an operand of mma_16816 and b [16 x n] such a tile. Warp w of the four holds rows
// 16 w ..; within them element e of d[i] stands as in an accumulator of mma_16816. d is undefined
// until its group is waited for.
template <class T>
DEVICE void wgmma_64x32x16(float (*d)[4], uint64_t a, uint64_t b);
template <class T>
DEVICE void wgmma_64x64x16(float (*d)[4], uint64_t a, uint64_t b);
template <class T>
DEVICE void wgmma_64x128x16(float (*d)[4], uint64_t a, uint64_t b);
template <class T>
DEVICE void wgmma_64x128x16_trans(float (*d)[4], const uint32_t (&a)[4], uint64_t b);

#define NUMBERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS_32 \
  NUMBERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_64                                                                   \
  NUMBERS_32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SUMS_16 FOUR(0), FOUR(1), FOUR(2), FOUR(3)
#define SUMS_32 SUMS_16, FOUR(4), FOUR(5), FOUR(6), FOUR(7)
#define SUMS_64 \
  SUMS_32, FOUR(8), FOUR(9), FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)
// d is added to; neither operand is negated.
#define WGMMA(shape, type, sums, operands)     \
  "{ .reg .pred add; setp.eq.u32 add, 0, 0;\n" \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" sums "}, " operands "; }"
#define WGMMAS(T, type)                                                                           \
  template <>                                                                                     \
  DEVICE void wgmma_64x32x16<T>(float (*d)[4], uint64_t a, uint64_t b) {                          \
    asm volatile(WGMMA("m64n32k16", type, NUMBERS_16, "%16, %17, add, 1, 1, 0, 0")                \
                 : SUMS_16                                                                        \
                 : "l"(a), "l"(b));                                                               \
  }                                                                                               \
  template <>                                                                                     \
  DEVICE void wgmma_64x64x16<T>(float (*d)[4], uint64_t a, uint64_t b) {                          \
    asm volatile(WGMMA("m64n64k16", type, NUMBERS_32, "%32, %33, add, 1, 1, 0, 0")                \
                 : SUMS_32                                                                        \
                 : "l"(a), "l"(b));                                                               \
  }                                                                                               \
  template <>                                                                                     \
  DEVICE void wgmma_64x128x16<T>(float (*d)[4], uint64_t a, uint64_t b) {                         \
    asm volatile(WGMMA("m64n128k16", type, NUMBERS_64, "%64, %65, add, 1, 1, 0, 0")               \
                 : SUMS_64                                                                        \
                 : "l"(a), "l"(b));                                                               \
  }                                                                                               \
  template <>                                                                                     \
  DEVICE void wgmma_64x128x16_trans<T>(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {       \
    asm volatile(WGMMA("m64n128k16", type, NUMBERS_64, "{%64, %65, %66, %67}, %68, add, 1, 1, 1") \
                 : SUMS_64                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                           \
  }
WGMMAS(bf16, "bf16")
WGMMAS(fp16, "f16")
#undef WGMMAS
#undef WGMMA
#undef SUMS_64
#undef SUMS_32
#undef SUMS_16
#undef FOUR
#undef NUMBERS_64
#undef NUMBERS_32
#undef NUMBERS_16

// ---- dependent launches, for kernels that start while their predecessor still runs

#if __CUDA_ARCH__ >= 900
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
#else
DEVICE void wait_for_previous_kernel() {}
DEVICE void let_next_kernel_start() {}
#endif

#else  // GEMMA4_EMULATION: the twins

DEVICE uint4 load_16(const void* p FROM_HERE) {
  uint4 value;
  emulation::load(&value, p, 16 HERE);
  return value;
}
DEVICE uint4 load_16_once(const void* p FROM_HERE) { return load_16(p HERE); }
DEVICE uint2 load_8(const void* p FROM_HERE) {
  uint2 value;
  emulation::load(&value, p, 8 HERE);
  return value;
}
DEVICE uint2 load_8_once(const void* p FROM_HERE) { return load_8(p HERE); }
DEVICE void store_16(void* p, uint4 value FROM_HERE) { emulation::store(p, &value, 16 HERE); }
DEVICE void store_8(void* p, uint2 value FROM_HERE) { emulation::store(p, &value, 8 HERE); }

DEVICE uint32_t shared_address(const void* p FROM_HERE) {
  return emulation::shared_address(p HERE);
}
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row FROM_HERE) {
  emulation::ldmatrix(r, 4, false, row HERE);
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row FROM_HERE) {
  emulation::ldmatrix(r, 4, true, row HERE);
}
DEVICE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4] FROM_HERE) {
  emulation::stmatrix(r, 4, false, row HERE);
}
template <int kBytes>
DEVICE void cp_async(uint32_t to, const void* from, int bytes_read FROM_HERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::copy_async(to, from, kBytes, bytes_read HERE);
}
DEVICE void cp_async_commit() { emulation::copy_async_commit(); }
template <int kGroupsLeft>
DEVICE void cp_async_wait(emulation::Loc loc = emulation::Loc::current()) {
  emulation::copy_async_wait(kGroupsLeft, loc);
}

DEVICE void barrier_sync(int id, int threads FROM_HERE) {
  emulation::barrier_sync(id, threads HERE);
}
DEVICE void barrier_arrive(int id, int threads FROM_HERE) {
  emulation::barrier_arrive(id, threads HERE);
}

template <class T>
DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 FROM_HERE) {
  const uint32_t b[2] = {b0, b1};
  emulation::mma_16816(d, a, b, std::is_same_v<T, bf16> HERE);
}
DEVICE float exp2_approx(float x) { return ::exp2f(x); }

DEVICE bool has_wgmma() { return emulation::has_wgmma(); }
using emulation::trap;
DEVICE void fence_async_proxy() { emulation::fence_async_proxy(); }
template <class Registers>
DEVICE void hold(Registers&) {}
template <class Sums>
DEVICE void wgmma_fence(Sums& FROM_HERE) {
  emulation::wgmma_fence(loc);
}
DEVICE void wgmma_commit(emulation::Loc loc = emulation::Loc::current()) {
  emulation::wgmma_commit(loc);
}
template <int kGroupsLeft, class Sums>
DEVICE void wgmma_wait(Sums& FROM_HERE) {
  emulation::wgmma_wait(kGroupsLeft, loc);
}
template <class T>
DEVICE void wgmma_64x32x16(float (*d)[4], uint64_t a, uint64_t b FROM_HERE) {
  emulation::wgmma(*d, 32, a, b, std::is_same_v<T, bf16> HERE);
}
template <class T>
DEVICE void wgmma_64x64x16(float (*d)[4], uint64_t a, uint64_t b FROM_HERE) {
  emulation::wgmma(*d, 64, a, b, std::is_same_v<T, bf16> HERE);
}
template <class T>
DEVICE void wgmma_64x128x16(float (*d)[4], uint64_t a, uint64_t b FROM_HERE) {
  emulation::wgmma(*d, 128, a, b, std::is_same_v<T, bf16> HERE);
}
template <class T>
DEVICE void wgmma_64x128x16_trans(float (*d)[4], const uint32_t (&a)[4], uint64_t b FROM_HERE) {
  emulation::wgmma_trans(*d, 128, a, b, std::is_same_v<T, bf16> HERE);
}

// Launches follow one another, so there is nothing to wait for.
DEVICE void wait_for_previous_kernel() {}
DEVICE void let_next_kernel_start() {}

#endif

// How wgmma finds a tile of rows of 128 bytes whose 16-byte chunks are permuted as chunk_offset has
// it, which is its own 128-byte mode: where it begins (on a multiple of 1024 bytes; 16 further
// columns are 2 added), how far it is to the 64 columns beside these, which _trans alone reads,
// 1024 bytes from eight rows to the next, the mode.
DEVICE uint64_t wgmma_tile(uint32_t shared_address, uint32_t panel_bytes) {
  return uint64_t{(shared_address & 0x3ffff) >> 4} | uint64_t{panel_bytes >> 4} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

}  // namespace gemma4::ptx
