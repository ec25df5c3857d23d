// Fibers, the scheduler, launches and findings: over 400 lines, for they share one state.
#include "runtime.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/time.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "the emulator switches fibers by hand and knows x86-64 alone"
#endif

namespace emulation {

Launch* running = nullptr;
int quiet = 0;

namespace {
volatile bool out_of_time = false;
View* view = nullptr;
char* stacks = nullptr;
int num_stacks = 0;
}  // namespace

View& self() { return *view; }

Settings& settings() {
  static Settings s;
  return s;
}
Counts& counts() {
  static Counts c;
  return c;
}

uint64_t Random::next() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state * 0x2545f4914f6cdd1dull;
}
uint32_t Random::below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }

// ---- findings ---------------------------------------------------------------------------------

Site site_of(const Loc& loc) {
  return (reinterpret_cast<uintptr_t>(loc.file_name()) & 0xffffffffffffull) | uint64_t{loc.line()}
                                                                                  << 48;
}

namespace {
std::string file_and_line(std::string path) {
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

// The source line of a code address, through binutils; "?" where that is missing.
std::string symbolise(uintptr_t address) {
  static std::map<uintptr_t, std::string> known;
  std::string& text = known[address];
  if (!text.empty()) return text;
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(address), &info)) return text = "?";
  char command[1024], line[512] = "";
  const uintptr_t offset = address - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                static_cast<size_t>(offset));
  if (FILE* pipe = popen(command, "r")) {
    if (!std::fgets(line, sizeof line, pipe)) line[0] = 0;
    pclose(pipe);
  }
  text = file_and_line(std::string(line).substr(0, std::string(line).find_first_of(" \n")));
  return text = text.empty() ? "?" : text;
}

uint64_t offset_in_library(const void* address) {
  Dl_info info{};
  dladdr(address, &info);
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(info.dli_fbase);
}
}  // namespace

std::string where(Site site) {
  Quiet q;
  if (site >> 48 == 0) return symbolise(site);
  const auto* file = reinterpret_cast<const char*>(site & 0xffffffffffffull);
  return file_and_line(file) + ":" + std::to_string(site >> 48);
}

std::string name_of(const Thread& t) {
  return "thread " + std::to_string(t.index) + " (warp " + std::to_string(t.warp) + " lane " +
         std::to_string(t.lane) + ")";
}

void report(const std::string& finding) {
  Quiet q;
  auto& findings = running->findings;
  const dim3& b = running->block.index;
  if (findings.size() < 8)
    findings.push_back(finding + " [block " + std::to_string(b.x) + "," + std::to_string(b.y) +
                       "," + std::to_string(b.z) + "]");
}

// ---- switching fibers --------------------------------------------------------------------------

// Saves the callee-saved registers on the running stack, its pointer in *save, and takes up `load`.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch,@function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch,.-emulation_switch
)");

namespace {

#ifdef __SANITIZE_ADDRESS__
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
bool host_left = false;
void leaving(Fiber& from, const Fiber& to, bool for_good) {
  host_left = &from == &running->host;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.sanitizer_stack,
                                 to.stack ? to.stack : host_stack,
                                 to.stack ? kStackBytes : host_stack_bytes);
}
void arrived(Fiber& at) {
  __sanitizer_finish_switch_fiber(at.sanitizer_stack, host_left ? &host_stack : nullptr,
                                  host_left ? &host_stack_bytes : nullptr);
}
#else
void leaving(Fiber&, const Fiber&, bool) {}
void arrived(Fiber&) {}
#endif

void switch_to(Fiber& from, const Fiber& to, bool for_good = false) {
  leaving(from, to, for_good);
  emulation_switch(&from.stack_pointer, to.stack_pointer);
  arrived(from);
}

void return_to_host(bool for_good) {
  Fiber& from = current().fiber;
  view = nullptr;
  switch_to(from, running->host, for_good);
}

// ---- scheduler ----------------------------------------------------------------------------------

int nth_set_bit(uint32_t mask, int n) {
  while (n--) mask &= mask - 1;
  return __builtin_ctz(mask);
}
int any_bit(uint32_t mask) {
  return nth_set_bit(mask, running->random.below(__builtin_popcount(mask)));
}

int pick_warp() {
  Block& b = block();
  switch (settings().policy) {
    case Policy::kFair:
      return any_bit(b.runnable_warps);
    case Policy::kRunAhead:
      return b.runnable_warps >> b.current_warp & 1 ? b.current_warp : any_bit(b.runnable_warps);
    case Policy::kAdversarial:
      if (running->random.below(2048) == 0)
        b.warps[running->random.below(b.num_warps)].priority = running->random.next() >> 33;
  }
  int best = __builtin_ctz(b.runnable_warps);
  for (uint32_t m = b.runnable_warps; m; m &= m - 1)
    if (b.warps[__builtin_ctz(m)].priority > b.warps[best].priority) best = __builtin_ctz(m);
  return best;
}

std::string waiting_list() {
  std::map<std::string, std::set<int>> threads;
  for (const Thread& t : block().threads)
    if (!t.done)
      threads[t.waits_in ? std::string(t.waits_in) + " at " + where(t.waits_at) : "running"].insert(
          t.warp);
  std::string text;
  for (const auto& [place, warps] : threads) {
    text += " warps";
    for (int w : warps) text += " " + std::to_string(w);
    text += " in " + place + ";";
  }
  return text;
}

Thread* pick() {
  Block& b = block();
  if (!b.runnable_warps) return nullptr;
  b.current_warp = pick_warp();
  Warp& w = b.warps[b.current_warp];
  const int lane = any_bit(w.runnable);
  w.runnable &= ~(1u << lane);
  if (!w.runnable) b.runnable_warps &= ~(1u << w.index);
  return &b.threads[w.index * kLanes + lane];
}

// Gives the processor to another thread of the block, or to the host when none is left.
void run_another(bool for_good) {
  Quiet q;
  Block& b = block();
  Thread& old = *b.current;
  counts().switches++;
  stop_if_out_of_time();
  if (++b.idle_switches > settings().max_idle_switches) stop("no progress:" + waiting_list());
  Thread* next = pick();
  if (!next && b.alive) stop("deadlock:" + waiting_list());
  if (next == &old) return;
  const int nested = quiet;
  if (next) {
    b.current = next;
    view = next;
    quiet = 0;
    switch_to(old.fiber, next->fiber, for_good);
  } else {
    quiet = 0;
    return_to_host(for_good);
  }
  quiet = nested;
}

void thread_main() {
  arrived(current().fiber);
  running->body(running->context);
  Quiet q;
  Thread& t = current();
  Warp& w = block().warps[t.warp];
  for (const Rendezvous& r : w.rendezvous)
    if (r.arrived && r.mask >> t.lane & 1)
      stop(name_of(t) + " exits while other lanes wait for it in " + r.operation + " at " +
           where(r.site));
  end_of_thread_copies(t);
  progress();
  t.done = true;
  w.alive &= ~(1u << t.lane);
  block().alive--;
  if (!w.alive) {
    flush_traces(w);
    end_of_warp_wgmmas(w);
  }
  run_another(true);
  __builtin_unreachable();
}

void reserve_stacks(int threads) {
  if (threads <= num_stacks) return;
  if (stacks) munmap(stacks, num_stacks * kStackBytes);
  stacks = static_cast<char*>(mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) throw std::runtime_error("the emulator got no memory for its stacks");
  num_stacks = threads;
}

void begin_thread(Thread& t, int index) {
  Launch& launch = *running;
  Block& b = launch.block;
  t.index = index;
  t.lane = index % kLanes;
  t.warp = index / kLanes;
  const dim3& dim = launch.block_dim;
  t.thread = {index % dim.x, index / dim.x % dim.y, index / dim.x / dim.y};
  t.View::block = {b.index.x, b.index.y, b.index.z};
  t.block_dim = dim;
  t.grid_dim = launch.grid;
  t.fiber.stack = stacks + size_t(index) * kStackBytes;
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(t.fiber.stack, kStackBytes);
#endif
  // Staggered, or every stack's hot end would fall into the same cache sets.
  auto** top = reinterpret_cast<void**>(t.fiber.stack + kStackBytes - 64 - index % 61 * 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(thread_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  t.fiber.stack_pointer = top;
  Warp& w = b.warps[t.warp];
  w.index = t.warp;
  w.alive |= 1u << t.lane;
  w.priority = launch.random.next() >> 33;
  wake(index);
}

void run_block(uint64_t linear) {
  Launch& launch = *running;
  Block& b = launch.block;
  b.linear = linear;
  b.index = dim3(linear % launch.grid.x, linear / launch.grid.x % launch.grid.y,
                 linear / launch.grid.x / launch.grid.y);
  b.num_threads = launch.block_dim.x * launch.block_dim.y * launch.block_dim.z;
  b.num_warps = (b.num_threads + kLanes - 1) / kLanes;
  b.alive = b.num_threads;
  b.threads = std::vector<Thread>(b.num_threads);
  b.warps.clear();
  b.warps.resize(b.num_warps);
  b.barriers = {};
  b.runnable_warps = 0;
  b.idle_switches = 0;
  begin_shared(b);
  for (int i = 0; i < b.num_threads; i++) begin_thread(b.threads[i], i);
  Thread* first = pick();
  b.current = first;
  view = first;
  quiet = 0;
  switch_to(launch.host, first->fiber);
  quiet = 1;
}

// An endless loop is ended by the clock: at the next call of the emulator, or here and now if the
// kernel makes none.
void on_alarm(int) {
  if (!running || !running->block.current) return;
  out_of_time = true;
  if (!quiet) stop_if_out_of_time();
}

class Alarm {
 public:
  explicit Alarm(double seconds) {
    out_of_time = false;
    struct sigaction action{};
    action.sa_handler = on_alarm;
    action.sa_flags = SA_NODEFER;  // the handler may never return
    sigaction(SIGALRM, &action, &old_);
    itimerval timer{};
    timer.it_value.tv_sec = static_cast<time_t>(seconds);
    timer.it_value.tv_usec = static_cast<long>((seconds - timer.it_value.tv_sec) * 1e6) + 1;
    setitimer(ITIMER_REAL, &timer, &old_timer_);
  }
  ~Alarm() {
    setitimer(ITIMER_REAL, &old_timer_, nullptr);
    sigaction(SIGALRM, &old_, nullptr);
  }

 private:
  struct sigaction old_{};
  itimerval old_timer_{};
};

}  // namespace

void stop_if_out_of_time() {
  if (out_of_time) stop("time limit reached:" + waiting_list());
}

void stop(const std::string& finding) {
  report(finding);
  running->abandoned = true;
  quiet = 1;
  return_to_host(true);
  __builtin_unreachable();
}

void wake(int thread) {
  Block& b = block();
  Thread& t = b.threads[thread];
  t.waits_in = nullptr;
  b.warps[t.warp].runnable |= 1u << t.lane;
  b.runnable_warps |= 1u << t.warp;
}

void wait_here(const char* operation, Site site) {
  current().waits_in = operation;
  current().waits_at = site;
  run_another(false);
}

void launch(const char* kernel, dim3 grid, dim3 block_dim, size_t smem_bytes, void (*body)(void*),
            void* context, size_t context_bytes, bool dependent) {
  const std::string name = std::string("emulated ") + kernel;
  const uint64_t threads = uint64_t{block_dim.x} * block_dim.y * block_dim.z;
  if (running) throw std::runtime_error(name + ": another launch is running");
  if (threads < 1 || threads > 1024)
    throw std::runtime_error(name + ": a block has 1 to 1024 threads, got " +
                             std::to_string(threads));
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(name + ": the grid is empty or too large");
  if (smem_bytes > size_t(settings().max_smem_bytes))
    throw std::runtime_error(name + ": needs " + std::to_string(smem_bytes) +
                             " bytes of shared memory, the limit is " +
                             std::to_string(settings().max_smem_bytes));
  auto state = std::make_unique<Launch>();
  state->kernel = kernel;
  state->grid = grid;
  state->block_dim = block_dim;
  state->smem_bytes = smem_bytes;
  state->body = body;
  state->context = context;
  state->context_bytes = context_bytes;
  state->dependent = dependent;
  const uint64_t sequence = ++counts().launches;
  if (settings().profile && context_bytes >= sizeof(void*))
    counts().launched.push_back({offset_in_library(*static_cast<void**>(context)),
                                 static_cast<int>(threads), uint64_t{grid.x} * grid.y * grid.z,
                                 smem_bytes, dependent});
  state->random.state =
      (settings().seed * 0x9e3779b97f4a7c15ull ^ sequence * 0xd1b54a32d192ed03ull) | 1;
  for (int i = 0; i < 3; i++) state->random.next();
  reserve_stacks(static_cast<int>(threads));

  // In any order: a block that counts on another having run before it must show.
  std::vector<uint32_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; i--)
    std::swap(order[i - 1], order[state->random.below(static_cast<uint32_t>(i))]);

  running = state.get();
  quiet = 1;
  begin_globals();
  {
    Alarm alarm(settings().max_seconds);
    for (uint32_t linear : order) {
      run_block(linear);
      if (state->abandoned) break;
    }
  }
  count_buffers();
  // Or the next would take this one's end for that of all before it.
  if (dependent && !state->waited && !state->abandoned)
    report("no thread has waited for the kernel before this one");
  running = nullptr;
  quiet = 0;
  if (!state->findings.empty()) {
    std::string text = name + ", seed " + std::to_string(settings().seed) + ", policy " +
                       std::to_string(static_cast<int>(settings().policy)) + ":";
    for (const std::string& finding : state->findings) text += "\n  " + finding;
    throw std::runtime_error(text);
  }
}

}  // namespace emulation
