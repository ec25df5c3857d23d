// wgmma: operands are read and accumulators appear when their group is waited for, the latest
// moment hardware may choose; until then the accumulators are NaN.
//
// Each warp computes its own 16 rows. Modelled of a descriptor: the tile's beginning, the stride
// from eight rows to the next and the 128-byte mode, the only one that kernels here use.
#include <cmath>
#include <limits>

#include "runtime.h"

namespace emulation {

namespace {

float value_at(uint64_t tile, int row, int column, bool is_bf16) {
  // 128 bytes a row; the mode permutes 16-byte chunks by address bits 7..9.
  const uint32_t begin = (tile & 0x3fff) << 4, stride = (tile >> 32 & 0x3fff) << 4;
  uint32_t address = begin + row / 8 * stride + row % 8 * 128 + column * 2;
  address ^= address >> 3 & 0x70;
  uint16_t bits;
  std::memcpy(&bits, shared_at(address, 2, 0), 2);
  if (is_bf16) return as_float(bf16{bits});
  fp16 half;
  std::memcpy(&half, &bits, 2);
  return as_float(half);
}

void read_tile(uint64_t tile, int first_row, int rows, Site site) {
  const uint32_t begin = (tile & 0x3fff) << 4, stride = (tile >> 32 & 0x3fff) << 4;
  for (int row = first_row; row < first_row + rows; row++)
    for (int chunk = 0; chunk < 2; chunk++) {
      const uint32_t address = begin + row / 8 * stride + row % 8 * 128 + chunk * 16;
      read_by_async_proxy(address ^ (address >> 3 & 0x70), 16, site);
    }
}

void execute(Warp& w, const Wgmma& op) {
  const int first_row = w.index % 4 * 16;
  read_tile(op.a, first_row, 16, op.site);
  read_tile(op.b, 0, op.columns, op.site);
  std::vector<float> a(16 * 16), b(size_t(op.columns) * 16);
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++) a[i * 16 + k] = value_at(op.a, first_row + i, k, op.is_bf16);
  for (int j = 0; j < op.columns; j++)
    for (int k = 0; k < 16; k++) b[j * 16 + k] = value_at(op.b, j, k, op.is_bf16);
  for (int lane = 0; lane < kLanes; lane++) {
    float* d = w.accumulators.at(op.d[lane]).data();
    for (int i = 0; i < op.columns / 2; i++) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; k++) d[i] += a[row * 16 + k] * b[column * 16 + k];
    }
  }
  counts().mma += op.columns / 8;
}

bool is_in_flight(const Warp& w, const float* d) {
  for (const Wgmma& op : w.open_wgmmas)
    if (op.d[0] == d) return true;
  for (const auto& group : w.wgmma_groups)
    for (const Wgmma& op : group)
      if (op.d[0] == d) return true;
  return false;
}

}  // namespace

bool has_wgmma() { return settings().has_wgmma; }

void wgmma_fence(Loc loc) {
  meet("wgmma.fence", kAllLanes, nullptr, site_of(loc),
       [](Warp& w, void**) { w.wgmma_fenced = true; });
}

void wgmma(float* d, int columns, uint64_t a, uint64_t b, bool is_bf16, Loc loc) {
  struct Argument {
    float* d;
    uint64_t a, b;
  } mine{d, a, b};
  const Site site = site_of(loc);
  meet("wgmma", kAllLanes, &mine, site, [=](Warp& w, void** arguments) {
    if (!w.wgmma_fenced) report("wgmma without a wgmma.fence before it, at " + where(site));
    if (a >> 62 != 1 || b >> 62 != 1)
      stop("wgmma of a tile that is not in the 128-byte mode, at " + where(site));
    Wgmma op{{}, columns, a, b, is_bf16, site};
    for (int lane = 0; lane < kLanes; lane++) {
      const auto& x = *static_cast<Argument*>(arguments[lane]);
      if (x.a != a || x.b != b) stop("the lanes of a wgmma differ in its tiles, at " + where(site));
      op.d[lane] = x.d;
      auto& held = w.accumulators[x.d];
      if (!held.empty()) continue;
      held.assign(x.d, x.d + columns / 2);
      std::fill(x.d, x.d + columns / 2, std::numeric_limits<float>::quiet_NaN());
    }
    w.open_wgmmas.push_back(op);
  });
}

void wgmma_commit(Loc loc) {
  meet("wgmma.commit_group", kAllLanes, nullptr, site_of(loc), [](Warp& w, void**) {
    w.wgmma_groups.push_back(std::move(w.open_wgmmas));
    w.open_wgmmas.clear();
  });
}

void wgmma_wait(int groups_left, Loc loc) {
  meet("wgmma.wait_group", kAllLanes, nullptr, site_of(loc), [=](Warp& w, void**) {
    while (w.wgmma_groups.size() > static_cast<size_t>(groups_left)) {
      const std::vector<Wgmma> group = std::move(w.wgmma_groups.front());
      w.wgmma_groups.pop_front();
      for (const Wgmma& op : group) execute(w, op);
      for (const Wgmma& op : group)
        if (!is_in_flight(w, op.d[0]))
          for (float* d : op.d)
            if (const auto held = w.accumulators.find(d); held != w.accumulators.end()) {
              std::copy(held->second.begin(), held->second.end(), d);
              w.accumulators.erase(held);
            }
    }
    w.wgmma_fenced = false;
  });
}

void end_of_warp_wgmmas(Warp& w) {
  if (!w.open_wgmmas.empty() || !w.wgmma_groups.empty())
    report("warp " + std::to_string(w.index) + " exits with wgmmas never waited for");
}

}  // namespace emulation
