// Races in global memory: between threads of one block, and between blocks.
//
// Blocks run one after another, so a race between two of them never shows in the values. It is
// found from who touched what. Two accesses to the same two bytes, one of them a write, are ordered
// if both are atomic; within a block if barriers order them; between blocks if the first block
// released what it did, by an atomic that is a release or follows a fence of its thread, and the
// second acquired it, by an atomic on the same address that is an acquire or has a fence behind it.
// A thread knows what it acquired itself and what those knew whom it met at a barrier since.
//
// What the launch writes nobody may read by ld.global.nc, ordered or not.
#include "runtime.h"

namespace emulation {

namespace {

// A thread's time between two of its barriers, fences and releases.
struct Moment {
  uint32_t block, clock;
  uint16_t thread;
};

constexpr int kPageBytes = 4096, kGrain = 2;
constexpr uint32_t kMark = 1u << 31, kSeveral = kMark - 1;
struct Grain {
  uint32_t writer = 0;  // moment, or 0; marked: an atomic
  uint32_t reader = 0;  // moment, 0, or kSeveral; marked: one of them by ld.global.nc
  uint16_t written_at = 0, read_at = 0;
};
struct Page {
  Grain grains[kPageBytes / kGrain];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::vector<Moment> moments(1);
std::vector<Site> sites(1);
std::unordered_map<uintptr_t, Known> released;

Grain* grains_at(uintptr_t address) {
  static uintptr_t last = ~uintptr_t{0};
  static Page* page = nullptr;
  if (pages.empty()) last = ~uintptr_t{0};
  if (address / kPageBytes != last) {
    last = address / kPageBytes;
    auto& held = pages[last];
    if (!held) held = std::make_unique<Page>();
    page = held.get();
  }
  return page->grains + address % kPageBytes / kGrain;
}

uint16_t number_of(Site site) {
  struct Entry {
    Site site;
    uint16_t number;
  };
  static Entry recent[256];
  static std::unordered_map<Site, uint16_t> numbers;
  Entry& entry = recent[(site ^ site >> 48 ^ site >> 8) % 256];
  if (entry.site == site) return entry.number;
  const auto [found, is_new] = numbers.try_emplace(site, static_cast<uint16_t>(sites.size()));
  if (is_new) sites.push_back(site);
  entry = {site, found->second};
  return entry.number;
}

uint32_t& clock() {
  Thread& t = current();
  return block().clock_of(t.index)[t.index];
}

uint32_t this_moment() {
  Thread& t = current();
  if (!t.moment || moments[t.moment].clock != clock()) {
    t.moment = static_cast<uint32_t>(moments.size());
    moments.push_back({static_cast<uint32_t>(block().linear), clock(), uint16_t(t.index)});
  }
  return t.moment;
}

bool is_ordered(const Moment& m) {
  const Thread& t = current();
  if (m.block == block().linear)
    return m.thread == t.index || m.clock <= block().clock_of(t.index)[m.thread];
  if (!t.known) return false;
  const auto found = t.known->find(m.block);
  return found != t.known->end() && m.clock <= (*found->second)[m.thread];
}

// Whether nothing or only what is ordered before this access stands there.
bool is_ordered(uint32_t moment) {
  moment &= ~kMark;
  return moment == 0 || (moment != kSeveral && is_ordered(moments[moment]));
}

std::string who(uint32_t moment) {
  moment &= ~kMark;
  if (moment == kSeveral) return "several blocks";
  return moments[moment].block == block().linear
             ? name_of(block().threads[moments[moment].thread])
             : "block number " + std::to_string(moments[moment].block);
}

bool is_of_this_block(uint32_t moment) {
  moment &= ~kMark;
  return moment != kSeveral && moments[moment].block == block().linear;
}

void report_race(const Grain& grain, bool write, const std::string& place, Site site) {
  const bool written = !is_ordered(grain.writer);
  const uint32_t other = written ? grain.writer : grain.reader;
  report(std::string(is_of_this_block(other) ? "race" : "race between blocks") + ": " +
         (write ? "write" : "read") + " of " + place + ", at " + where(site) +
         ", is not ordered after the " + (written ? "write" : "read") + " by " + who(other) +
         " at " + where(sites[written ? grain.written_at : grain.read_at]));
}

void report_stale(const Grain& grain, bool write, const std::string& place, Site site) {
  const Site read = write ? sites[grain.read_at] : site;
  const Site written = write ? site : sites[grain.written_at];
  report("ld.global.nc of " + place + ", at " + where(read) +
         ", which the same launch writes, at " + where(written));
}

Known join(const Known& a, const Known& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  std::shared_ptr<Past> both;
  for (const auto& [of, clocks] : *b) {
    const auto found = a->find(of);
    if (found != a->end() && found->second == clocks) continue;
    if (!both) both = std::make_shared<Past>(*a);
    auto& held = (*both)[of];
    if (held) {
      Clocks later = *held;
      for (size_t i = 0; i < later.size(); i++) later[i] = std::max(later[i], (*clocks)[i]);
      held = std::make_shared<const Clocks>(later);
    } else {
      held = clocks;
    }
  }
  return both ? both : a;
}

// What the thread knows, its own block's past among it, which ends here.
Known release() {
  Thread& t = current();
  const uint32_t* clocks = block().clock_of(t.index);
  auto all = std::make_shared<Past>();
  if (t.known) *all = *t.known;
  (*all)[static_cast<uint32_t>(block().linear)] =
      std::make_shared<const Clocks>(clocks, clocks + block().num_threads);
  clock()++;
  return all;
}

}  // namespace

void begin_blocks() {
  pages.clear();
  moments.resize(1);
  released.clear();
}

void access_between_blocks(uintptr_t address, int bytes, bool write, Via via,
                           const std::string& buffer, uintptr_t buffer_begin, Site site) {
  const bool atomic = via == Via::kAtomic;
  const uint32_t mine = this_moment();
  const uint16_t here = number_of(site);
  Grain* const first = grains_at(address);
  Grain* const last = first + (bytes + kGrain - 1) / kGrain;
  if (write && !atomic && !released.empty()) released.erase(address);
  for (Grain* grain = first; grain < last; grain++) {
    const auto place = [&] {
      return "'" + buffer + "', offset " +
             std::to_string(address + (grain - first) * kGrain - buffer_begin);
    };
    const bool both_atomic = atomic && grain->writer & kMark;
    if (!both_atomic && !(is_ordered(grain->writer) && (!write || is_ordered(grain->reader))))
      return report_race(*grain, write, place(), site);
    if (write ? grain->reader & kMark : via == Via::kReadOnly && grain->writer)
      return report_stale(*grain, write, place(), site);
    if (write) {
      grain->writer = atomic ? mine | kMark : mine;
      grain->written_at = here;
      continue;
    }
    const uint32_t read_only = via == Via::kReadOnly ? kMark : grain->reader & kMark;
    const bool alone = is_ordered(grain->reader) || is_of_this_block(grain->reader);
    grain->reader = (alone ? mine : kSeveral) | read_only;
    grain->read_at = here;
  }
}

void atomic_between_blocks(uintptr_t address, bool acquires_and_releases) {
  Thread& t = current();
  Known& there = released[address];
  if (acquires_and_releases) {
    t.known = join(t.known, there);
    there = release();
  } else {
    t.seen = join(t.seen, there);
    there = join(there, t.fenced);
  }
}

void fence(Loc) {
  Quiet q;
  if (!settings().races) return;
  Thread& t = current();
  t.known = join(t.known, t.seen);
  t.seen = nullptr;
  t.fenced = release();
}

void order_known(const std::vector<int>& arriving, const std::vector<int>& leaving) {
  Known all;
  for (int t : arriving) all = join(all, block().threads[t].known);
  if (!all) return;
  for (int t : leaving) block().threads[t].known = join(all, block().threads[t].known);
}

}  // namespace emulation
