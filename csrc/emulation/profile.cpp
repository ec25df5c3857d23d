// Counts what a warp's accesses cost: wavefronts over the 32 banks of shared memory, 32-byte
// sectors of global memory.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "runtime.h"

namespace emulation {

namespace {
const char* const kKinds[] = {"shared load", "shared store", "global load", "global store"};

// Wavefronts of lanes whose accesses go out in one phase: the most words any bank must serve.
uint64_t wavefronts(const Traced* accesses, int lanes) {
  std::set<uint64_t> words;
  for (int i = 0; i < lanes; i++)
    for (int b = 0; b < std::max<int>(accesses[i].bytes, 4); b += 4)
      words.insert((accesses[i].address + b) / 4);
  uint64_t per_bank[32] = {}, worst = 0;
  for (uint64_t word : words) worst = std::max(worst, ++per_bank[word % 32]);
  return worst;
}
}  // namespace

void trace(bool shared, bool write, uint64_t address, int bytes, Site site) {
  if (!settings().profile) return;
  current().trace.push_back({site, static_cast<uint8_t>((shared ? 0 : 2) + write),
                             static_cast<uint16_t>(bytes), address});
}

void count_together(const Traced* accesses, int lanes, const char* kind) {
  static std::map<std::tuple<Site, std::string, std::string>, size_t> rows;
  auto& sites = counts().sites;
  if (sites.empty()) rows.clear();
  const std::string buffer = accesses[0].kind < 2 ? "" : buffer_at(accesses[0].address);
  const auto [found, is_new] = rows.try_emplace({accesses[0].site, kind, buffer}, sites.size());
  if (is_new) sites.push_back({where(accesses[0].site), kind, buffer});
  SiteCount& row = sites[found->second];
  row.requests++;
  row.lanes += lanes;
  if (accesses[0].kind < 2) {
    // 4 bytes a lane go out in one phase of 32 lanes, 8 in two of 16, 16 in four of 8.
    const int phase = kLanes / std::max(1, accesses[0].bytes / 4);
    for (int i = 0; i < lanes; i += phase) {
      row.wavefronts += wavefronts(accesses + i, std::min(phase, lanes - i));
      row.ideal_wavefronts++;
    }
  } else {
    std::set<uint64_t> sectors;
    std::set<uint64_t> bytes;
    for (int i = 0; i < lanes; i++)
      for (int b = 0; b < accesses[i].bytes; b += 2) {
        sectors.insert((accesses[i].address + b) / 32);
        bytes.insert((accesses[i].address + b) / 2);
      }
    row.sectors += sectors.size();
    row.ideal_sectors += std::min<uint64_t>(sectors.size(), (bytes.size() * 2 + 31) / 32);
  }
}

// The k-th access of each source line by each lane is one request of the warp.
void flush_traces(Warp& warp) {
  if (!settings().profile) return;
  std::map<std::tuple<Site, uint8_t, int>, std::vector<Traced>> requests;
  Block& b = block();
  for (int i = warp.index * kLanes; i < std::min((warp.index + 1) * kLanes, b.num_threads); i++) {
    std::map<std::pair<Site, uint8_t>, int> occurrence;
    for (const Traced& a : b.threads[i].trace)
      requests[{a.site, a.kind, occurrence[{a.site, a.kind}]++}].push_back(a);
    b.threads[i].trace.clear();
  }
  for (const auto& [key, lanes] : requests)
    count_together(lanes.data(), static_cast<int>(lanes.size()), kKinds[std::get<1>(key)]);
}

}  // namespace emulation
