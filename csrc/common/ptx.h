// Every instruction that CUDA C++ does not offer as such: a wrapper in PTX, and below, in the same
// order, its twin for the emulator. The only place with inline assembly.
//
// The compiler checks the PTX for syntax alone; that a wrapper and its twin mean the same is for
// the reader to see, which is why they stand in one file.
#pragma once

#include "ptx/barrier.h"
#include "ptx/memory.h"
#include "ptx/mma.h"
#include "ptx/wgmma.h"
