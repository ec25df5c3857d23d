// wgmma: operands in shared memory are read and accumulators appear when their group is waited for,
// the latest moment hardware may choose; until then the accumulators are NaN. An operand in
// registers is read at once: that nobody overwrites it is the compiler's to see.
//
// Each warp computes its own 16 rows. Modelled of a descriptor: the tile's beginning, the stride
// from eight rows to the next, of transposed tiles the one to the next 64 columns, and the 128-byte
// mode, the only one that kernels here use.
#include <cmath>
#include <limits>

#include "runtime.h"

namespace emulation {

namespace {

float value_of(uint16_t bits, bool is_bf16) {
  if (is_bf16) return as_float(bf16{bits});
  fp16 half;
  std::memcpy(&half, &bits, 2);
  return as_float(half);
}

// 128 bytes a row; the mode permutes 16-byte chunks by address bits 7..9.
uint32_t address_in(uint64_t tile, int row, int column) {
  const uint32_t begin = (tile & 0x3fff) << 4, panel = (tile >> 16 & 0x3fff) << 4;
  const uint32_t eight_rows = (tile >> 32 & 0x3fff) << 4;
  const uint32_t address =
      begin + column / 64 * panel + row / 8 * eight_rows + row % 8 * 128 + column % 64 * 2;
  return address ^ (address >> 3 & 0x70);
}

// Sixteen columns of a tile's rows, row by row; of a transposed tile sixteen rows of its columns.
std::vector<float> read_tile(uint64_t tile, int first, int count, bool transposed,
                             const Wgmma& op) {
  std::vector<float> values(count * 16);
  for (int i = 0; i < (transposed ? 16 : count); i++)
    for (int j = 0; j < (transposed ? count : 16); j += 8) {
      const uint32_t address =
          transposed ? address_in(tile, i, first + j) : address_in(tile, first + i, j);
      read_by_async_proxy(address, 16, op.site);
      uint16_t bits[8];
      std::memcpy(bits, shared_at(address, 16, op.site), 16);
      for (int n = 0; n < 8; n++)
        values[transposed ? (j + n) * 16 + i : i * 16 + j + n] = value_of(bits[n], op.is_bf16);
    }
  return values;
}

// Eight rows of 16 bytes, or 128 bytes of a transposed tile's row, are one access to all banks.
void count_tile(uint64_t tile, int first, int count, bool transposed, Site site) {
  if (!settings().profile) return;
  std::vector<Traced> accesses;
  const int chunks = count / 8;
  for (int i = 0; i < count * 2; i++) {
    const uint32_t address = transposed ? address_in(tile, i / chunks, first + i % chunks * 8)
                                        : address_in(tile, first + i % count, i / count * 8);
    accesses.push_back({site, 0, 16, address});
  }
  for (size_t i = 0; i < accesses.size(); i += kLanes)
    count_together(&accesses[i], kLanes, "wgmma");
}

void execute(Warp& w, const Wgmma& op) {
  const bool in_registers = !op.a_registers.empty();
  const int first_row = w.index % 4 * 16;
  std::vector<float> a(16 * 16);
  if (in_registers)
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++) {
        const uint32_t pair = op.a_registers[i % 8 * 4 + k % 8 / 2][i / 8 + k / 8 * 2];
        a[i * 16 + k] = value_of(static_cast<uint16_t>(pair >> k % 2 * 16), op.is_bf16);
      }
  else
    a = read_tile(op.a, first_row, 16, op.a_transposed, op);
  const std::vector<float> b = read_tile(op.b, 0, op.columns, op.b_transposed, op);
  if (!in_registers && !op.a_transposed) count_tile(op.a, first_row, 16, false, op.site);
  if (first_row == 0) {  // the four warps share b, and the rows of a transposed a
    if (op.a_transposed) count_tile(op.a, 0, 64, true, op.site);
    count_tile(op.b, 0, op.columns, op.b_transposed, op.site);
  }
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

namespace {

// `a` is a tile, or `registers` the lane's part of it.
void issue(float* d, int columns, uint64_t a, const uint32_t* registers, uint64_t b,
           bool a_transposed, bool b_transposed, bool is_bf16, Loc loc) {
  struct Argument {
    float* d;
    uint64_t a, b;
    const uint32_t* registers;
  } mine{d, a, b, registers};
  const Site site = site_of(loc);
  meet("wgmma", kAllLanes, &mine, site, [=](Warp& w, void** arguments) {
    if (!w.wgmma_fenced) report("wgmma without a wgmma.fence before it, at " + where(site));
    if ((!registers && a >> 62 != 1) || b >> 62 != 1)
      stop("wgmma of a tile that is not in the 128-byte mode, at " + where(site));
    Wgmma op{{}, columns, a, b, a_transposed, b_transposed, is_bf16, site, {}};
    for (int lane = 0; lane < kLanes; lane++) {
      const auto& x = *static_cast<Argument*>(arguments[lane]);
      if (x.a != a || x.b != b) stop("the lanes of a wgmma differ in its tiles, at " + where(site));
      op.d[lane] = x.d;
      if (registers)
        op.a_registers.push_back({x.registers[0], x.registers[1], x.registers[2], x.registers[3]});
      auto& held = w.accumulators[x.d];
      if (!held.empty()) continue;
      held.assign(x.d, x.d + columns / 2);
      std::fill(x.d, x.d + columns / 2, std::numeric_limits<float>::quiet_NaN());
    }
    w.open_wgmmas.push_back(std::move(op));
  });
}

}  // namespace

void wgmma(float* d, int columns, uint64_t a, uint64_t b, bool a_transposed, bool b_transposed,
           bool is_bf16, Loc loc) {
  issue(d, columns, a, nullptr, b, a_transposed, b_transposed, is_bf16, loc);
}

void wgmma_trans(float* d, int columns, const uint32_t* a, uint64_t b, bool is_bf16, Loc loc) {
  issue(d, columns, 0, a, b, false, true, is_bf16, loc);
}

void wgmma_commit(Loc loc) {
  meet("wgmma.commit_group", kAllLanes, nullptr, site_of(loc), [](Warp& w, void**) {
    w.wgmma_groups.push_back(std::move(w.open_wgmmas));
    w.open_wgmmas.clear();
    w.wgmma_fenced = false;  // stricter than need be: each group has its fence
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
  });
}

void end_of_warp_wgmmas(Warp& w) {
  if (!w.open_wgmmas.empty() || !w.wgmma_groups.empty())
    report("warp " + std::to_string(w.index) + " exits with wgmmas never waited for");
}

}  // namespace emulation
