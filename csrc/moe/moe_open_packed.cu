#include "moe_open.cuh"

namespace gemma4 {

void moe_open_packed(const MoeOpenParams& p, DType dtype, const Device& device) {
  with_half_type("moe_open", dtype, [&]<class T>() {
    const int tiles = p.rows / kPackedRows;
    bits_of(p.gate_up.numbers) == 4 ? launch_moe_open<T, Bits<4>>(p, tiles, device)
                                    : launch_moe_open<T, Bits<8>>(p, tiles, device);
  });
}

}  // namespace gemma4
