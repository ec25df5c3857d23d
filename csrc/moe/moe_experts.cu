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

void moe_experts(const MoeExpertsParams& p, const DTypes& dtypes, const Device& device) {
  if (p.tokens == 0 || p.width == 0) return;
  if (p.k == 0 || p.num_experts == 0 || p.hidden_width == 0) {
    clear(device, "moe_experts", p.y, size_t{2} * p.tokens * p.width);
    return;
  }
  if (p.packed) return moe_experts_packed(p, dtypes.x, device);
  with_half_type("moe_experts", dtypes.x, [&]<class T>() {
    launch_experts<T, 128>(p, device, [&](const PackedWeight&, auto&& f) {
      dtypes.weight == DType::kFloat32 ? f.template operator()<float>()
                                       : f.template operator()<T>();
    });
  });
}

}  // namespace gemma4
