#include "moe_route.cuh"

namespace gemma4 {

void moe_route(const MoeRouteParams& p, DType dtype, const Device& device) {
  if (p.tokens == 0) return;
  if (p.num_experts > kMostRoutedExperts || p.k > kMostRoutes)
    throw std::runtime_error("moe_route: at most " + std::to_string(kMostRoutedExperts) +
                             " experts and k = " + std::to_string(kMostRoutes) + ", got " +
                             std::to_string(p.num_experts) + " and " + std::to_string(p.k));
  with_type(dtype, [&]<class T>() {
    const auto kernel = p.num_experts <= 128 ? moe_route_kernel<T, 4>
                                             : moe_route_kernel<T, kMostRoutedExperts / 32>;
    launch(device, "moe_route", kernel, ceil_div<int64_t>(p.tokens, kRouteWarps), kRouteWarps * 32,
           0, p);
  });
}

}  // namespace gemma4
