// What the ops' parameters are made of. Plain pointers and numbers, known to neither torch nor
// CUDA; each family's ops.h puts them together and declares what launches an op.
//
// Rows are `stride` elements apart and contiguous within; an absent tensor is a null pointer.
// Shape letters as in gemma4_kernels/ops.
#pragma once

#include <cstdint>

namespace gemma4 {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Of an op's x, of what x meets (a residual, a table) and of its weights. `other` is x's dtype or
// float32, and `weight` is `other` or float32: the mixes that autocast makes.
struct DTypes {
  DType x, other, weight;
};

// Where and on what a launch happens; read once per call by the bindings.
struct Device {
  void* stream;
  int sm_count;
  int max_smem_bytes;               // of one block
  int capability;                   // the major number: 9 on Hopper
  int index = 0;                    // among the devices
  bool dependent_launches = false;  // whether kernels may start while others run
};

// int32 or int64, as they come: positions, slots, ids.
struct Indices {
  const void* data;
  bool is_64;
};

// Numbers that need not have the op's dtype: what a router made.
struct Floats {
  const void* data;
  DType dtype;
};

}  // namespace gemma4
