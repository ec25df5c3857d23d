#include "attention_merge.cuh"
#include "plan.h"

namespace gemma4 {

int attention_decode_splits(int64_t keys) {
  const int64_t splits = ceil_div<int64_t>(keys, kLeastKeysOfSplit);
  return static_cast<int>(splits < 1 ? 1 : splits < kMostSplits ? splits : kMostSplits);
}

void attention_decode(const AttentionParams& p, DType dtype, const Device& device) {
  if (p.tokens == 0 || p.q_heads == 0) return;
  attention("attention_decode", p, dtype, device);
  if (p.splits == 1) return;
  with_half_type("attention", dtype, [&]<class T>() {
    launch(device, "attention_merge", attention_merge_kernel<T>,
           static_cast<unsigned>(p.tokens * p.q_heads), p.head_dim / 4, 0, p);
  });
}

}  // namespace gemma4
