// The next token of each row, the best or one drawn, and what ends the row's step.
//
// x = softcap(logits), rounded to T, or the logits. The best is the argmax of x. To draw is a race:
// the argmax of x / temperature + gumbel over all tokens, or over the top_k largest x that top_p
// and min_p leave, is a token of their softmax. The gumbel of token i is made of word i % 4 of
// Philox under the row's seed at (i / 4, position): other rows and their number are nothing to it.
// Of equals the lower index is taken.
//
// A tournament of (value, ~index) as one integer: each block keeps the k largest of kSampleKeys of
// them, k being 1 where nothing is cut. Of the blocks whose winners fill kSampleKeys places the
// last to arrive goes on with all of these, and so forth, until one block is alone and ends the
// row. Whichever block that is, it has the same keys. Counters are zeros before and after.
//
// The k largest are found from the top bit down: a bit of their lower bound is set if k keys still
// reach it. Shared memory: sizeof(SampleSmem). Bound: width sizeof(T) bytes of DRAM a row, then the
// latency of two or three rounds.
#pragma once

#include "../common/indices.cuh"
#include "../common/math.cuh"
#include "../common/order.cuh"
#include "../common/random.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "ops.h"

namespace gemma4 {

constexpr int kSampleThreads = 256, kKeysPerThread = kSampleKeys / kSampleThreads;

struct SampleSmem {
  BlockSum sum;
  int counts[kSampleThreads / 32];
  Packed best[kSampleThreads / 32];
  Packed kept[kMostTopK];
  float mass[kMostTopK];
  bool last;
};

struct Keys {
  Packed key[kKeysPerThread];
};

// A block's part of the logits. Where nothing is cut, those who draw race at once.
template <class T, int kWidth>
DEVICE Keys read_part(const SampleParams& p, int64_t row, int part, uint64_t position) {
  const T* logits = static_cast<const T*>(p.logits) + row * p.stride;
  const bool races = p.temperature > 0.0f && p.k == 1;
  const uint64_t seed = races ? p.seeds[row] : 0;
  Keys keys;
#pragma unroll
  for (int i = 0; i < kKeysPerThread; i += kWidth) {
    const int column = part * kSampleKeys + i * kSampleThreads + threadIdx.x * kWidth;
    const bool exists = column < p.width;
    Vec<T, kWidth> x{};
    if (exists) x = load_fresh<kWidth>(logits + column);
    RandomWords random{};
#pragma unroll
    for (int j = 0; j < kWidth; j++) {
      float value = x[j];
      if (p.cap > 0.0f) value = to_float(from_float<T>(softcap(value, p.cap)));
      if (races) {
        if (j % 4 == 0) random = philox(seed, (column + j) / 4, position);
        value = value / p.temperature + gumbel(word_of(random, kWidth == 1 ? column % 4 : j % 4));
      }
      keys.key[i + j] = exists ? pack(value, column + j) : 0;
    }
  }
  return keys;
}

// The winners of a round, by `slots` keys of each block.
DEVICE Keys read_round(const Packed* kept, int count) {
  Keys keys;
#pragma unroll
  for (int i = 0; i < kKeysPerThread; i += 2) {
    const int at = i * kSampleThreads + threadIdx.x * 2;
    uint4 pair{};
    if (at < count) pair = ptx::load_16_coherent(kept + at);
    __builtin_memcpy(&keys.key[i], &pair, sizeof pair);
  }
  return keys;
}

// The largest key of all threads, in all of them.
DEVICE Packed block_max(Packed best, SampleSmem& smem) {
  best = lane_max(best);
  __syncthreads();  // all have read the last one
  if (threadIdx.x % 32 == 0) smem.best[threadIdx.x / 32] = best;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kSampleThreads / 32; warp++) best = max(best, smem.best[warp]);
  return best;
}

// The largest number that k keys reach; 1 where there are fewer keys, for 0 is no key.
DEVICE Packed kth_largest(const Keys& keys, int k, SampleSmem& smem) {
  Packed bound = 0;
  int parity = 0;
  for (int bit = 63; bit >= 0; bit--) {
    const Packed higher = bound | Packed{1} << bit;
    int count = 0;
#pragma unroll
    for (const Packed key : keys.key) count += key >= higher;
    const float all = block_sum(static_cast<float>(count), smem.sum, parity);  // exact
    if (all >= k) bound = higher;
    if (all == k) break;
  }
  __syncthreads();  // the next sums may begin
  return max(bound, Packed{1});
}

// Leaves the k largest keys in smem.kept, in any order, and zeros behind them.
DEVICE void keep_largest(const Keys& keys, const SampleParams& p, SampleSmem& smem) {
  if (p.k == 1) {
    Packed best = 0;
#pragma unroll
    for (const Packed key : keys.key) best = max(best, key);
    best = block_max(best, smem);
    if (threadIdx.x < p.slots) smem.kept[threadIdx.x] = threadIdx.x == 0 ? best : 0;
    __syncthreads();
    return;
  }
  const Packed bound = kth_largest(keys, p.k, smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int count = 0;
#pragma unroll
  for (const Packed key : keys.key) count += key >= bound;
  count = lane_sum(count);
  if (lane == 0) smem.counts[warp] = count;
  __syncthreads();
  int to = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kSampleThreads / 32; w++) {
    if (w < warp) to += smem.counts[w];
    all += smem.counts[w];
  }
#pragma unroll
  for (const Packed key : keys.key) {
    const unsigned found = __ballot_sync(0xffffffffu, key >= bound);
    if (key >= bound) smem.kept[to + __popc(found & ((1u << lane) - 1))] = key;
    to += __popc(found);
  }
  if (threadIdx.x >= all && threadIdx.x < p.slots) smem.kept[threadIdx.x] = 0;
  __syncthreads();
}

// Of the k largest in smem.kept one, drawn from what top_p and min_p leave of them.
DEVICE Packed race(const SampleParams& p, int64_t row, uint64_t position, SampleSmem& smem) {
  const int i = threadIdx.x;
  const Packed unsorted = i < p.k ? smem.kept[i] : 0;
  int rank = 0;
  for (int j = 0; j < p.k; j++) rank += smem.kept[j] > unsorted;
  __syncthreads();
  if (unsorted) smem.kept[rank] = unsorted;  // behind them are zeros
  __syncthreads();
  const Packed key = i < p.k ? smem.kept[i] : 0;
  const float score = value_of(key) / p.temperature;
  const float mass = key ? expf(score - value_of(smem.kept[0]) / p.temperature) : 0.0f;
  if (i < p.k) smem.mass[i] = mass;
  int parity = 0;
  const float all = block_sum(mass, smem.sum, parity);  // and the masses are there
  float before = 0.0f;
  for (int j = 0; j < min(i, p.k); j++) before += smem.mass[j];
  const bool cut = (p.top_p < 1.0f && before >= p.top_p * all) || mass < p.min_p;
  const int token = index_of(key);
  const float noise = gumbel(word_of(philox(p.seeds[row], token / 4, position), token % 4));
  return block_max(key && !cut ? pack(score + noise, token) : 0, smem);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kSampleThreads, 2)
    sample_kernel(const __grid_constant__ SampleParams p) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  SampleSmem& smem = shared_memory<SampleSmem>();
  const int64_t row = blockIdx.x / p.parts;
  const uint64_t position = index_at(p.positions, row);
  int node = blockIdx.x % p.parts;
  Keys keys = read_part<T, kWidth>(p, row, node, position);
  Packed* kept = static_cast<Packed*>(p.kept) + row * p.nodes * p.slots;
  unsigned* counters = p.counters + row * p.parts;
  const int fan = kSampleKeys / p.slots;
  for (int nodes = p.parts;;) {
    keep_largest(keys, p, smem);
    if (nodes == 1) break;
    const int group = node / fan, others = min(fan, nodes - group * fan);
    if (threadIdx.x < p.slots) kept[node * p.slots + threadIdx.x] = smem.kept[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
      smem.last = ptx::arrive(counters + group) == others - 1u;
      if (smem.last) counters[group] = 0;
    }
    __syncthreads();
    if (!smem.last) return;
    keys = read_round(kept + group * fan * p.slots, others * p.slots);
    kept += nodes * p.slots;
    nodes = (nodes + fan - 1) / fan;
    counters += nodes;
    node = group;
  }
  const Packed winner = p.k > 1 ? race(p, row, position, smem) : smem.kept[0];
  if (threadIdx.x != 0) return;
  const int64_t token = p.done[row] ? p.pad : index_of(winner);
  for (int i = 0; i < p.eos_count; i++)
    if (token == p.eos[i]) p.done[row] = 1;
  p.ids[row] = token;
}

}  // namespace gemma4
