#include "plan.h"

namespace gemma4 {

void attention_prefill(const AttentionParams& p, DType dtype, const Device& device) {
  if (p.batch == 0 || p.max_seqlen_q == 0 || p.q_heads == 0) return;
  attention("attention_prefill", p, dtype, device);
}

}  // namespace gemma4
