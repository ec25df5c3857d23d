#include "linear_small.cuh"

namespace gemma4 {

void linear_small(LinearSmallParams p, DType dtype, const Device& device) {
  if (p.tokens == 0) return;
  p.a_stride = padded_row(p.width);
  if (p.packed.codes) return linear_small_packed(p, dtype, device);
  with_half_type("linear_small", dtype, [&]<class T>() {
    const auto run = [&]<bool kOpens, int kSets, bool kGated>() {
      const int tiles = p.rows / (kGated ? 8 : 8 * kSets);
      const size_t a_bytes = kOpens ? sizeof(T) * p.tokens * p.a_stride : 0;
      // As many blocks as are resident at once: each makes a but once.
      launch(device, "linear_small", linear_small_kernel<T, kOpens, kSets, kGated>,
             {.grid = std::clamp(tiles, 1, 2 * device.sm_count),
              .block = kLinearThreads,
              .smem_bytes = sizeof(LinearSmallSmem<kSets>) + a_bytes,
              .dependent = true},
             p);
    };
    const auto run_sets = [&]<bool kOpens>() {
      if (p.gated) return run.template operator()<kOpens, 2, true>();
      const bool many = p.rows % 16 == 0 && p.rows / 16 >= 2 * device.sm_count;
      return many ? run.template operator()<kOpens, 2, false>()
                  : run.template operator()<kOpens, 1, false>();
    };
    return p.residual || p.norm_weight ? run_sets.template operator()<true>()
                                       : run_sets.template operator()<false>();
  });
}

}  // namespace gemma4
