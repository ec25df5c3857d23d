// experts = the k largest logits of each token, weights = their softmax times the experts' scale.
//
// Softmax over all experts, divided by the sum of the chosen, is the softmax of the chosen: the
// common denominator cancels, and with it one rounding. Equal logits go to the lower index.
//
// A warp owns a token: its lanes hold the logits as (value, index) and settle the k winners one
// after another; lane i keeps the i-th. Bound: latency, k rounds of five shuffles.
#pragma once

#include "../common/indices.cuh"
#include "../common/launch.h"
#include "../common/order.cuh"
#include "../common/reduce.cuh"
#include "ops.h"

namespace gemma4 {

constexpr int kRouteWarps = 4;

struct Route {
  int expert;
  float weight;
};

// A token's routes by all of a warp's lanes: lane i < k has the i-th, the others have none.
template <class T, int kPerLane>
DEVICE Route route_of_lane(const T* logits, int num_experts, int k, const Floats& scale) {
  const int lane = threadIdx.x % 32;
  Packed candidate[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    const int e = i * 32 + lane;
    candidate[i] = e < num_experts ? pack(to_float(logits[e]), e) : 0;
  }

  int expert = 0;
  float highest = 0.0f, weight = 0.0f;
  for (int n = 0; n < k; n++) {
    Packed best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) best = max(best, candidate[i]);
    best = lane_max(best);
#pragma unroll
    for (int i = 0; i < kPerLane; i++)
      if (candidate[i] == best) candidate[i] = 0;
    if (n == 0) highest = value_of(best);
    if (lane == n) {
      expert = index_of(best);
      weight = expf(value_of(best) - highest);
    }
  }
  const float sum = lane_sum(weight);
  return {expert, lane < k ? weight / sum * float_at(scale, expert) : 0.0f};
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kRouteWarps * 32)
    moe_route_kernel(const __grid_constant__ MoeRouteParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t token = int64_t{blockIdx.x} * kRouteWarps + threadIdx.x / 32;
  if (token >= p.tokens) return;
  const Route route = route_of_lane<T, kPerLane>(static_cast<const T*>(p.logits) + token * p.stride,
                                                 p.num_experts, p.k, p.scale);
  if (lane >= p.k) return;
  p.experts[token * p.k + lane] = route.expert;
  p.weights[token * p.k + lane] = route.weight;
}

}  // namespace gemma4
