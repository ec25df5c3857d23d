// The cards that a launch may be on.
#pragma once

namespace gemma4 {

// What the choice of a tile depends on.
struct Card {
  int max_smem_bytes;  // of one block
  bool wgmma;
};

// Those that run this code, so that no code is made of what a launcher never chooses there. sm_80's
// runs on all that have no code of their own, and the emulator is any of them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr Card kCards[] = {{227 << 10, true}};
#elif __CUDA_ARCH__ >= 1200
constexpr Card kCards[] = {{99 << 10, false}};
#elif __CUDA_ARCH__ >= 1000
constexpr Card kCards[] = {{227 << 10, false}};
#else
constexpr Card kCards[] = {{99 << 10, false}, {227 << 10, false}, {227 << 10, true}};
#endif

}  // namespace gemma4
