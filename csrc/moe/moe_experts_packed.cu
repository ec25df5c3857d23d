#include "moe_experts.cuh"

namespace gemma4 {

namespace {

// The two weights may have different widths of code.
const auto with_bits = [](const PackedWeight& weight, auto&& f) {
  bits_of(weight.numbers) == 4 ? f.template operator()<Bits<4>>()
                               : f.template operator()<Bits<8>>();
};

}  // namespace

void moe_experts_small_down_packed(const MoeExpertsParams& p, DType dtype, const Device& device) {
  with_half_type("moe_experts_small", dtype,
                 [&]<class T>() { launch_small_down<T>(p, device, with_bits); });
}

// Tiles have 64 rows however many tokens there are: with 128 registers would not hold what is on
// its way, and three blocks hide what it costs to make numbers of codes.
void moe_products_packed(const MoeExpertsParams& p, DType dtype, const Device& device) {
  with_half_type("moe_experts", dtype,
                 [&]<class T>() { launch_products<T, 64>(p, device, with_bits); });
}

}  // namespace gemma4
