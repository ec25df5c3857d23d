#include "linear_small_packed.cuh"

namespace gemma4 {

void linear_small_packed(const LinearSmallParams& p, DType dtype, const Device& device) {
  with_half_type("linear_small", dtype, [&]<class T>() {
    const int row_tiles = p.rows / kPackedRows;
    const auto run = [&]<bool kOpens, int kSets, bool kGated>() {
      const int tiles = row_tiles / (kGated ? 1 : kSets);
      const size_t a_bytes = kOpens ? sizeof(T) * p.tokens * p.a_stride : 0;
      const LaunchConfig config{.grid = std::clamp(tiles, 1, 2 * device.sm_count),
                                .block = kLinearThreads,
                                .smem_bytes = sizeof(LinearSmallSmem<kSets>) + a_bytes,
                                .dependent = true};
      bits_of(p.packed.numbers) == 4
          ? launch(device, "linear_small", linear_small_packed_kernel<T, kOpens, kSets, kGated, 4>,
                   config, p)
          : launch(device, "linear_small", linear_small_packed_kernel<T, kOpens, kSets, kGated, 8>,
                   config, p);
    };
    const auto run_sets = [&]<bool kOpens>() {
      if (p.gated) return run.template operator()<kOpens, 2, true>();
      const bool many = row_tiles % 2 == 0 && row_tiles / 2 >= 2 * device.sm_count;
      return many ? run.template operator()<kOpens, 2, false>()
                  : run.template operator()<kOpens, 1, false>();
    };
    return p.residual || p.norm_weight ? run_sets.template operator()<true>()
                                       : run_sets.template operator()<false>();
  });
}

}  // namespace gemma4
