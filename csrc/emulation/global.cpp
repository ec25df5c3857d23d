// Global memory: bounds, alignment, what of each buffer was touched, and what a dependent launch
// must leave alone until it has waited.
//
// A dependent launch may start while the one before it runs, and others before that one. What they
// may still read or write is taken to be all but the op's parameters, by name: until it has waited,
// a thread reads parameters alone and writes nothing. What was not there at the launch's start it
// must not read by ld.global.nc even then, for that instruction is for what nobody writes in all
// of the kernel's time, and compilers move it.
#include <algorithm>
#include <set>
#include <stdexcept>

#include "runtime.h"

namespace emulation {

namespace {

struct Buffer {
  uintptr_t begin;
  size_t bytes;
  std::string name;
  bool writable, parameter;
  uint64_t read_bytes = 0, written_bytes = 0;
};

std::vector<Buffer> buffers;
std::set<uintptr_t> sectors;

Buffer* find(uintptr_t address, int bytes, bool write) {
  Buffer* found = nullptr;
  for (Buffer& b : buffers)
    if (address >= b.begin && address + bytes <= b.begin + b.bytes && (b.writable || !write))
      found = &b;
  return found;
}

[[noreturn]] void out_of_bounds(uintptr_t address, int bytes, bool write, Site site) {
  const Buffer* nearest = nullptr;
  int64_t distance = INT64_MAX, offset = 0;
  for (const Buffer& b : buffers) {
    const int64_t o = static_cast<int64_t>(address - b.begin);
    const int64_t d = o < 0 ? -o : std::max<int64_t>(0, o + bytes - int64_t(b.bytes));
    if (d < distance) distance = d, nearest = &b, offset = o;
  }
  std::string text = std::string("global ") + (write ? "write" : "read") + " of " +
                     std::to_string(bytes) + " bytes out of bounds";
  if (nearest)
    text += distance == 0
                ? ": '" + nearest->name + "' is read-only"
                : ": nearest is '" + nearest->name + "' (" + std::to_string(nearest->bytes) +
                      " bytes), offset " + std::to_string(offset);
  stop(text + ", at " + where(site) + " by " + name_of(current()));
}

void check_dependent(const Buffer& buffer, bool write, Via via, Site site) {
  if (buffer.parameter) return;
  const std::string what = "'" + buffer.name + "', at " + where(site);
  if (!current().waited)
    report(std::string(write ? "write" : "read") + " of " + what + " by " + name_of(current()) +
           " before it has waited for the kernel before this one");
  else if (via == Via::kReadOnly)
    report("ld.global.nc of " + what + ", which the kernel before this one may have written");
}

}  // namespace

void allow(const void* begin, size_t bytes, const std::string& name, bool writable) {
  if (bytes)
    buffers.push_back({reinterpret_cast<uintptr_t>(begin), bytes, name, writable,
                       !writable && settings().parameters.contains(name)});
}

void forget() { buffers.clear(); }

void begin_globals() {
  begin_blocks();
  sectors.clear();
  for (Buffer& b : buffers) b.read_bytes = b.written_bytes = 0;
}

bool is_allowed(const void* p, int bytes, bool write) {
  return find(reinterpret_cast<uintptr_t>(p), bytes, write) != nullptr;
}

std::string buffer_at(uintptr_t address) {
  const Buffer* buffer = find(address, 1, false);
  return buffer ? buffer->name : "";
}

void access_global(const void* p, int bytes, bool write, Via via, Site site) {
  stop_if_out_of_time();
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % bytes)
    stop("misaligned global access of " + std::to_string(bytes) + " bytes at " + where(site) +
         " by " + name_of(current()));
  Buffer* buffer = find(address, bytes, write);
  if (!buffer) out_of_bounds(address, bytes, write, site);
  (write ? buffer->written_bytes : buffer->read_bytes) += bytes;
  if (settings().profile) {
    sectors.insert(address / 32);
    trace(false, write, address, bytes, site);
  }
  if (!settings().races) return;
  if (running->dependent) check_dependent(*buffer, write, via, site);
  access_between_blocks(address, bytes, write, via, buffer->name, buffer->begin, site);
}

void count_buffers() {
  if (!settings().profile) return;
  for (const Buffer& b : buffers) {
    const auto low = sectors.lower_bound(b.begin / 32);
    const auto high = sectors.upper_bound((b.begin + b.bytes - 1) / 32);
    counts().buffers.push_back({b.name, b.bytes, b.read_bytes, b.written_bytes,
                                static_cast<uint64_t>(std::distance(low, high))});
  }
}

void wait_for_previous_kernel() { current().waited = running->waited = true; }

void trap(Loc loc) { stop("trap at " + where(loc)); }

namespace {
bool is_shared(const void* p) {
  const auto offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(shared_bytes());
  return offset < kSharedBytes;
}

void access(const void* p, int bytes, bool write, Site site, Via via = Via::kPlain) {
  if (!is_shared(p)) return access_global(p, bytes, write, via, site);
  const auto address =
      static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared_bytes()) + kSharedBase;
  if (address % bytes)
    stop("misaligned shared access of " + std::to_string(bytes) + " bytes at " + where(site) +
         " by " + name_of(current()));
  access_shared(current().index, address, bytes, write, site);
  trace(true, write, address, bytes, site);
}
}  // namespace

void load(void* to, const void* from, int bytes, Loc loc) {
  Quiet q;
  access(from, bytes, false, site_of(loc));
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, int bytes, Loc loc) {
  Quiet q;
  access(to, bytes, true, site_of(loc));
  std::memcpy(to, from, bytes);
}

void expect_global(const void* p, Loc loc) {
  if (is_shared(p)) stop("an instruction for global memory meets shared memory at " + where(loc));
}

void load_global(void* to, const void* from, int bytes, Loc loc) {
  expect_global(from, loc);
  load(to, from, bytes, loc);
}

void load_read_only(void* to, const void* from, int bytes, Loc loc) {
  Quiet q;
  expect_global(from, loc);
  access(from, bytes, false, site_of(loc), Via::kReadOnly);
  std::memcpy(to, from, bytes);
}

void store_global(void* to, const void* from, int bytes, Loc loc) {
  expect_global(to, loc);
  store(to, from, bytes, loc);
}

uint64_t atomic(void* p, int bytes, uint64_t (*update)(uint64_t, uint64_t), uint64_t operand,
                bool acquires_and_releases, Loc loc) {
  Quiet q;
  uint64_t old = 0;
  if (is_shared(p)) stop("no kernel here uses atomics on shared memory, at " + where(loc));
  access_global(p, bytes, true, Via::kAtomic, site_of(loc));
  if (settings().races)
    atomic_between_blocks(reinterpret_cast<uintptr_t>(p), acquires_and_releases);
  std::memcpy(&old, p, bytes);
  const uint64_t value = update(old, operand);
  std::memcpy(p, &value, bytes);
  return old;
}

// What -fsanitize=thread makes the compiler insert before every plain load and store of a kernel.
void plain_access(const void* p, int bytes, bool write, uintptr_t code) {
  if (!running || quiet || !block().current) return;
  Quiet q;
  const Thread& t = current();
  const auto* address = static_cast<const char*>(p);
  if (address >= t.fiber.stack && address < t.fiber.stack + kStackBytes) return;
  if (is_shared(p) || is_allowed(p, bytes, false)) return access(p, bytes, write, code);
  // threadIdx and its like, and the kernel's parameters.
  const auto* view = reinterpret_cast<const char*>(&t);
  if (!write && address >= view && address < view + sizeof(Thread)) return;
  const auto* context = static_cast<const char*>(running->context);
  if (!write && address >= context && address < context + running->context_bytes) return;
  access(p, bytes, write, code);
}

}  // namespace emulation
