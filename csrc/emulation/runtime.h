// The emulator's inside: one block at a time, its warps and threads, and what watches them.
// One OS thread runs everything, so nothing here is locked.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulation.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulation {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
// Shared addresses start here, so that 0, the likeliest wrong address, is outside.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t kSharedBytes = 256 * 1024;
constexpr size_t kStackBytes = 128 * 1024;

// A place in the source: a file name's address with the line in the top 16 bits, or, from the
// compiler's hooks, a code address with no line.
using Site = uint64_t;
Site site_of(const Loc& loc);
std::string where(Site site);
inline std::string where(const Loc& loc) { return where(site_of(loc)); }

struct Random {
  uint64_t state = 1;
  uint64_t next();
  uint32_t below(uint32_t n);
};

// ---- execution --------------------------------------------------------------------------------

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* sanitizer_stack = nullptr;  // AddressSanitizer's own record of a suspended stack
};

struct CopyAsync {
  uint32_t to;
  const void* from;
  int bytes, bytes_read;
  Site site;
};

// One access of one thread, kept until a warp's accesses can be counted together.
struct Traced {
  Site site;
  uint8_t kind;  // index into kKinds of profile.cpp
  uint16_t bytes;
  uint64_t address;
};

// One wgmma of one warp; `d` is where each lane's accumulators are.
struct Wgmma {
  float* d[kLanes];
  int columns;
  uint64_t a, b;
  bool a_transposed, b_transposed;
  bool is_bf16;
  Site site;
  std::vector<std::array<uint32_t, 4>> a_registers;  // of each lane, or none
};

using Clocks = std::vector<uint32_t>;  // of a block's threads
// What of other blocks, by number, is ordered before what comes next.
using Past = std::map<uint32_t, std::shared_ptr<const Clocks>>;
using Known = std::shared_ptr<const Past>;

struct Thread : View {
  Fiber fiber;
  int index = 0, lane = 0, warp = 0;
  bool done = false;
  const char* waits_in = nullptr;
  Site waits_at = 0;
  std::vector<CopyAsync> open_copies;
  std::deque<std::vector<CopyAsync>> copy_groups;
  uint32_t proxy_fenced = 0;  // its clock at the last fence.proxy.async
  std::vector<Traced> trace;
  uint32_t moment = 0;  // its last in blocks.cpp
  Known known;          // acquired
  Known seen, fenced;   // what a fence would acquire; what the last fence made ready
  bool waited = false;  // for the kernel before this one
};

struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const char* operation = nullptr;
  Site site = 0;
  void* argument[kLanes];
};

struct Warp {
  int index = 0;
  uint32_t runnable = 0, alive = 0, priority = 0;
  std::array<Rendezvous, 4> rendezvous;
  bool wgmma_fenced = false;
  std::vector<Wgmma> open_wgmmas;
  std::deque<std::vector<Wgmma>> wgmma_groups;
  std::map<float*, std::vector<float>> accumulators;  // true values of those in flight
};

struct Barrier {
  int expected = 0, arrived = 0;
  Site site = 0;
  std::vector<int> members, waiting;
};

// ---- what is known of each 4 bytes of shared memory -------------------------------------------

struct Mark {
  uint16_t thread = 0;
  uint8_t bytes = 0;  // mask within the word; 0: no access yet
  uint32_t clock = 0;
};

struct SharedWord {
  Mark writer[4];  // of each byte
  Mark reader[2];
  uint16_t copies_in_flight = 0;
  Site written_at = 0;
};

struct Block {
  dim3 index;
  uint64_t linear = 0;
  int num_threads = 0, num_warps = 0, alive = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  uint32_t runnable_warps = 0;
  int current_warp = 0;
  Thread* current = nullptr;
  uint64_t idle_switches = 0;
  std::vector<SharedWord> words;
  std::vector<uint32_t> clocks;  // num_threads x num_threads
  uint32_t* clock_of(int thread) { return clocks.data() + size_t(thread) * num_threads; }
};

struct Launch {
  const char* kernel;
  dim3 grid, block_dim;
  size_t smem_bytes;
  void (*body)(void*);
  void* context;
  size_t context_bytes;
  bool dependent, waited;
  Random random;
  Fiber host;
  Block block;
  std::vector<std::string> findings;
  bool abandoned = false;
  uint64_t started_ns = 0;
};

// The launch that is running, or null.
extern Launch* running;
// While positive, accesses are the emulator's own: the compiler's hooks must not see them.
extern int quiet;
struct Quiet {
  Quiet() { quiet++; }
  ~Quiet() { quiet--; }
};

inline Block& block() { return running->block; }
inline Thread& current() { return *running->block.current; }
unsigned char* shared_bytes();  // the arena itself

// ---- between the parts ------------------------------------------------------------------------

// runtime.cpp
void report(const std::string& finding);
[[noreturn]] void stop(const std::string& finding);  // reports and abandons the launch
void stop_if_out_of_time();
std::string name_of(const Thread& thread);
void wake(int thread);
void wait_here(const char* operation, Site site);
inline void progress() { block().idle_switches = 0; }

// collectives.cpp: all lanes of `mask` meet; the last runs `execute` on the others' arguments.
void meet(const char* operation, uint32_t mask, void* argument, Site site,
          const std::function<void(Warp&, void**)>& execute);

// shared.cpp
void begin_shared(Block& b);
unsigned char* shared_at(uint32_t address, int bytes, Site site);
void access_shared(int thread, uint32_t address, int bytes, bool write, Site site);
void order(const std::vector<int>& arriving, const std::vector<int>& leaving);
void join_clocks(uint32_t* into, const uint32_t* from);
void copy_in_flight(uint32_t address, int bytes, bool begins);
void landed(int thread, uint32_t address, int bytes, Site site);
void read_by_async_proxy(uint32_t address, int bytes, Site site);

// global.cpp
bool is_allowed(const void* p, int bytes, bool write);
enum class Via { kPlain, kReadOnly, kAtomic };
void access_global(const void* p, int bytes, bool write, Via via, Site site);
std::string buffer_at(uintptr_t address);
void begin_globals();
void count_buffers();

// blocks.cpp
void begin_blocks();
void access_between_blocks(uintptr_t address, int bytes, bool write, Via via,
                           const std::string& buffer, uintptr_t buffer_begin, Site site);
void atomic_between_blocks(uintptr_t address, bool acquires_and_releases);
void order_known(const std::vector<int>& arriving, const std::vector<int>& leaving);

// profile.cpp
void trace(bool shared, bool write, uint64_t address, int bytes, Site site);
void count_together(const Traced* accesses, int lanes, const char* kind);
void flush_traces(Warp& warp);

// copies.cpp
void end_of_thread_copies(Thread& thread);

// wgmma.cpp
void end_of_warp_wgmmas(Warp& warp);

}  // namespace emulation
