// Tiny kernels, right and wrong, that the emulator must let pass or must name. Run with the name of
// one; prints the finding, or "clean". The expected findings stand in test_emulation.py. Longer
// than 400 lines for one table names them all.
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/ptx.h"
#include "common/tile.cuh"

using namespace gemma4;

namespace {

struct Bytes {
  alignas(1024) unsigned char data[16384];
};
struct Words {
  int data[1024];
};

template <class F>
void run(dim3 grid, int threads, F body, size_t smem_bytes = 16384, bool dependent = false) {
  emulation::launch(
      "check", grid, threads, smem_bytes, [](void* f) { (*static_cast<F*>(f))(); }, &body,
      sizeof body, dependent);
}
template <class F>
void run(int threads, F body) {
  run(1, threads, body);
}

template <class T>
void keep(T value) {
  asm volatile("" ::"r,m"(value) : "memory");
}

alignas(256) unsigned global_memory[1024];
alignas(256) unsigned global_output[1024];

void allow_globals() {
  emulation::allow(global_memory, sizeof global_memory, "input", false);
  emulation::allow(global_output, sizeof global_output, "output", true);
}

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("wrong: ") + what);
}

// ---- shared memory and barriers

void exchange(bool synced) {
  run(64, [=] {
    auto& words = shared_memory<Words>().data;
    words[threadIdx.x] = 1;
    if (synced) __syncthreads();
    keep(words[63 - threadIdx.x]);
  });
}

void reuse(bool synced) {
  run(64, [=] {
    auto& words = shared_memory<Words>().data;
    for (int turn = 0; turn < 3; turn++) {
      words[threadIdx.x] = turn;
      __syncthreads();
      keep(words[63 - threadIdx.x]);
      if (synced) __syncthreads();
    }
  });
}

void warp_exchange(bool synced) {
  run(32, [=] {
    auto& words = shared_memory<Words>().data;
    words[threadIdx.x] = 1;
    if (synced)
      __syncwarp();
    else
      __shfl_xor_sync(~0u, 1, 1);
    keep(words[31 - threadIdx.x]);
  });
}

void named_barriers(int threads_of_second) {
  run(96, [=] {
    auto& words = shared_memory<Words>().data;
    if (threadIdx.x < 32) {
      words[threadIdx.x] = 7;
      ptx::barrier_arrive(1, 96);
    } else {
      ptx::barrier_sync(1, threadIdx.x < 64 ? 96 : threads_of_second);
      keep(words[threadIdx.x - 32 & 31]);
    }
  });
}

void neighbouring_bytes() {
  run(64, [] {
    auto& bytes = shared_memory<Bytes>().data;
    bytes[threadIdx.x] = 1;
    __syncthreads();
    keep(bytes[63 - threadIdx.x]);
  });
}

void poisoned_shared() {
  run(32, [] {
    require(shared_memory<Words>().data[threadIdx.x] == -1, "shared memory is not poisoned");
  });
}

void poisoned_at_every_block() {
  run(8, 32, [] {
    auto& words = shared_memory<Words>().data;
    require(words[threadIdx.x] == -1, "a block sees its predecessor's shared memory");
    words[threadIdx.x] = 5;
  });
}

// ---- warps

void shuffles() {
  run(32, [] {
    const int lane = threadIdx.x;
    require(__shfl_sync(~0u, lane, 5) == 5, "shfl");
    require(__shfl_sync(~0u, lane, 5, 8) == (lane & 24) + 5, "shfl within 8");
    require(__shfl_xor_sync(~0u, lane, 3) == (lane ^ 3), "shfl_xor");
    require(__shfl_up_sync(~0u, lane, 2) == (lane < 2 ? lane : lane - 2), "shfl_up");
    require(__shfl_down_sync(~0u, lane, 2) == (lane > 29 ? lane : lane + 2), "shfl_down");
    require(__shfl_down_sync(~0u, lane, 2, 8) == (lane % 8 > 5 ? lane : lane + 2), "down within 8");
    require(__ballot_sync(~0u, lane % 2) == 0xaaaaaaaa, "ballot");
    if (lane < 16) {
      require(__shfl_xor_sync(0xffffu, lane, 8) == (lane ^ 8), "half a warp");
      require(__shfl_xor_sync(0xffffu, lane, 16) == -1, "a lane outside the mask");
    }
  });
}

// ---- matrix fragments, by the tables of the PTX ISA

int row_of_a(int lane, int i) { return i / 2 % 2 == 0 ? lane / 4 : lane / 4 + 8; }
int column_of_a(int lane, int i) { return lane % 4 * 2 + i % 2 + (i < 4 ? 0 : 8); }
int row_of_b(int lane, int i) { return lane % 4 * 2 + i % 2 + (i < 2 ? 0 : 8); }
int column_of_b(int lane, int) { return lane / 4; }
int row_of_c(int lane, int i) { return i < 2 ? lane / 4 : lane / 4 + 8; }
int column_of_c(int lane, int i) { return lane % 4 * 2 + i % 2; }

template <class T>
uint32_t pair(float low, float high) {
  const T values[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  __builtin_memcpy(&bits, values, 4);
  return bits;
}

template <class T>
void mma_elements() {
  run(32, [] {
    const int lane = threadIdx.x;
    // A one at (m, k) of A and at (k, n) of B makes a one at (m, n), for each m, k, n.
    for (int m = 0; m < 16; m++)
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) {
          uint32_t a[4], b[2];
          const auto in_a = [&](int i) {
            return row_of_a(lane, i) == m && column_of_a(lane, i) == k ? 1.0f : 0.0f;
          };
          const auto in_b = [&](int i) {
            return row_of_b(lane, i) == k && column_of_b(lane, i) == n ? 1.0f : 0.0f;
          };
          for (int i = 0; i < 4; i++) a[i] = pair<T>(in_a(2 * i), in_a(2 * i + 1));
          for (int i = 0; i < 2; i++) b[i] = pair<T>(in_b(2 * i), in_b(2 * i + 1));
          float d[4] = {2, 2, 2, 2};
          ptx::mma_16816<T>(d, a, b[0], b[1]);
          for (int i = 0; i < 4; i++)
            require(d[i] == (row_of_c(lane, i) == m && column_of_c(lane, i) == n ? 3 : 2), "mma");
        }
  });
}

void ldmatrix_elements() {
  run(32, [] {
    struct Matrices {
      alignas(16) uint16_t values[4][8][8];
    };
    auto& m = shared_memory<Matrices>().values;
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) m[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(i);
    __syncwarp();
    uint32_t r[4];
    ptx::ldmatrix_x4(r, ptx::shared_address(m[lane / 8][lane % 8]));
    for (int i = 0; i < 4; i++) {
      const uint32_t first = i * 64 + lane / 4 * 8 + lane % 4 * 2;
      require(r[i] == (first | (first + 1) << 16), "ldmatrix");
    }
    ptx::ldmatrix_x4_trans(r, ptx::shared_address(m[lane / 8][lane % 8]));
    for (int i = 0; i < 4; i++) {
      const uint32_t first = i * 64 + lane % 4 * 2 * 8 + lane / 4;
      require(r[i] == (first | (first + 8) << 16), "ldmatrix.trans");
    }
    ptx::ldmatrix_x4(r, ptx::shared_address(m[lane / 8][lane % 8]));
    for (uint32_t& pair : r) pair += 0x00010001;
    __syncwarp();
    ptx::stmatrix_x4(ptx::shared_address(m[lane / 8][lane % 8]), r);
    __syncwarp();
    for (int i = lane; i < 256; i += 32) require(m[i / 64][i / 8 % 8][i % 8] == i + 1, "stmatrix");
  });
}

// ---- asynchronous copies

void copy(int groups_left, bool synced, int bytes_read = 16) {
  allow_globals();
  run(64, [=] {
    auto& words = shared_memory<Words>().data;
    ptx::cp_async<16>(ptx::shared_address(&words[threadIdx.x * 4]), &global_memory[threadIdx.x * 4],
                      bytes_read);
    ptx::cp_async_commit();
    if (groups_left == 0) ptx::cp_async_wait<0>();
    if (synced) __syncthreads();
    const int neighbour = 63 - threadIdx.x;
    keep(words[neighbour * 4]);
    if (groups_left == 0 && synced)
      for (int i = 0; i < 4; i++)
        require(words[neighbour * 4 + i] == (i * 4 < bytes_read ? neighbour * 4 + i : 0),
                "cp.async");
    ptx::cp_async_wait<0>();
  });
}

// ---- wgmma

struct Operands {
  alignas(1024) uint16_t a[64 * 64], b[128 * 64];
};

enum class Wgmma {
  kRight,
  kWaitedTooLittle,
  kNoFence,
  kNoProxyFence,
  kNotWaited,
  kNotCommitted,
  kOverwritten,
  kMode
};

// The product of whole numbers, which every type holds exactly, against its definition.
template <class T>
void wgmma(Wgmma kind) {
  auto body = [=] {
    auto& smem = shared_memory<Operands>();
    const auto a = [](int row, int column) { return float((row * 7 + column * 3) % 11 - 5); };
    const auto b = [](int row, int column) { return float((row * 5 + column * 2) % 13 - 6); };
    const auto fill = [](uint16_t* tile, int rows, auto value) {
      for (int i = threadIdx.x; i < rows * 64; i += 128) {
        const T x = from_float<T>(value(i / 64, i % 64));
        __builtin_memcpy(tile + (i / 64 * 64 + ((i % 64 / 8) ^ (i / 64 & 7)) * 8 + i % 8), &x, 2);
      }
    };
    fill(smem.a, 64, a);
    fill(smem.b, 128, b);
    if (kind != Wgmma::kNoProxyFence) ptx::fence_async_proxy();
    __syncthreads();

    float d[16][4] = {};
    for (auto& four : d) four[0] = 1.0f;
    const uint64_t mode = kind == Wgmma::kMode ? uint64_t{3} << 62 : 0;
    const uint64_t tile_a = wgmma_tile<64>(smem.a, 0, 0) ^ mode;
    const uint64_t tile_b = wgmma_tile<128>(smem.b, 0, 0) ^ mode;
    for (int k = 0; k < 64; k += 16) {
      if (kind != Wgmma::kNoFence || k == 0) ptx::wgmma_fence(d);
      ptx::wgmma_64x128x16<T>(d, tile_a + k / 8, tile_b + k / 8);
      if (kind != Wgmma::kNotCommitted) ptx::wgmma_commit();
    }
    if (kind == Wgmma::kOverwritten && threadIdx.x == 0) smem.a[0] = 0;
    if (kind != Wgmma::kNotWaited) ptx::wgmma_wait<1>(d);
    if (kind != Wgmma::kNotWaited && kind != Wgmma::kWaitedTooLittle) ptx::wgmma_wait<0>(d);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int n = 0; n < 16; n++)
      for (int e = 0; e < 4; e++) {
        const int row = warp * 16 + lane / 4 + e / 2 * 8, column = n * 8 + lane % 4 * 2 + e % 2;
        float sum = e == 0;
        for (int k = 0; k < 64; k++) sum += a(row, k) * b(column, k);
        if (kind == Wgmma::kRight) require(d[n][e] == sum, "wgmma");
        keep(d[n][e]);
      }
  };
  emulation::launch(
      "check", 1, 128, sizeof(Operands), [](void* f) { (*static_cast<decltype(body)*>(f))(); },
      &body, sizeof body);
}

// The same of an operand in registers and rows of b, in two panels, that are summed over.
template <class T>
void wgmma_trans() {
  auto body = [=] {
    auto& tile = shared_memory<Operands>().b;
    const auto a = [](int row, int k) { return float((row * 7 + k * 3) % 11 - 5); };
    const auto b = [](int k, int column) { return float((k * 5 + column * 2) % 13 - 6); };
    for (int i = threadIdx.x; i < 64 * 128; i += 128) {
      const int k = i / 128, column = i % 128;
      const T x = from_float<T>(b(k, column));
      __builtin_memcpy(tile + chunk_offset<64>(k, column / 8) + column % 8, &x, 2);
    }
    ptx::fence_async_proxy();
    __syncthreads();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp * 16 + lane / 4;
    float d[16][4] = {};
    ptx::wgmma_fence(d);
    for (int k = 0; k < 64; k += 16) {
      uint32_t operand[4];
      for (int i = 0; i < 4; i++) {
        const int r = row + i % 2 * 8, c = k + i / 2 * 8 + lane % 4 * 2;
        operand[i] = pack_pair<T>(a(r, c), a(r, c + 1));
      }
      ptx::wgmma_64x128x16_trans<T>(d, operand, wgmma_tile<64>(tile, k, 0));
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    for (int n = 0; n < 16; n++)
      for (int e = 0; e < 4; e++) {
        float sum = 0;
        for (int k = 0; k < 64; k++)
          sum += a(row + e / 2 * 8, k) * b(k, n * 8 + lane % 4 * 2 + e % 2);
        require(d[n][e] == sum, "wgmma_trans");
      }
  };
  emulation::launch(
      "check", 1, 128, sizeof(Operands), [](void* f) { (*static_cast<decltype(body)*>(f))(); },
      &body, sizeof body);
}

// The same of two tiles, of whose rows products are sums.
template <class T>
void wgmma_of_transposed() {
  auto body = [=] {
    auto& smem = shared_memory<Operands>();
    const auto a = [](int k, int row) { return float((row * 7 + k * 3) % 11 - 5); };
    const auto b = [](int k, int column) { return float((k * 5 + column * 2) % 13 - 6); };
    const auto fill = [](uint16_t* tile, int columns, auto value) {
      for (int i = threadIdx.x; i < 64 * columns; i += 128) {
        const T x = from_float<T>(value(i / columns, i % columns));
        __builtin_memcpy(tile + chunk_offset<64>(i / columns, i % columns / 8) + i % 8, &x, 2);
      }
    };
    fill(smem.a, 64, a);
    fill(smem.b, 128, b);
    ptx::fence_async_proxy();
    __syncthreads();

    float d[16][4] = {};
    ptx::wgmma_fence(d);
    for (int k = 0; k < 64; k += 16)
      ptx::wgmma_64x128x16<T, true, true>(d, wgmma_tile<64>(smem.a, k, 0),
                                          wgmma_tile<64>(smem.b, k, 0));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, lane = threadIdx.x % 32;
    for (int n = 0; n < 16; n++)
      for (int e = 0; e < 4; e++) {
        float sum = 0;
        for (int k = 0; k < 64; k++)
          sum += a(k, row + e / 2 * 8) * b(k, n * 8 + lane % 4 * 2 + e % 2);
        require(d[n][e] == sum, "wgmma of transposed tiles");
      }
  };
  emulation::launch(
      "check", 1, 128, sizeof(Operands), [](void* f) { (*static_cast<decltype(body)*>(f))(); },
      &body, sizeof body);
}

// ---- several blocks

void exchange_globally(bool synced) {
  allow_globals();
  run(64, [=] {
    global_output[threadIdx.x] = 1;
    if (synced) __syncthreads();
    keep(global_output[63 - threadIdx.x]);
  });
}

enum class Gather {
  kRight,
  kRelaxed,       // the counter is no release
  kFences,        // but fences stand around it
  kFenceBefore,   // or only before it
  kNoBarrier,     // before a block counts itself in
  kOtherCounter,  // for each block
  kNotPassedOn,   // but by a shuffle, which orders no memory
  kReadOnly,      // loads that may be stale
  kNoReset,
};

// The last of four blocks reads what all have stored.
void gather(Gather how) {
  allow_globals();
  global_output[512] = 0;
  const auto body = [=] {
    struct Smem {
      bool last;
    };
    auto& smem = shared_memory<Smem>();
    bool last = false;
    global_output[blockIdx.x * 64 + threadIdx.x] = 1;
    if (how != Gather::kNoBarrier) __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* counter = global_output + 512 + (how == Gather::kOtherCounter ? blockIdx.x : 0);
      unsigned before;
      if (how == Gather::kFences || how == Gather::kFenceBefore) __threadfence();
      if (how >= Gather::kRelaxed && how <= Gather::kFenceBefore)
        before = atomicAdd(counter, 1u);
      else
        before = ptx::arrive(counter);
      if (how == Gather::kFences) __threadfence();
      smem.last = last = before == 3 || (how == Gather::kOtherCounter && blockIdx.x == 3);
    }
    if (how == Gather::kNotPassedOn) {
      if (threadIdx.x >= 32 || !__shfl_sync(~0u, last, 0)) return;
    } else {
      __syncthreads();
      if (!smem.last) return;  // most blocks end early
    }
    for (int i = 0; i < 4; i++) {
      const unsigned* from = global_output + i * 64 + threadIdx.x / 4 * 4;
      keep((how == Gather::kReadOnly ? ptx::load_16(from) : ptx::load_16_coherent(from)).x);
    }
    if (how != Gather::kNoReset && threadIdx.x == 0) global_output[512] = 0;
  };
  run(4, 64, body);
  if (how != Gather::kNoReset && how != Gather::kRight) return;
  run(4, 64, body);
  require(global_output[512] == 0, "the counter was not left at zero");
}

// ---- dependent launches

enum class Dependent { kRight, kReadsEarly, kWritesEarly, kCopiesEarly, kReadOnly, kNoWait };

void dependent(Dependent how) {
  emulation::settings().parameters = {"weights"};
  allow_globals();
  alignas(256) static unsigned weights[128];
  emulation::allow(weights, sizeof weights, "weights", false);
  run(
      2, 32,
      [=] {
        const int i = (blockIdx.x * 32 + threadIdx.x) * 4;
        const unsigned weight = ptx::load_16(weights + i % 128).x;
        if (how == Dependent::kReadsEarly) keep(global_memory[i]);
        if (how == Dependent::kWritesEarly) global_output[i] = weight;
        if (how == Dependent::kCopiesEarly) {
          ptx::cp_async<16>(ptx::shared_address(&shared_memory<Words>().data[threadIdx.x * 4]),
                            &global_memory[i], 16);
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
        }
        if (how == Dependent::kNoWait) return;
        ptx::wait_for_previous_kernel();
        const uint4 x = how == Dependent::kReadOnly ? ptx::load_16(global_memory + i)
                                                    : ptx::load_16_coherent(global_memory + i);
        global_output[i] = weight + x.x;
      },
      16384, true);
}

// ---- counts

void bank_conflicts(int stride, int expected) {
  emulation::settings().profile = true;
  run(32, [=] {
    auto& words = shared_memory<Words>().data;
    words[threadIdx.x * stride] = 1;
  });
  uint64_t wavefronts = 0;
  for (const auto& site : emulation::counts().sites) wavefronts += site.wavefronts;
  require(int(wavefronts) == expected, ("wavefronts: " + std::to_string(wavefronts)).c_str());
}

void sectors(int stride, int expected) {
  allow_globals();
  emulation::settings().profile = true;
  run(32, [=] { keep(global_memory[threadIdx.x * stride]); });
  uint64_t sectors = 0;
  for (const auto& site : emulation::counts().sites) sectors += site.sectors;
  require(int(sectors) == expected, ("sectors: " + std::to_string(sectors)).c_str());
}

const std::map<std::string, void (*)()> kChecks = {
    {"exchange", [] { exchange(true); }},
    {"exchange without barrier", [] { exchange(false); }},
    {"reuse", [] { reuse(true); }},
    {"reuse without barrier", [] { reuse(false); }},
    {"warp exchange", [] { warp_exchange(true); }},
    {"a shuffle orders no memory", [] { warp_exchange(false); }},
    {"named barriers", [] { named_barriers(96); }},
    {"barrier counts differ", [] { named_barriers(64); }},
    {"neighbouring bytes", neighbouring_bytes},
    {"poisoned shared memory", poisoned_shared},
    {"poisoned at every block", poisoned_at_every_block},
    {"shared memory out of bounds",
     [] {
       run(32, [] { *(volatile int*)(shared_memory<Words>().data + 4096 + threadIdx.x) = 1; });
     }},
    {"more shared memory than launched with",
     [] {
       struct Large {
         int data[8192];
       };
       run(32, [] { shared_memory<Large>().data[0] = 1; });
     }},
    {"barrier under a branch",
     [] {
       run(64, [] {
         if (threadIdx.x < 32) __syncthreads();
       });
     }},
    {"two barriers for one",
     [] {
       run(64, [] {
         if (threadIdx.x < 32)
           __syncthreads();
         else
           __syncthreads();
       });
     }},
    {"endless loop without calls",
     [] {
       emulation::settings().max_seconds = 0.3;
       const uint64_t end = ~uint64_t{0};
       run(64, [=] {
         uint64_t sum = 0;
         for (uint64_t i = 0; i < end; i++) keep(sum += i);
       });
     }},
    {"waiting for a later block",
     [] {
       emulation::settings().max_seconds = 0.3;
       allow_globals();
       global_output[0] = 0;
       run(2, 32, [] {
         if (threadIdx.x == 0) atomicAdd(&global_output[0], 1u);
         while (atomicAdd(&global_output[0], 0u) < 2u) {
         }
       });
     }},
    {"endless spinning",
     [] {
       emulation::settings().max_seconds = 0.3;
       allow_globals();
       run(2, 32, [] {
         while (atomicAdd(&global_output[0], 0u) < 99u) __syncwarp(1u << threadIdx.x);
       });
     }},
    {"shuffles", shuffles},
    {"shuffle under a branch",
     [] {
       run(32, [] {
         if (threadIdx.x < 16)
           __shfl_xor_sync(~0u, 1, 1);
         else
           __syncthreads();
       });
     }},
    {"shuffle with exited lanes",
     [] {
       run(32, [] {
         if (threadIdx.x >= 16) return;
         __shfl_xor_sync(~0u, 1, 1);
       });
     }},
    {"shuffle outside its mask", [] { run(32, [] { __shfl_xor_sync(0xffffu, 1, 1); }); }},
    {"mma bf16", mma_elements<bf16>},
    {"mma fp16", mma_elements<fp16>},
    {"matrix loads and stores", ldmatrix_elements},
    {"global store to shared memory",
     [] {
       run(32, [] { ptx::store_16(&shared_memory<Words>().data[threadIdx.x * 4], {1, 2, 3, 4}); });
     }},
    {"global load of shared memory",
     [] {
       run(32, [] {
         auto& words = shared_memory<Words>().data;
         words[threadIdx.x * 4] = ptx::load_16(&words[threadIdx.x * 4]).x;
       });
     }},
    {"misaligned matrix row",
     [] {
       run(32, [] {
         uint32_t r[4];
         ptx::ldmatrix_x4(r, ptx::shared_address(&shared_memory<Words>().data[threadIdx.x]));
       });
     }},
    {"copy", [] { copy(0, true); }},
    {"copy with zero fill", [] { copy(0, true, 8); }},
    {"copy of nothing", [] { copy(0, true, 0); }},
    {"copy not waited for", [] { copy(1, true); }},
    {"copy without barrier", [] { copy(0, false); }},
    {"copy never waited for",
     [] {
       allow_globals();
       run(32, [] {
         ptx::cp_async<16>(ptx::shared_address(&shared_memory<Words>().data[threadIdx.x * 4]),
                           &global_memory[threadIdx.x * 4], 16);
         ptx::cp_async_commit();
       });
     }},
    {"misaligned copy",
     [] {
       allow_globals();
       run(32, [] {
         ptx::cp_async<16>(ptx::shared_address(&shared_memory<Words>().data[threadIdx.x]),
                           &global_memory[threadIdx.x * 4], 16);
       });
     }},
    {"global memory out of bounds",
     [] {
       allow_globals();
       run(32, [] { keep(global_memory[1024 + threadIdx.x]); });
     }},
    {"copy out of bounds",
     [] {
       allow_globals();
       run(32, [] {
         ptx::cp_async<16>(ptx::shared_address(&shared_memory<Words>().data[threadIdx.x * 4]),
                           &global_memory[1000 + threadIdx.x * 4], 16);
       });
     }},
    {"write to an input",
     [] {
       allow_globals();
       run(32, [] { global_memory[threadIdx.x] = 1; });
     }},
    {"memory of an earlier call",
     [] {
       allow_globals();
       emulation::forget();
       run(32, [] { keep(global_memory[threadIdx.x]); });
     }},
    {"misaligned global load",
     [] {
       allow_globals();
       run(32, [] { ptx::load_16(&global_memory[threadIdx.x]); });
     }},
    {"blocks write apart",
     [] {
       allow_globals();
       run(4, 32, [] { global_output[blockIdx.x * 32 + threadIdx.x] = 1; });
     }},
    {"blocks write the same",
     [] {
       allow_globals();
       run(4, 32, [] { global_output[threadIdx.x] = 1; });
     }},
    {"a block reads what another writes",
     [] {
       allow_globals();
       run(4, 32, [] {
         if (blockIdx.x == 0) global_output[threadIdx.x] = 1;
         if (blockIdx.x == 1) keep(global_output[threadIdx.x]);
       });
     }},
    {"blocks add atomically",
     [] {
       allow_globals();
       global_output[0] = 0;
       run(4, 32, [] { atomicAdd(&global_output[0], 1u); });
       require(global_output[0] == 128, "atomicAdd");
     }},
    {"the last block gathers", [] { gather(Gather::kRight); }},
    {"the last block gathers between fences", [] { gather(Gather::kFences); }},
    {"the last block gathers without fence", [] { gather(Gather::kRelaxed); }},
    {"the last block gathers without a second fence", [] { gather(Gather::kFenceBefore); }},
    {"the last block gathers without barrier", [] { gather(Gather::kNoBarrier); }},
    {"the last block counts elsewhere", [] { gather(Gather::kOtherCounter); }},
    {"the last block's threads are not told", [] { gather(Gather::kNotPassedOn); }},
    {"the last block reads what may be stale", [] { gather(Gather::kReadOnly); }},
    {"the last block resets nothing", [] { gather(Gather::kNoReset); }},
    {"a chain of blocks",
     [] {
       allow_globals();
       for (int i = 0; i < 8; i++) global_output[512 + i] = 0;
       // Each block reads what those before it stored, having met only the last of them.
       run(4, 32, [] {
         unsigned turn = 0;
         if (threadIdx.x == 0) turn = ptx::arrive(&global_output[512]);
         __syncwarp();
         turn = __shfl_sync(~0u, turn, 0);
         if (threadIdx.x == 0 && turn > 0) ptx::arrive(&global_output[512 + turn]);
         __syncwarp();
         for (unsigned i = 0; i < turn; i++) keep(global_output[i * 32 + threadIdx.x]);
         global_output[turn * 32 + threadIdx.x] = 1;
         __syncwarp();
         if (threadIdx.x == 0) ptx::arrive(&global_output[513 + turn]);
       });
     }},
    {"threads of a block exchange", [] { exchange_globally(true); }},
    {"threads of a block exchange without barrier", [] { exchange_globally(false); }},
    {"a block overwrites what it read as constant",
     [] {
       allow_globals();
       run(32, [] {
         keep(ptx::load_16(global_output + threadIdx.x * 4).x);
         global_output[threadIdx.x * 4] = 1;
       });
     }},
    {"dependent", [] { dependent(Dependent::kRight); }},
    {"dependent reads early", [] { dependent(Dependent::kReadsEarly); }},
    {"dependent writes early", [] { dependent(Dependent::kWritesEarly); }},
    {"dependent copies early", [] { dependent(Dependent::kCopiesEarly); }},
    {"dependent reads as constant", [] { dependent(Dependent::kReadOnly); }},
    {"dependent never waits", [] { dependent(Dependent::kNoWait); }},
    {"wgmma bf16", [] { wgmma<bf16>(Wgmma::kRight); }},
    {"wgmma fp16", [] { wgmma<fp16>(Wgmma::kRight); }},
    {"wgmma of registers bf16", wgmma_trans<bf16>},
    {"wgmma of registers fp16", wgmma_trans<fp16>},
    {"wgmma of transposed tiles", wgmma_of_transposed<bf16>},
    {"wgmma without fence", [] { wgmma<bf16>(Wgmma::kNoFence); }},
    {"wgmma without proxy fence", [] { wgmma<bf16>(Wgmma::kNoProxyFence); }},
    {"wgmma not waited for", [] { wgmma<bf16>(Wgmma::kNotWaited); }},
    {"wgmma waited for too little", [] { wgmma<bf16>(Wgmma::kWaitedTooLittle); }},
    {"wgmma not committed", [] { wgmma<bf16>(Wgmma::kNotCommitted); }},
    {"operand overwritten under a wgmma", [] { wgmma<bf16>(Wgmma::kOverwritten); }},
    {"wgmma in another mode", [] { wgmma<bf16>(Wgmma::kMode); }},
    {"banks: stride 1", [] { bank_conflicts(1, 1); }},
    {"banks: stride 2", [] { bank_conflicts(2, 2); }},
    {"banks: stride 32", [] { bank_conflicts(32, 32); }},
    {"banks: stride 31", [] { bank_conflicts(31, 1); }},
    {"sectors: stride 1", [] { sectors(1, 4); }},
    {"sectors: stride 2", [] { sectors(2, 8); }},
    {"sectors: stride 8", [] { sectors(8, 32); }},
    {"trap", [] { run(32, [] { ptx::trap(); }); }},
    {"too many threads", [] { run(1025, [] {}); }},
    {"empty grid", [] { run(dim3(0), 32, [] {}); }},
    {"too many blocks in y", [] { run(dim3(1, 65536), 32, [] {}); }},
    {"too many blocks in z", [] { run(dim3(1, 1, 65536), 32, [] {}); }},
    {"more shared memory than a card has", [] { run(1, 32, [] {}, 232449); }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || !kChecks.count(argv[1])) {
    std::fprintf(stderr, "usage: emulation_checks NAME POLICY\n");
    return 2;
  }
  for (unsigned i = 0; i < 1024; i++) global_memory[i] = i;
  emulation::settings().policy = static_cast<emulation::Policy>(std::stoi(argv[2]));
  try {
    kChecks.at(argv[1])();
    std::puts("clean");
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
