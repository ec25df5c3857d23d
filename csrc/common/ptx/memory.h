// Loads, stores and asynchronous copies, of global and of shared memory.
#pragma once

#include "../platform.h"

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

// Parameters that a dependent kernel asks for before it waits: by an instruction that, other than
// ld.global.nc, is not moved behind the wait.
DEVICE uint4 load_16_first(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

DEVICE uint2 load_8_first(const void* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p)
               : "memory");
  return v;
}

// One value of two or four bytes.
template <class T>
DEVICE T load_one_first(const T* p) {
  T value;
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(bits) : "l"(p) : "memory");
    __builtin_memcpy(&value, &bits, 2);
  } else {
    uint32_t bits;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
    __builtin_memcpy(&value, &bits, 4);
  }
  return value;
}

// What another block of this launch, or a kernel that this one waited for, has stored: neither
// stale nor moved to before the wait.
DEVICE uint4 load_16_coherent(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

DEVICE uint2 load_8_coherent(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
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

// Into L2, for a load to come.
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

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

#else  // the twins

DEVICE uint4 load_16(const void* p FROM_HERE) {
  uint4 value;
  emulation::load_read_only(&value, p, 16 HERE);
  return value;
}
DEVICE uint4 load_16_once(const void* p FROM_HERE) { return load_16(p HERE); }
DEVICE uint2 load_8(const void* p FROM_HERE) {
  uint2 value;
  emulation::load_read_only(&value, p, 8 HERE);
  return value;
}
DEVICE uint2 load_8_once(const void* p FROM_HERE) { return load_8(p HERE); }
DEVICE uint4 load_16_first(const void* p FROM_HERE) { return load_16(p HERE); }
DEVICE uint2 load_8_first(const void* p FROM_HERE) { return load_8(p HERE); }
template <class T>
DEVICE T load_one_first(const T* p FROM_HERE) {
  T value;
  emulation::load_read_only(&value, p, sizeof(T) HERE);
  return value;
}
DEVICE uint4 load_16_coherent(const void* p FROM_HERE) {
  uint4 value;
  emulation::load_global(&value, p, 16 HERE);
  return value;
}
DEVICE uint2 load_8_coherent(const void* p FROM_HERE) {
  uint2 value;
  emulation::load_global(&value, p, 8 HERE);
  return value;
}
DEVICE void store_16(void* p, uint4 value FROM_HERE) {
  emulation::store_global(p, &value, 16 HERE);
}
DEVICE void store_8(void* p, uint2 value FROM_HERE) { emulation::store_global(p, &value, 8 HERE); }

DEVICE void prefetch(const void*) {}

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

#endif

}  // namespace gemma4::ptx
