// Shared memory: poison, bounds, and the happens-before race detector.
//
// Every thread has a vector clock. Barriers and __syncwarp are the only edges; a shuffle orders no
// memory. Each 4-byte word remembers who wrote its bytes last and two of its readers.
#include <algorithm>

#include "runtime.h"

namespace emulation {

namespace {

alignas(1024) unsigned char arena[kSharedBytes];

SharedWord& word_at(uint32_t address) { return block().words[(address - kSharedBase) / 4]; }

bool is_ordered(const Mark& mark, int thread) {
  return mark.bytes == 0 || mark.thread == thread ||
         mark.clock <= block().clock_of(thread)[mark.thread];
}

std::string place(uint32_t address, Site site) {
  return "shared offset " + std::to_string(address - kSharedBase) + " at " + where(site);
}

void report_race(int thread, uint32_t address, bool write, Site site, const Mark& other,
                 bool other_wrote, Site written_at) {
  report(std::string("race: ") + (write ? "write" : "read") + " by " +
         name_of(block().threads[thread]) + " of " + place(address, site) +
         " is not ordered after the " + (other_wrote ? "write" : "read") + " by " +
         name_of(block().threads[other.thread]) + (other_wrote ? " at " + where(written_at) : ""));
}

void access_word(SharedWord& w, int thread, uint32_t address, uint8_t bytes, bool write,
                 Site site) {
  Block& b = block();
  const uint32_t clock = b.clock_of(thread)[thread];
  if (w.copies_in_flight) {
    report(std::string(write ? "write" : "read") + " by " + name_of(block().threads[thread]) +
           " of " + place(address, site) + " with an asynchronous copy in flight");
    return;
  }
  for (int i = 0; i < 4; i++) {
    const Mark& mark = w.writer[i];
    if (!(bytes >> i & 1)) continue;
    if (!is_ordered(mark, thread))
      return report_race(thread, address, write, site, mark, true, w.written_at);
  }
  if (write)
    for (const Mark& mark : w.reader)
      if (mark.bytes & bytes && !is_ordered(mark, thread))
        return report_race(thread, address, write, site, mark, false, 0);
  const Mark mine{static_cast<uint16_t>(thread), bytes, clock};
  if (write) {
    for (int i = 0; i < 4; i++)
      if (bytes >> i & 1) w.writer[i] = mine;
    for (Mark& mark : w.reader)
      if (!(mark.bytes & ~bytes)) mark = {};
    w.written_at = site;
    return;
  }
  Mark* slot = nullptr;
  for (Mark& mark : w.reader)
    if (mark.bytes && mark.thread == thread) slot = &mark;
  if (slot) {
    slot->bytes |= bytes;
    slot->clock = clock;
    return;
  }
  for (Mark& mark : w.reader)
    if (!mark.bytes || is_ordered(mark, thread)) slot = &mark;
  if (!slot) slot = &w.reader[running->random.below(2)];
  *slot = mine;
}

}  // namespace

unsigned char* shared_bytes() { return arena; }

void begin_shared(Block& b) {
  std::memset(arena, 0xff, running->smem_bytes);  // NaN in bf16, fp16 and fp32
  if (!settings().races) return;
  b.words.assign((running->smem_bytes + 3) / 4, SharedWord{});
  b.clocks.assign(size_t(b.num_threads) * b.num_threads, 0);
  for (int i = 0; i < b.num_threads; i++) b.clock_of(i)[i] = 1;
}

unsigned char* shared_at(uint32_t address, int bytes, Site site) {
  const int64_t offset = int64_t{address} - kSharedBase;
  if (offset < 0 || offset + bytes > int64_t(running->smem_bytes))
    stop("shared access out of bounds: offset " + std::to_string(offset) + ", " +
         std::to_string(bytes) + " bytes of " + std::to_string(running->smem_bytes) + ", at " +
         where(site) + " by " + name_of(current()));
  return arena + offset;
}

void access_shared(int thread, uint32_t address, int bytes, bool write, Site site) {
  shared_at(address, bytes, site);
  if (!settings().races) return;
  const uint32_t end = address + bytes;
  for (uint32_t word = address & ~3u; word < end; word += 4) {
    const uint32_t first = std::max(address, word) - word, last = std::min(end, word + 4) - word;
    access_word(word_at(word), thread, word, static_cast<uint8_t>((1u << last) - (1u << first)),
                write, site);
  }
}

void join_clocks(uint32_t* into, const uint32_t* from) {
  for (int i = 0; i < block().num_threads; i++) into[i] = std::max(into[i], from[i]);
}

// A barrier: what `arriving` did so far is ordered before what `leaving` does next.
void order(const std::vector<int>& arriving, const std::vector<int>& leaving) {
  if (!settings().races) return;
  Block& b = block();
  static std::vector<uint32_t> joined;
  joined.assign(b.num_threads, 0);
  for (int t : arriving) join_clocks(joined.data(), b.clock_of(t));
  for (int t : leaving) join_clocks(b.clock_of(t), joined.data());
  for (int t : arriving) b.clock_of(t)[t]++;
  order_known(arriving, leaving);
}

void copy_in_flight(uint32_t address, int bytes, bool begins) {
  if (!settings().races) return;
  for (uint32_t word = address & ~3u; word < address + bytes; word += 4)
    word_at(word).copies_in_flight += begins ? 1 : -1;
}

void landed(int thread, uint32_t address, int bytes, Site site) {
  if (!settings().races) return;
  const Mark mark{static_cast<uint16_t>(thread), 15, block().clock_of(thread)[thread]};
  for (uint32_t word = address & ~3u; word < address + bytes; word += 4) {
    for (Mark& writer : word_at(word).writer) writer = mark;
    word_at(word).written_at = site;
  }
}

// What a thread wrote it must fence before another unit may read it.
void read_by_async_proxy(uint32_t address, int bytes, Site site) {
  access_shared(current().index, address, bytes, false, site);
  if (!settings().races) return;
  for (uint32_t word = address & ~3u; word < address + bytes; word += 4)
    for (const Mark& mark : word_at(word).writer)
      if (mark.bytes && mark.clock > block().threads[mark.thread].proxy_fenced)
        return report("wgmma reads " + place(word, site) + ", written by " +
                      name_of(block().threads[mark.thread]) + " at " +
                      where(word_at(word).written_at) + " without a fence.proxy.async since");
}

void fence_async_proxy() {
  Quiet q;
  if (!settings().races) return;
  Thread& t = current();
  uint32_t& clock = block().clock_of(t.index)[t.index];
  t.proxy_fenced = clock++;
}

void* shared_memory(size_t bytes, size_t alignment) {
  Quiet q;
  if (bytes > running->smem_bytes)
    stop("a kernel uses " + std::to_string(bytes) +
         " bytes of shared memory, its launcher passed " + std::to_string(running->smem_bytes));
  if (alignment > 1024) stop("shared memory is aligned to 1024 bytes at most");
  return arena;
}

uint32_t shared_address(const void* pointer, Loc loc) {
  Quiet q;
  const auto offset = static_cast<const unsigned char*>(pointer) - arena;
  if (offset < 0 || offset >= ptrdiff_t(kSharedBytes))
    stop("not the address of shared memory, at " + where(loc));
  return static_cast<uint32_t>(offset) + kSharedBase;
}

}  // namespace emulation
