#include "moe_experts.cuh"

namespace gemma4 {

bool moe_experts_streams(int64_t tokens, int64_t k, int64_t num_experts) {
  const int64_t assignments = tokens * k;
  return is_small(tokens, k) ||
         (assignments <= MediumBatch::kAssignments && assignments <= 8 * num_experts);
}

void moe_experts_small_down(const MoeExpertsParams& p, DType dtype, const Device& device) {
  if (p.packed) return moe_experts_small_down_packed(p, dtype, device);
  with_half_type("moe_experts_small", dtype, [&]<class T>() {
    launch_small_down<T>(p, device,
                         [](const PackedWeight&, auto&& f) { f.template operator()<T>(); });
  });
}

void moe_sort(const MoeExpertsParams& p, const Device& device) {
  const int64_t assignments = int64_t{p.tokens} * p.k;
  const int threads = assignments < 1024 ? round_up(static_cast<int>(assignments), 32) : 1024;
  launch(device, "moe_experts, sort", moe_sort_kernel<>, p.num_experts, threads,
         sizeof(MoeSortSmem), p);
}

void moe_combine(const MoeExpertsParams& p, DType dtype, const Device& device) {
  with_half_type("moe_experts", dtype, [&]<class T>() {
    launch_elementwise(device, "moe_experts, combine", moe_combine_kernel<T>, p.tokens, p.width / 8,
                       p);
  });
}

void moe_experts(const MoeExpertsParams& p, const DTypes& dtypes, const Device& device) {
  if (p.tokens == 0 || p.width == 0) return;
  if (p.k == 0 || p.num_experts == 0 || p.hidden_width == 0) {
    clear(device, "moe_experts", p.y, size_t{2} * p.tokens * p.width);
    return;
  }
  moe_sort(p, device);
  with_half_type("moe_experts", dtypes.x, [&]<class T>() {
    if (p.packed)
      moe_products_packed(p, dtypes.x, device);
    else
      launch_products<T, 128>(p, device, [&](const PackedWeight&, auto&& f) {
        dtypes.weight == DType::kFloat32 ? f.template operator()<float>()
                                         : f.template operator()<T>();
      });
  });
  if (!moe_experts_streams(p.tokens, p.k, p.num_experts)) moe_combine(p, dtypes.x, device);
}

}  // namespace gemma4
