#include "qkv_attention_decode.cuh"

namespace gemma4 {

void qkv_attention_decode(const QkvAttentionDecodeParams& p, DType dtype, const Device& device) {
  constexpr const char* name = "qkv_attention_decode";
  const AttentionParams& a = p.attention;
  if (a.batch == 0 || a.q_heads == 0) return;
  with_half_type(name, dtype, [&]<class T>() {
    const auto start = [&]<class Tile>(void (*kernel)(QkvAttentionDecodeParams)) {
      launch(device, name, kernel,
             {.grid = Grid(a.batch, a.kv_heads, a.splits.divisor),
              .block = Tile::kThreads,
              .smem_bytes = sizeof(QkvAttentionDecodeSmem<T, Tile>),
              .dependent = true},
             p);
    };
    if (a.k_scales)
      return with_coded_tile(name, a.head_dim, [&]<class Tile>() {
        start.template operator()<Tile>(qkv_attention_decode_kernel<T, Tile, false>);
      });
    with_tile<T>(name, a.head_dim, 16, device, [&]<class Tile>() {
      if constexpr (Tile::kRows == 16)  // others are for more rows
        start.template operator()<Tile>(a.softcap > 0
                                            ? qkv_attention_decode_kernel<T, Tile, true>
                                            : qkv_attention_decode_kernel<T, Tile, false>);
    });
  });
}

}  // namespace gemma4
