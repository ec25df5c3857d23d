// Which tile an attention launch gets, and its shared memory.
#pragma once

#include <type_traits>

#include "../common/launch.h"
#include "cards.h"
#include "mainloop_wgmma.cuh"
#include "ops.h"
#include "products.cuh"

namespace gemma4 {

// The scales of the keys and values that are codes: of this tile and of the next one.
template <class Tile, bool kNeeded = Tile::kCoded>
struct KeyScales {
  float scale[Tile::kStages + 1][2][Tile::kKeys];
};
template <class Tile>
struct KeyScales<Tile, false> {};

template <class T, class Tile>
struct AttentionSmem : ScoreExchange<Tile>, KeyScales<Tile> {
  using Operand = T;
  using Key = std::conditional_t<Tile::kCoded, e4m3, T>;
  static constexpr int kOffsets = Tile::kStages + 1;
  static constexpr int kAlignment = Tile::kWgmma ? 1024 : 128;
  alignas(kAlignment) T q[Tile::kRows * Tile::kHeadDim];  // at the end: out
  alignas(kAlignment) Key k[Tile::kStages][Tile::kKeys * Tile::kHeadDim];
  alignas(kAlignment) Key v[Tile::kStages][Tile::kKeys * Tile::kHeadDim];
  // Where this tile's and the next ones' keys lie, in elements.
  int64_t offset[kOffsets][Tile::kKeys];
};

// The released models want head_dim 256 and 512 without softcap; 64, 128 and softcap are for others
// that the transformers plug-in serves. Of the 2.1 MB of instructions and 29 s of one core that
// attention.cu takes for sm_90a, 64 and 128 are 0.65 MB and about 7 s, softcap is 1.1 MB and about
// 15 s; packed, as in the library, a third of the bytes.
//
// Calls f.operator()<Tile>() with the tile for this head size, this many rows of a sequence and
// this card. 16 rows where that is all there are; else as many as fit, and where two blocks fit a
// multiprocessor, warps that need no exchange. On Hopper L2 is the bound, and one block with twice
// the rows is better than two.
template <class T, class F>
constexpr void with_tile(const char* name, int head_dim, int64_t rows, const Card& card, F&& f) {
  const size_t max_smem_bytes = card.max_smem_bytes;
  const auto fits = [&]<class Tile>(int blocks) {
    // A multiprocessor has 1 KB more than one block may take, and keeps 1 KB for each block.
    return blocks * (sizeof(AttentionSmem<T, Tile>) + 1024) <= max_smem_bytes + 1024;
  };
  const auto use = [&]<class Tile>() {
    if (!fits.template operator()<Tile>(1))
      throw std::runtime_error(std::string(name) + ": no tile of head_dim " +
                               std::to_string(head_dim) + " fits in " +
                               std::to_string(max_smem_bytes) + " bytes of shared memory");
    f.template operator()<Tile>();
  };
  const bool small = rows <= 16, wgmma = card.wgmma;
  switch (head_dim) {
    case 64:
      return small ? use.template operator()<AttentionTile<64, 16, 64, 4>>()
                   : use.template operator()<AttentionTile<64, 64, 64, 1>>();
    case 128:
      return small ? use.template operator()<AttentionTile<128, 16, 32, 4>>()
                   : use.template operator()<AttentionTile<128, 64, 64, 1>>();
    case 256:
      if (small) return use.template operator()<AttentionTile<256, 16, 32, 4>>();
      if (wgmma && rows > 64) return use.template operator()<HopperTile<256, 128, 64, 1>>();
      return fits.template operator()<AttentionTile<256, 64, 32, 1>>(2)
                 ? use.template operator()<AttentionTile<256, 64, 32, 1>>()
                 : use.template operator()<AttentionTile<256, 64, 32, 2>>();
    case 512:
      if (small) return use.template operator()<AttentionTile<512, 16, 32, 4>>();
      if (wgmma) return use.template operator()<HopperTile<512, 64, 32, 2>>();
      return fits.template operator()<AttentionTile<512, 64, 32, 2>>(1)
                 ? use.template operator()<AttentionTile<512, 64, 32, 2>>()
                 : use.template operator()<AttentionTile<512, 48, 16, 2>>();
    default:
      throw std::runtime_error(std::string(name) +
                               ": there are kernels for head_dim 64, 128, 256 and 512, got " +
                               std::to_string(head_dim));
  }
}

template <class T, class F>
void with_tile(const char* name, int head_dim, int64_t rows, const Device& device, F&& f) {
  with_tile<T>(name, head_dim, rows, Card{device.max_smem_bytes, has_wgmma(device)}, f);
}

// The same for keys in e4m3, for whose heads there is one tile that fits every card.
template <class F>
void with_coded_tile(const char* name, int head_dim, F&& f) {
  if (head_dim == 256) return f.template operator()<CodedTile<256, 32>>();
  if (head_dim == 512) return f.template operator()<CodedTile<512, 32>>();
  throw std::runtime_error(std::string(name) +
                           ": there are kernels for e4m3 of head_dim 256 and 512, got " +
                           std::to_string(head_dim));
}

// Whether a card that runs this code is ever given this tile.
template <class T, class Tile>
constexpr bool chosen_on_any_card() {
  bool found = Tile::kCoded;
  for (const Card& card : kCards)
    for (int rows : {16, 64, 128})
      with_tile<T>("", Tile::kHeadDim, rows, card,
                   [&]<class Chosen>() { found |= std::is_same_v<Chosen, Tile>; });
  return found;
}
template <class T, class Tile>
constexpr bool kChosenHere = chosen_on_any_card<T, Tile>();

// One launch of attention_kernel over all rows, heads and splits; in attention.cu, so that its
// instances are compiled once.
void attention(const char* name, const AttentionParams& params, DType dtype, const Device& device);

}  // namespace gemma4
