// What the lanes of a warp, or the warps of a block, do together.
//
// One primitive serves every warp instruction: the lanes of a mask meet, each publishes an
// argument, and the last to come does the work for all. Lanes that never come, come elsewhere or
// have exited are findings, not hangs.
#include <algorithm>

#include "runtime.h"

namespace emulation {

void meet(const char* operation, uint32_t mask, void* argument, Site site,
          const std::function<void(Warp&, void**)>& execute) {
  Quiet q;
  stop_if_out_of_time();
  Thread& t = current();
  Warp& w = block().warps[t.warp];
  const uint32_t mine = 1u << t.lane;
  if (!(mask & mine))
    stop(std::string(operation) + " by a lane outside its own mask at " + where(site));
  if (mask & ~w.alive)
    stop(std::string(operation) + " names lanes that have exited, at " + where(site));
  Rendezvous* r = nullptr;
  for (Rendezvous& other : w.rendezvous) {
    if (other.arrived && other.mask & mask) {
      r = &other;
      break;
    }
    if (!other.arrived && !r) r = &other;
  }
  if (!r) stop("more than 4 parts of a warp meet apart at " + where(site));
  if (!r->arrived) {
    r->mask = mask;
    r->operation = operation;
    r->site = site;
  } else if (r->mask != mask || r->operation != operation || r->site != site) {
    stop("divergent warp: " + name_of(t) + " is in " + operation + " at " + where(site) +
         " while other lanes wait in " + r->operation + " at " + where(r->site));
  }
  r->argument[t.lane] = argument;
  r->arrived |= mine;
  if (r->arrived != mask) return wait_here(operation, site);
  counts().collectives++;
  progress();
  flush_traces(w);
  r->arrived = 0;
  execute(w, r->argument);
  for (uint32_t m = mask & ~mine; m; m &= m - 1) wake(w.index * kLanes + __builtin_ctz(m));
}

void sync_warp(uint32_t mask, Loc loc) {
  meet("__syncwarp", mask, nullptr, site_of(loc), [mask](Warp& w, void**) {
    std::vector<int> members;
    for (uint32_t m = mask; m; m &= m - 1) members.push_back(w.index * kLanes + __builtin_ctz(m));
    order(members, members);
  });
}

namespace {
struct ShuffleArgument {
  Shuffle kind;
  uint64_t value;
  int argument, width;
  uint64_t result;
};

int source_lane(const ShuffleArgument& a, int lane) {
  const int first = lane & ~(a.width - 1), end = first + a.width;
  int source = lane;
  switch (a.kind) {
    case Shuffle::kIndex:
      return first + (a.argument & (a.width - 1));
    case Shuffle::kXor:
      source = lane ^ a.argument;
      break;
    case Shuffle::kUp:
      source = lane - a.argument;
      break;
    case Shuffle::kDown:
      source = lane + a.argument;
      break;
  }
  return source < (a.kind == Shuffle::kUp ? first : 0) || source >= end ? lane : source;
}
}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, Loc loc) {
  ShuffleArgument mine{kind, value, argument, width, 0};
  meet("shuffle", mask, &mine, site_of(loc), [mask](Warp&, void** arguments) {
    for (uint32_t m = mask; m; m &= m - 1) {
      const int lane = __builtin_ctz(m);
      auto& a = *static_cast<ShuffleArgument*>(arguments[lane]);
      const int source = source_lane(a, lane);
      // The value of a lane outside the mask is undefined: all ones.
      a.result = mask >> source & 1 ? static_cast<ShuffleArgument*>(arguments[source])->value
                                    : ~uint64_t{0};
    }
  });
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Loc loc) {
  struct Argument {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  meet("ballot", mask, &mine, site_of(loc), [mask](Warp&, void** arguments) {
    uint32_t result = 0;
    for (uint32_t m = mask; m; m &= m - 1)
      if (static_cast<Argument*>(arguments[__builtin_ctz(m)])->predicate) result |= m & -m;
    for (uint32_t m = mask; m; m &= m - 1)
      static_cast<Argument*>(arguments[__builtin_ctz(m)])->result = result;
  });
  return mine.result;
}

bool elect(Loc loc) {
  bool elected = false;
  meet("elect.sync", kAllLanes, &elected, site_of(loc), [](Warp&, void** arguments) {
    *static_cast<bool*>(arguments[running->random.below(kLanes)]) = true;
  });
  return elected;
}

// ---- barriers
// -------------------------------------------------------------------------------------

namespace {
void barrier(const char* operation, int id, int threads, bool waits, Site site) {
  Quiet q;
  Block& b = block();
  Thread& t = current();
  if (id < 0 || id >= int(b.barriers.size()))
    stop("there are 16 barriers, got number " + std::to_string(id) + " at " + where(site));
  if (threads % kLanes && threads != b.num_threads)
    stop("a barrier takes whole warps, got " + std::to_string(threads) + " threads at " +
         where(site));
  Barrier& r = b.barriers[id];
  if (r.arrived == 0) {
    r.expected = threads;
    r.site = site;
    r.members.clear();
    r.waiting.clear();
  } else if (r.expected != threads) {
    stop("barrier " + std::to_string(id) + " is used with " + std::to_string(r.expected) + " and " +
         std::to_string(threads) + " threads, at " + where(site));
  } else if (id == 0 && r.site != site) {
    report("one __syncthreads is reached from " + where(r.site) + " and from " + where(site));
  }
  r.arrived++;
  r.members.push_back(t.index);
  if (waits) r.waiting.push_back(t.index);
  if (r.arrived < r.expected) {
    if (waits) wait_here(operation, site);
    return;
  }
  counts().barriers++;
  progress();
  order(r.members, r.waiting);
  r.arrived = 0;
  for (int waiting : r.waiting)
    if (waiting != t.index) wake(waiting);
  r.waiting.clear();
  // Or the last to come would always be the first to go on.
  if (waits && settings().policy != Policy::kRunAhead) {
    wake(t.index);
    wait_here(operation, site);
  }
}
}  // namespace

void sync_threads(Loc loc) { barrier("__syncthreads", 0, block().num_threads, true, site_of(loc)); }
void barrier_sync(int id, int threads, Loc loc) {
  barrier("barrier.sync", id, threads, true, site_of(loc));
}
void barrier_arrive(int id, int threads, Loc loc) {
  barrier("barrier.arrive", id, threads, false, site_of(loc));
}

// ---- matrix fragments
// -----------------------------------------------------------------------------
//
// From the PTX ISA: lane l is in group g = l / 4 and has t = l % 4. An 8x8 matrix of 16-bit values
// gives a lane row g, columns 2t and 2t + 1. The 16x16 A fragment is four such, in the order top
// left, bottom left, top right, bottom right; the 16x8 B fragment two, its upper and lower half,
// transposed; C and D [16x8] hold rows g and g + 8, columns 2t and 2t + 1.

namespace {
struct MatrixArgument {
  uint32_t* registers;
  uint32_t address;
};

void check_row_addresses(void** arguments, int matrices, Site site) {
  for (int l = 0; l < matrices * 8; l++)
    if (static_cast<MatrixArgument*>(arguments[l])->address % 16)
      stop("a matrix row's address is not a multiple of 16 at " + where(site));
}

void count_rows(void** arguments, int matrices, bool write, Site site) {
  if (!settings().profile) return;
  Traced rows[kLanes];
  for (int l = 0; l < matrices * 8; l++)
    rows[l] = {site, static_cast<uint8_t>(write), 16,
               static_cast<MatrixArgument*>(arguments[l])->address};
  count_together(rows, matrices * 8, write ? "stmatrix" : "ldmatrix");
}
}  // namespace

void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t address, Loc loc) {
  const Site site = site_of(loc);
  MatrixArgument mine{registers, address};
  meet(transposed ? "ldmatrix.trans" : "ldmatrix", kAllLanes, &mine, site,
       [=](Warp& w, void** arguments) {
         check_row_addresses(arguments, matrices, site);
         for (int i = 0; i < matrices; i++) {
           uint16_t m[8][8];
           for (int row = 0; row < 8; row++) {
             const int lane = i * 8 + row;
             const uint32_t from = static_cast<MatrixArgument*>(arguments[lane])->address;
             access_shared(w.index * kLanes + lane, from, 16, false, site);
             std::memcpy(m[row], shared_at(from, 16, site), 16);
           }
           for (int lane = 0; lane < kLanes; lane++) {
             const int g = lane / 4, t = lane % 4 * 2;
             const uint32_t low = transposed ? m[t][g] : m[g][t];
             const uint32_t high = transposed ? m[t + 1][g] : m[g][t + 1];
             static_cast<MatrixArgument*>(arguments[lane])->registers[i] = low | high << 16;
           }
         }
         count_rows(arguments, matrices, false, site);
       });
}

void stmatrix(const uint32_t* registers, int matrices, bool transposed, uint32_t address, Loc loc) {
  const Site site = site_of(loc);
  MatrixArgument mine{const_cast<uint32_t*>(registers), address};
  meet(transposed ? "stmatrix.trans" : "stmatrix", kAllLanes, &mine, site,
       [=](Warp& w, void** arguments) {
         check_row_addresses(arguments, matrices, site);
         for (int i = 0; i < matrices; i++) {
           uint16_t m[8][8];
           for (int lane = 0; lane < kLanes; lane++) {
             const int g = lane / 4, t = lane % 4 * 2;
             const uint32_t value = static_cast<MatrixArgument*>(arguments[lane])->registers[i];
             (transposed ? m[t][g] : m[g][t]) = static_cast<uint16_t>(value);
             (transposed ? m[t + 1][g] : m[g][t + 1]) = static_cast<uint16_t>(value >> 16);
           }
           for (int row = 0; row < 8; row++) {
             const int lane = i * 8 + row;
             const uint32_t to = static_cast<MatrixArgument*>(arguments[lane])->address;
             access_shared(w.index * kLanes + lane, to, 16, true, site);
             std::memcpy(shared_at(to, 16, site), m[row], 16);
           }
         }
         count_rows(arguments, matrices, true, site);
       });
}

void mma_16816(float* d, const uint32_t* a, const uint32_t* b, bool is_bf16, Loc loc) {
  struct Argument {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  meet("mma.sync", kAllLanes, &mine, site_of(loc), [=](Warp&, void** arguments) {
    const auto value = [is_bf16](uint32_t bits) {
      if (is_bf16) return as_float(bf16{static_cast<uint16_t>(bits)});
      const auto half = static_cast<uint16_t>(bits);
      fp16 h;
      std::memcpy(&h, &half, sizeof h);
      return as_float(h);
    };
    alignas(64) float A[16][16], B[16][8], C[16][8];
    for (int lane = 0; lane < kLanes; lane++) {
      const auto& x = *static_cast<Argument*>(arguments[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) A[g + i % 2 * 8][t + i / 2 * 8 + j] = value(x.a[i] >> 16 * j);
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) B[t + i * 8 + j][g] = value(x.b[i] >> 16 * j);
      for (int i = 0; i < 4; i++) C[g + i / 2 * 8][t + i % 2] = x.d[i];
    }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
    for (int lane = 0; lane < kLanes; lane++) {
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 4; i++)
        static_cast<Argument*>(arguments[lane])->d[i] = C[g + i / 2 * 8][t + i % 2];
    }
    counts().mma++;
  });
}

}  // namespace emulation
