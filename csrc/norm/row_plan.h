// How many threads share a row, and how many pieces of 16 bytes each of them holds.
#pragma once

#include "../common/launch.h"
#include "../common/vec.cuh"

namespace gemma4 {

struct RowPlan {
  int pieces;  // a thread; 1, 2 or 4, or 0: the row does not go in pieces
  int threads;
  int blocks;
};

// Few pieces a thread keep every load of a single row in flight at once; at most 256 threads keep
// several rows on a multiprocessor, so that one row's block sum hides behind another's loads. Rows
// beyond 16 KB, wider than any Gemma 4 in 16 bits, do not go in pieces. A piece is 16 bytes of the
// widest type.
template <class... T>
RowPlan plan_rows(int64_t rows, int width, bool in_pieces, const Device& device) {
  const int pieces_in_row = ceil_div(width, kFullWidth<T...>);
  RowPlan plan{0, width < 256 ? round_up(width, kWarpSize) : 256, 0};
  if (in_pieces && pieces_in_row <= 4 * 256) {
    plan.pieces = 1;
    while (plan.pieces * 256 < pieces_in_row) plan.pieces *= 2;
    plan.threads = round_up(ceil_div(pieces_in_row, plan.pieces), kWarpSize);
  }
  const int resident = device.sm_count * (2048 / plan.threads);
  plan.blocks = static_cast<int>(rows < resident ? rows : resident);
  return plan;
}

// Calls f.operator()<kPieces>() for a plan with pieces.
template <class F>
void with_pieces(const RowPlan& plan, F&& f) {
  if (plan.pieces == 1) return f.template operator()<1>();
  if (plan.pieces == 2) return f.template operator()<2>();
  return f.template operator()<4>();
}

}  // namespace gemma4
