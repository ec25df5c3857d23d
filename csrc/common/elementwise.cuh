// Kernels that make each vector of a row of what stands there, a vector a thread. Threads stand
// beside each other along a row, and rows under each other in a block where one row would leave it
// half empty. The kernels are dependent.
#pragma once

#include "launch.h"

namespace gemma4 {

constexpr int kElementwiseThreads = 256;

template <class Params>
void launch_elementwise(const Device& device, const char* name, void (*kernel)(Params),
                        int64_t rows, int64_t vectors_in_row,
                        const std::type_identity_t<Params>& p) {
  unsigned along = kWarpSize;
  while (along < kElementwiseThreads && along < vectors_in_row) along *= 2;
  const unsigned down = kElementwiseThreads / along;
  const Grid grid(ceil_div<int64_t>(vectors_in_row, along),
                  std::min(ceil_div<int64_t>(rows, down), kMostBlocksY));
  launch(device, name, kernel, {.grid = grid, .block = dim3(along, down), .dependent = true}, p);
}

// Calls f(row, column) for the thread's vector of each row; a grid may hold fewer rows than there
// are.
template <int kWidth, class F>
DEVICE void each_row(int64_t rows, int width, F&& f) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * kWidth;
  if (column >= width) return;
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows;
       row += gridDim.y * blockDim.y)
    f(row, column);
}

}  // namespace gemma4
