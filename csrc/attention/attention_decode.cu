#include "attention_merge.cuh"
#include "plan.h"
#include "sequence.cuh"

namespace gemma4 {

// Two blocks for each multiprocessor of what one sequence has, in splits of at least the least
// size: a token waits for the block with the most keys, and merges cost little more than one part.
// All of this is known of each sequence alone. Many sequences fill the card with fewer splits, and
// would ask for much memory: from more than kAlike on they share the splits of so many, and only
// there do a row's bits depend on the batch. That leaves 64 MB of results for the largest released
// model.
int attention_decode_splits(const AttentionParams& p, int64_t keys, const Device& device) {
  constexpr int64_t kAlike = 16;
  const int64_t heads = std::max<int64_t>(int64_t{p.kv_heads} * p.new_tokens, 1);
  int64_t most = std::clamp<int64_t>(2 * device.sm_count / heads, 1, kMostSplits);
  if (p.batch > kAlike) most = std::max<int64_t>(most * kAlike / p.batch, 1);
  return static_cast<int>(std::clamp<int64_t>(ceil_div<int64_t>(keys, kLeastKeysOfSplit), 1, most));
}

int attention_decode_knots(int splits) { return splits > kFan ? ceil_div(splits, kFan) : 0; }

void attention_decode(const AttentionParams& p, DType dtype, const Device& device) {
  if (p.tokens == 0 || p.q_heads == 0) return;
  attention("attention_decode", p, dtype, device);
  if (p.splits.divisor == 1) return;
  with_half_type("attention_decode", dtype, [&]<class T>() {
    launch(device, "attention_decode, merge", attention_merge_kernel<T>, p.tokens * p.q_heads,
           p.head_dim / 4, 0, p);
  });
}

}  // namespace gemma4
