// What kernels that stream rows of weights past a few tokens do alike.
//
// Weights go from DRAM into registers, 16 bytes a lane, without shared memory and its barriers, and
// are one operand of mma.sync: tensor cores are idle here anyway, and one load of a weight serves
// all tokens. Columns may be permuted in a sum of products as long as both sides agree: a lane's 8
// neighbouring values are taken as the operands of two products, so that rows are read in whole
// sectors and nothing is exchanged.
#pragma once

#include "ptx.h"

namespace gemma4 {

DEVICE uint4 load_first_if(bool exists, const void* p FROM_HERE) {
  return exists ? ptx::load_16_first(p HERE) : uint4{0, 0, 0, 0};
}
DEVICE uint4 load_fresh_if(bool exists, const void* p FROM_HERE) {
  return exists ? ptx::load_16_coherent(p HERE) : uint4{0, 0, 0, 0};
}
DEVICE uint2 load_8_fresh_if(bool exists, const void* p FROM_HERE) {
  return exists ? ptx::load_8_coherent(p HERE) : uint2{0, 0};
}
DEVICE uint4 load_once_if(bool exists, const void* p FROM_HERE) {
  return exists ? ptx::load_16_once(p HERE) : uint4{0, 0, 0, 0};
}

// d [16 x 8] += a bᵀ over 32 columns of both: a lane holds 8 of row lane / 4 of a, of row 8 + lane
// / 4, and of row lane / 4 of b.
template <class T>
DEVICE void multiply(float (&d)[4], uint4 a, uint4 a_8, uint4 b FROM_HERE) {
  ptx::mma_16816<T>(d, {a.x, a_8.x, a.y, a_8.y}, b.x, b.y HERE);
  ptx::mma_16816<T>(d, {a.z, a_8.z, a.w, a_8.w}, b.z, b.w HERE);
}

}  // namespace gemma4
