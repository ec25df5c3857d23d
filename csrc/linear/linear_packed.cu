#include "linear_packed.cuh"

#include "../common/launch.h"

namespace gemma4 {

namespace {

int64_t blocks_of(const LinearPackedParams& p, int token_rows) {
  return ceil_div(p.tokens, int64_t{token_rows}) * ceil_div(p.rows, kTileWeightRows);
}

// Sixteen tokens at a time, each time past all weights, which stay in L2.
void stream(const LinearPackedParams& p, DType dtype, const Device& device) {
  for (int64_t first = 0; first < p.tokens; first += kMostSmallTokens) {
    LinearSmallParams small{};
    small.x = static_cast<const char*>(p.x) + 2 * first * p.x_stride;
    small.x_stride = p.x_stride;
    small.packed = p.weight;
    small.y = static_cast<char*>(p.y) + 2 * first * p.rows;
    small.tokens = static_cast<int>(std::min<int64_t>(kMostSmallTokens, p.tokens - first));
    small.width = p.width;
    small.rows = p.rows;
    linear_small(small, dtype, device);
  }
}

}  // namespace

void linear_packed(const LinearPackedParams& p, DType dtype, const Device& device) {
  if (p.tokens == 0 || p.rows == 0) return;
  // Few blocks would leave most multiprocessors without work.
  const bool few = p.tokens <= 64 && blocks_of(p, 64) < device.sm_count;
  if (p.tokens <= kMostSmallTokens || few) return stream(p, dtype, device);
  with_half_type("linear_packed", dtype, [&]<class T>() {
    const auto run = [&]<int kBits, int kRows>() {
      launch(device, "linear_packed", linear_packed_kernel<T, kBits, kRows>, blocks_of(p, kRows),
             kTileThreads, sizeof(ProductTiles<T, kRows>), p);
    };
    const auto run_rows = [&]<int kBits>() {
      p.tokens > 64 && blocks_of(p, 128) >= device.sm_count ? run.template operator()<kBits, 128>()
                                                            : run.template operator()<kBits, 64>();
    };
    bits_of(p.weight.numbers) == 4 ? run_rows.template operator()<4>()
                                   : run_rows.template operator()<8>();
  });
}

}  // namespace gemma4
