// q = rope(rms_norm(q) q_weight), k = rope(rms_norm(k) k_weight), v = rms_norm(v or raw k).
//
// rope turns the pairs (i, i + C/2) by position · inv_freq[i]. A block owns a token; each group of
// neighbouring lanes owns one head at a time and walks over the token's heads: q's, then k's, then
// v's, as heads.cuh says; the angles' sin and cos, the same for every head, stay in registers.
// Without v, a k head gives both outputs from one read. No shared memory, no barrier. Bound: 2 (H +
// 2G) C sizeof(T) bytes of DRAM a token.
#pragma once

#include "../common/indices.cuh"
#include "heads.cuh"
#include "ops.h"

namespace gemma4 {

// One head's journey: where it comes from, where it goes, and what is done to it.
template <class T, class W>
struct Head {
  const T* in;
  const W* weight;   // null: a v head, neither weighted nor turned
  T* out;            // null: nowhere
  T* raw_out;        // the same head as v, null if v comes by itself
  int64_t row = -1;  // of k_out and v_out, if it goes there
};

// The number of heads a token has: v's are absent where they are made from k's.
DEVICE int num_heads(const QkvNormRopeParams& p) {
  return p.q_heads + (p.k ? p.kv_heads : 0) + (p.v ? p.kv_heads : 0);
}

template <class T, class W>
DEVICE Head<T, W> head_at(const QkvNormRopeParams& p, int64_t token, int64_t slot, int h) {
  const bool kept = slot >= 0 && slot < p.num_slots;
  if (h < p.q_heads)
    return {static_cast<const T*>(p.q) + token * p.q_stride + h * p.q_head_stride,
            static_cast<const W*>(p.q_weight),
            static_cast<T*>(p.q_out) + (token * p.q_heads + h) * p.head_dim, nullptr};
  h -= p.q_heads;
  const bool is_v = h >= p.kv_heads;
  if (is_v) h -= p.kv_heads;
  const int64_t row = slot * p.kv_heads + h, to = row * p.head_dim;
  T* v_out = kept ? static_cast<T*>(p.v_out) + to : nullptr;
  if (is_v)
    return {static_cast<const T*>(p.v) + token * p.v_stride + h * p.v_head_stride, nullptr, v_out,
            nullptr, kept ? row : -1};
  return {static_cast<const T*>(p.k) + token * p.k_stride + h * p.k_head_stride,
          static_cast<const W*>(p.k_weight), kept ? static_cast<T*>(p.k_out) + to : nullptr,
          p.v ? nullptr : v_out, kept ? row : -1};
}

// A head of q as it is, one of k and v in e4m3. All lanes of the warp.
template <class T, class W, int kHeadDim, class StoreOut>
DEVICE void store_coded(const QkvNormRopeParams& p, const Head<T, W>& head,
                        const HeadRow<T, kHeadDim>& x, const Rotation<T, kHeadDim>& rotation,
                        const StoreOut& to_out) {
  const bool is_k = head.weight && head.row >= 0;
  const bool makes_v = head.row >= 0 && (!head.weight || head.raw_out);
  HeadCodes<T, kHeadDim> key, value;
  if (is_k)
    x.turned(head.weight, rotation, key.hold());
  else if (head.weight && head.out)
    x.turned(head.weight, rotation, to_out);
  if (makes_v) x.normed(value.hold());
  key.store(is_k, p.k_out, p.k_scales, head.row);
  value.store(makes_v, p.v_out, p.v_scales, head.row);
}

template <class T, class W, int kHeadDim>
__global__ void __launch_bounds__(256, kLeastBlocks<T, W>)
    qkv_norm_rope_kernel(const __grid_constant__ QkvNormRopeParams p) {
  using Lanes = HeadLanes<T, kHeadDim>;
  const int groups = blockDim.x / Lanes::kLanes;
  const int group = blockIdx.y * groups + threadIdx.x / Lanes::kLanes;

  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const int64_t slot = p.slots.data ? index_at(p.slots, token) : token;
    const Rotation<T, kHeadDim> rotation(p.inv_freq,
                                         static_cast<float>(index_at(p.positions, token)));

    // Every group takes every turn: the sums are the whole warp's.
    for (int first = 0; first < num_heads(p); first += groups * gridDim.y) {
      const bool has_head = first + group < num_heads(p);
      const Head<T, W> head =
          has_head ? head_at<T, W>(p, token, slot, first + group) : Head<T, W>{};
      const HeadRow<T, kHeadDim> row(head.in, has_head, p.eps);
      const auto to = [](T* out) {
        return [out](int column, const auto& vector) { store(out + column, vector); };
      };
      if constexpr (sizeof(T) == 2)
        if (p.k_scales) {
          store_coded(p, head, row, rotation, to(head.out));
          continue;
        }
      T* raw_out = head.weight ? head.raw_out : head.out;
      if (raw_out) row.normed(to(raw_out));
      if (head.weight && head.out) row.turned(head.weight, rotation, to(head.out));
    }
  }
}

// Any even head size and alignment: a warp owns a head.
template <class T, class W>
__global__ void __launch_bounds__(256)
    qkv_norm_rope_unaligned_kernel(const __grid_constant__ QkvNormRopeParams p) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, half = p.head_dim / 2;
  const Columns<0, 1> whole{p.head_dim, lane, 32}, first_half{half, lane, 32};
  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const float position = static_cast<float>(index_at(p.positions, token));
    const int64_t slot = p.slots.data ? index_at(p.slots, token) : token;
    for (int h = blockIdx.y * warps + threadIdx.x / 32; h < num_heads(p); h += warps * gridDim.y) {
      const Head<T, W> head = head_at<T, W>(p, token, slot, h);
      const float sum = lane_sum(whole.sum_of_squares(whole.load_once(head.in)));
      const float scale = inv_rms(sum, p.head_dim, p.eps);
      T* raw_out = head.weight ? head.raw_out : head.out;
      if (raw_out)
        whole.each([&](int, int i) { raw_out[i] = from_float<T>(to_float(head.in[i]) * scale); });
      if (!head.weight || !head.out) continue;
      first_half.each([&](int, int i) {
        float sin, cos;
        sin_cos(position * p.inv_freq[i], sin, cos);
        const float x = to_float(head.in[i]) * scale * to_float(head.weight[i]);
        const float y = to_float(head.in[i + half]) * scale * to_float(head.weight[i + half]);
        head.out[i] = from_float<T>(x * cos - y * sin);
        head.out[i + half] = from_float<T>(y * cos + x * sin);
      });
    }
  }
}

}  // namespace gemma4
