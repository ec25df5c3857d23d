// sum = Σ_blocks partial[block], for each column of up to two weights.
//
// A block owns 32 columns: each of its warps adds every 32nd row of `partial`, and then one adds
// the warps' sums, all in an order that never changes. Shared memory: one float a thread. Bound:
// the latency of blocks / 32 loads.
#include "../common/launch.h"
#include "ops.h"

namespace gemma4 {

namespace {

struct AddParams {
  WeightGradients gradients;
  int width;
};

struct AddSmem {
  float of_warp[32][32];
};

__global__ void __launch_bounds__(1024)
    add_weight_gradients_kernel(const __grid_constant__ AddParams p) {
  AddSmem& smem = shared_memory<AddSmem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, which = blockIdx.y;
  const int column = blockIdx.x * 32 + lane;
  const float* partial = p.gradients.partial[which];
  if (!p.gradients.sum[which]) return;
  float sum = 0.0f;
  if (column < p.width)
    for (int64_t row = warp; row < p.gradients.blocks; row += 32)
      sum += partial[row * p.width + column];
  smem.of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.width) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < 32; i++) total += smem.of_warp[i][lane];
  const auto write = [&]<class T>(T) {
    static_cast<T*>(p.gradients.sum[which])[column] = from_float<T>(total);
  };
  const DType dtype = p.gradients.dtype[which];
  if (dtype == DType::kFloat32) return write(float());
  return dtype == DType::kBFloat16 ? write(bf16()) : write(fp16());
}

}  // namespace

int weight_gradient_blocks(int64_t rows, int of_multiprocessor, const Device& device) {
  return static_cast<int>(std::min<int64_t>(rows, of_multiprocessor * device.sm_count));
}

void add_weight_gradients(const WeightGradients& gradients, int width, const char* name,
                          const Device& device) {
  if (width == 0) return;
  launch(device, (std::string(name) + ", weights").c_str(), add_weight_gradients_kernel,
         Grid(ceil_div(width, 32), 2), 1024, sizeof(AddSmem), {gradients, width});
}

}  // namespace gemma4
