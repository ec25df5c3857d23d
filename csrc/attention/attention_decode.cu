#include "attention_merge.cuh"
#include "plan.h"
#include "sequence.cuh"

namespace gemma4 {

// The results of one part are a copy of out in fp32. 32 MB of them are parts enough: they come from
// at least 256 blocks, the largest of which leaves 128 KB.
int attention_decode_splits(int64_t keys, int64_t bytes) {
  constexpr int64_t kMostSplits = 64, kMostBytes = 32 << 20;
  const int64_t most =
      std::clamp<int64_t>(kMostBytes / std::max<int64_t>(bytes, 1), 1, kMostSplits);
  return static_cast<int>(std::clamp<int64_t>(ceil_div<int64_t>(keys, kLeastKeysOfSplit), 1, most));
}

void attention_decode(const AttentionParams& p, DType dtype, const Device& device) {
  if (p.tokens == 0 || p.q_heads == 0) return;
  attention("attention_decode", p, dtype, device);
  if (p.splits == 1) return;
  with_half_type("attention_decode", dtype, [&]<class T>() {
    launch(device, "attention_decode, merge", attention_merge_kernel<T>, p.tokens * p.q_heads,
           p.head_dim / 4, 0, p);
  });
}

}  // namespace gemma4
