// The shape of a launch that works on every piece of every row: threads beside each other along a
// row, and rows under each other in a block where one row would leave it half empty. Kernels walk
// over the rows that are more than a grid holds.
#pragma once

#include "launch.h"

namespace gemma4 {

struct PiecePlan {
  Grid grid;
  dim3 block;
};

inline PiecePlan plan_pieces(int64_t rows, int64_t pieces_in_row) {
  unsigned along = kWarpSize;
  while (along < 256 && along < pieces_in_row) along *= 2;
  const unsigned down = 256 / along;
  const int64_t groups = ceil_div<int64_t>(rows, down);
  return {Grid(ceil_div<int64_t>(pieces_in_row, along), std::min(groups, kMostBlocksY)),
          dim3(along, down)};
}

}  // namespace gemma4
