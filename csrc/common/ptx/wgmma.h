// Hopper's products: four warps multiply tiles that lie in shared memory, asynchronously.
#pragma once

#include <type_traits>

#include "../platform.h"

namespace gemma4::ptx {

#ifndef GEMMA4_EMULATION

// Whether this code runs where they exist. A constant, so that the other way is not compiled.
DEVICE constexpr bool has_wgmma() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  return true;
#else
  return false;
#endif
}

// Between writing shared memory the ordinary way (cp.async too) and a barrier after which wgmma
// reads it.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The compiler takes a wgmma's sums for written, and its operands in registers for read, when it is
// issued. What it computes of them before or after may not pass this place.
template <class Registers>
DEVICE void fence_operand(Registers& registers) {
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
  fence_operand(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last groups are done; `sums` are theirs.
template <int kGroupsLeft, class Sums>
DEVICE void wgmma_wait(Sums& sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
  fence_operand(sums);
}

// d [64 x n] += a [64x16] bᵀ, b [n x 16], both in tiles as wgmma_tile describes them; one that is
// transposed lies there as [16 x 64], or [16 x n]. _trans: d += a b, a being an operand of
// mma_16816 and b [16 x n] such a tile. Warp w of the four holds rows 16 w ..; within them element
// e of d[i] stands as in an accumulator of mma_16816. d is undefined until its group is waited for.
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
#define WGMMA_OF_TILES(name, shape, numbers, sums, operands)                          \
  template <class T, bool kATransposed = false, bool kBTransposed = false>            \
  DEVICE void name(float (*d)[4], uint64_t a, uint64_t b) {                           \
    if constexpr (std::is_same_v<T, bf16>)                                            \
      asm volatile(WGMMA(shape, "bf16", numbers, operands)                            \
                   : sums                                                             \
                   : "l"(a), "l"(b), "n"(int{kATransposed}), "n"(int{kBTransposed})); \
    else                                                                              \
      asm volatile(WGMMA(shape, "f16", numbers, operands)                             \
                   : sums                                                             \
                   : "l"(a), "l"(b), "n"(int{kATransposed}), "n"(int{kBTransposed})); \
  }
WGMMA_OF_TILES(wgmma_64x32x16, "m64n32k16", NUMBERS_16, SUMS_16, "%16, %17, add, 1, 1, %18, %19")
WGMMA_OF_TILES(wgmma_64x64x16, "m64n64k16", NUMBERS_32, SUMS_32, "%32, %33, add, 1, 1, %34, %35")
WGMMA_OF_TILES(wgmma_64x128x16, "m64n128k16", NUMBERS_64, SUMS_64, "%64, %65, add, 1, 1, %66, %67")
#undef WGMMA_OF_TILES
#define WGMMA_OF_REGISTERS(T, type)                                                               \
  template <>                                                                                     \
  DEVICE void wgmma_64x128x16_trans<T>(float (*d)[4], const uint32_t (&a)[4], uint64_t b) {       \
    asm volatile(WGMMA("m64n128k16", type, NUMBERS_64, "{%64, %65, %66, %67}, %68, add, 1, 1, 1") \
                 : SUMS_64                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                           \
  }
WGMMA_OF_REGISTERS(bf16, "bf16")
WGMMA_OF_REGISTERS(fp16, "f16")
#undef WGMMA_OF_REGISTERS
#undef WGMMA
#undef SUMS_64
#undef SUMS_32
#undef SUMS_16
#undef FOUR
#undef NUMBERS_64
#undef NUMBERS_32
#undef NUMBERS_16

#else  // the twins

DEVICE bool has_wgmma() { return emulation::has_wgmma(); }
DEVICE void fence_async_proxy() { emulation::fence_async_proxy(); }
template <class Registers>
DEVICE void fence_operand(Registers&) {}
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
template <class T, bool kATransposed = false, bool kBTransposed = false>
DEVICE void wgmma_64x32x16(float (*d)[4], uint64_t a, uint64_t b FROM_HERE) {
  emulation::wgmma(*d, 32, a, b, kATransposed, kBTransposed, std::is_same_v<T, bf16> HERE);
}
template <class T, bool kATransposed = false, bool kBTransposed = false>
DEVICE void wgmma_64x64x16(float (*d)[4], uint64_t a, uint64_t b FROM_HERE) {
  emulation::wgmma(*d, 64, a, b, kATransposed, kBTransposed, std::is_same_v<T, bf16> HERE);
}
template <class T, bool kATransposed = false, bool kBTransposed = false>
DEVICE void wgmma_64x128x16(float (*d)[4], uint64_t a, uint64_t b FROM_HERE) {
  emulation::wgmma(*d, 128, a, b, kATransposed, kBTransposed, std::is_same_v<T, bf16> HERE);
}
template <class T>
DEVICE void wgmma_64x128x16_trans(float (*d)[4], const uint32_t (&a)[4], uint64_t b FROM_HERE) {
  emulation::wgmma_trans(*d, 128, a, b, std::is_same_v<T, bf16> HERE);
}

#endif

// How wgmma finds a tile of rows of 128 bytes whose 16-byte chunks are permuted as chunk_offset has
// it, which is its own 128-byte mode: where it begins (on a multiple of 1024 bytes; 16 further
// columns are 2 added), how far it is to the 64 columns beside these, which of a transposed
// tile alone is read, 1024 bytes from eight rows to the next, the mode.
DEVICE uint64_t wgmma_tile(uint32_t shared_address, uint32_t panel_bytes) {
  return uint64_t{(shared_address & 0x3ffff) >> 4} | uint64_t{panel_bytes >> 4} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

}  // namespace gemma4::ptx
