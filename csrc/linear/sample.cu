#include "sample.cuh"

#include "../common/launch.h"

namespace gemma4 {

int sample_parts(int width) { return ceil_div(width, kSampleKeys); }

int sample_slots(int k) { return round_up(k, 2); }

int sample_nodes(int width, int k) {
  const int fan = kSampleKeys / sample_slots(k);
  int all = 0;
  for (int nodes = sample_parts(width); nodes > 1; nodes = ceil_div(nodes, fan)) all += nodes;
  return all;
}

void sample(SampleParams p, DType dtype, const Device& device) {
  if (p.rows == 0) return;
  p.parts = sample_parts(p.width);
  p.slots = sample_slots(p.k);
  p.nodes = sample_nodes(p.width, p.k);
  with_type(dtype, [&]<class T>() {
    const bool aligned = are_aligned<T>(p.logits, p.stride, p.width);
    launch(device, "sample", aligned ? sample_kernel<T, kFullWidth<T>> : sample_kernel<T, 1>,
           {.grid = p.rows * p.parts,
            .block = kSampleThreads,
            .smem_bytes = sizeof(SampleSmem),
            .dependent = true},
           p);
  });
}

}  // namespace gemma4
