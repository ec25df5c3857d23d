// Global memory: bounds, alignment, races between blocks, and what of each buffer was touched.
//
// Blocks run one after another, so a race between two of them never shows in the values. It is
// found from who touched what: two blocks may touch the same two bytes only if both read, both use
// atomics, or the first published them (a fence, then an atomic) and the second learnt of it (an
// atomic on the same address).
#include <algorithm>
#include <memory>
#include <set>
#include <stdexcept>

#include "runtime.h"

namespace emulation {

namespace {

struct Buffer {
  uintptr_t begin;
  size_t bytes;
  std::string name;
  bool writable;
  uint64_t read_bytes = 0, written_bytes = 0;
};

constexpr int kPageBytes = 4096, kGrain = 2;
constexpr uint32_t kSeveral = 0xffffffffu;
struct Grain {
  uint32_t writer = 0, reader = 0;  // block + 1; kSeveral readers
  bool atomic = false;
};
struct Page {
  Grain grains[kPageBytes / kGrain];
};

std::vector<Buffer> buffers;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::set<uintptr_t> sectors;

// Publication between blocks.
std::map<uintptr_t, std::set<uint32_t>> published_through;
std::set<uint32_t> learnt;
bool fenced = false;

Page& page_of(uintptr_t address) {
  static uintptr_t last = ~uintptr_t{0};
  static Page* page = nullptr;
  if (pages.empty()) last = ~uintptr_t{0};
  if (address / kPageBytes != last) {
    last = address / kPageBytes;
    auto& held = pages[last];
    if (!held) held = std::make_unique<Page>();
    page = held.get();
  }
  return *page;
}

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

bool ordered(uint32_t other) {
  const uint32_t mine = static_cast<uint32_t>(block().linear) + 1;
  return other == 0 || other == mine || learnt.count(other);
}

}  // namespace

void allow(const void* begin, size_t bytes, const std::string& name, bool writable) {
  if (bytes) buffers.push_back({reinterpret_cast<uintptr_t>(begin), bytes, name, writable});
}

void forget() { buffers.clear(); }

void begin_globals() {
  pages.clear();
  sectors.clear();
  published_through.clear();
  for (Buffer& b : buffers) b.read_bytes = b.written_bytes = 0;
}

void begin_global_block() {
  learnt.clear();
  fenced = false;
}

bool is_allowed(const void* p, int bytes, bool write) {
  return find(reinterpret_cast<uintptr_t>(p), bytes, write) != nullptr;
}

std::string buffer_at(uintptr_t address) {
  const Buffer* buffer = find(address, 1, false);
  return buffer ? buffer->name : "";
}

void access_global(const void* p, int bytes, bool write, bool atomic, Site site) {
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
  const uint32_t mine = static_cast<uint32_t>(block().linear) + 1;
  if (atomic && fenced) published_through[address].insert(mine);
  if (atomic) learnt.insert(published_through[address].begin(), published_through[address].end());
  if (write && !atomic) fenced = false;
  for (uintptr_t a = address; a < address + bytes; a += kGrain) {
    Grain& grain = page_of(a).grains[a % kPageBytes / kGrain];
    const bool both_atomic = atomic && grain.atomic;
    const bool read_by_others = grain.reader == kSeveral || !ordered(grain.reader);
    if (!both_atomic && (!ordered(grain.writer) || (write && read_by_others))) {
      report(std::string("race between blocks: ") + (write ? "write" : "read") + " of '" +
             buffer->name + "', offset " + std::to_string(a - buffer->begin) + ", at " +
             where(site) + ", which another block " + (ordered(grain.writer) ? "reads" : "writes"));
      return;
    }
    if (write) grain.writer = mine, grain.atomic = atomic;
    if (!write) grain.reader = grain.reader == 0 || grain.reader == mine ? mine : kSeveral;
  }
}

void global_fence() { fenced = true; }

void count_buffers() {
  if (!settings().profile) return;
  for (const Buffer& b : buffers) {
    const auto low = sectors.lower_bound(b.begin / 32);
    const auto high = sectors.upper_bound((b.begin + b.bytes - 1) / 32);
    counts().buffers.push_back({b.name, b.bytes, b.read_bytes, b.written_bytes,
                                static_cast<uint64_t>(std::distance(low, high))});
  }
}

void fence(Loc) { global_fence(); }

void trap(Loc loc) { stop("trap at " + where(loc)); }

namespace {
bool is_shared(const void* p) {
  const auto offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(shared_bytes());
  return offset < kSharedBytes;
}

void access(const void* p, int bytes, bool write, Site site) {
  if (!is_shared(p)) return access_global(p, bytes, write, false, site);
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

void store_global(void* to, const void* from, int bytes, Loc loc) {
  expect_global(to, loc);
  store(to, from, bytes, loc);
}

uint64_t atomic(void* p, int bytes, uint64_t (*update)(uint64_t, uint64_t), uint64_t operand,
                Loc loc) {
  Quiet q;
  uint64_t old = 0;
  if (is_shared(p)) stop("no kernel here uses atomics on shared memory, at " + where(loc));
  access_global(p, bytes, true, true, site_of(loc));
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
