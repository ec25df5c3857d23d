// Who waits for whom: some of a block's warps, one block for others, one kernel for another; and
// the end of a launch.
#pragma once

#include "../platform.h"

namespace gemma4::ptx {

#ifndef GEMMA4_EMULATION

// ---- barriers of some of a block's warps; 0 is __syncthreads' own

DEVICE void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- blocks of one launch

// One more on a counter in global memory, and how many there were before. One thread does it for
// its block, between two __syncthreads: what the block stored before is there for those who count
// more, if they do not read it by `load_16` and its like, which may be stale.
DEVICE unsigned arrive(unsigned* counter) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

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

// Ends the launch with an error.
DEVICE void trap() { asm volatile("trap;"); }

#else  // the twins

DEVICE void barrier_sync(int id, int threads FROM_HERE) {
  emulation::barrier_sync(id, threads HERE);
}
DEVICE void barrier_arrive(int id, int threads FROM_HERE) {
  emulation::barrier_arrive(id, threads HERE);
}

DEVICE unsigned arrive(unsigned* counter FROM_HERE) {
  return static_cast<unsigned>(
      emulation::atomic(counter, 4, [](uint64_t a, uint64_t b) { return a + b; }, 1, true HERE));
}

// Launches follow one another; what counts is what was touched before.
DEVICE void wait_for_previous_kernel() { emulation::wait_for_previous_kernel(); }
DEVICE void let_next_kernel_start() {}

using emulation::trap;

#endif

}  // namespace gemma4::ptx
