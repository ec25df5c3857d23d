// The gradients of q, k and v before they were normed and turned, and of q's and k's weights.
//
// Of a head y = turn(n w), n being its norm: dn = w turn_back(dy), and dx as NormGradient has it; a
// v head is neither weighted nor turned. Without v, a raw k head gave both, and dn is the sum of
// both. dw = Σ_tokens,heads turn_back(dy) n. Lanes own heads and blocks own tokens as in
// qkv_norm_rope.cuh; a lane has the same channels of every head, so that the weights' gradients
// are sums in its registers, added over a block's groups in the end. Shared memory:
// sizeof(HeadSums). Bound: 3 (H + 2G) C sizeof(T) bytes of DRAM a token.
#pragma once

#include "../common/indices.cuh"
#include "../common/tile.cuh"
#include "heads.cuh"
#include "ops.h"
#include "rows_backward.cuh"

namespace gemma4 {

constexpr int kHeadThreads = 128;

// A row of sums a group; 4 floats behind each 32 keep lanes that write 8 channels off each other's
// banks.
template <class T, int kHeadDim>
struct HeadSums {
  static constexpr int kGroups = kHeadThreads / HeadLanes<T, kHeadDim>::kLanes;
  float4 of_group[kGroups][kHeadDim / 32 * 9];
  DEVICE static int at(int channel) { return channel + channel / 32 * 4; }
};

// A lane's channels of a head, of both halves as in HeadRow; zeros of a null head.
template <class T, int kHeadDim>
struct HeadVectors {
  using Lanes = HeadLanes<T, kHeadDim>;
  Row<T, Lanes::kWidth, Lanes::kVectors> a, b;

  DEVICE explicit HeadVectors(const T* head FROM_HERE)
      : a(Lanes::half().load_once(head, head != nullptr HERE)),
        b(Lanes::half().load_once(head + Lanes::kHalf, head != nullptr HERE)) {}
};

// The same in fp32.
template <class T, int kHeadDim>
struct HeadFloats {
  using Lanes = HeadLanes<T, kHeadDim>;
  Row<float, Lanes::kWidth, Lanes::kVectors> a, b;
};

template <class T>
struct HeadGradient {
  const T *grad, *raw_grad, *in;  // null: zeros; the second is v's where it is made from k
  Floats weight;                  // null: a v head
  T* out;
};

template <class T>
DEVICE HeadGradient<T> head_gradient_at(const QkvNormRopeBackwardParams& p, int64_t token, int h) {
  const auto& f = p.forward;
  const auto of = [&](const Heads& x) {
    const T* data = static_cast<const T*>(x.data);
    return data ? data + token * x.stride + h * x.head_stride : nullptr;
  };
  const auto in_row = [&](void* out, int heads) {
    return static_cast<T*>(out) + (token * heads + h) * f.head_dim;
  };
  if (h < f.q_heads)
    return {of(p.grad_q), nullptr, of({f.q, f.q_stride, f.q_head_stride}), p.q_weight,
            in_row(f.q_out, f.q_heads)};
  h -= f.q_heads;
  if (h < f.kv_heads)
    return {of(p.grad_k), f.v ? nullptr : of(p.grad_v), of({f.k, f.k_stride, f.k_head_stride}),
            p.k_weight, in_row(f.k_out, f.kv_heads)};
  h -= f.kv_heads;
  return {of(p.grad_v),
          nullptr,
          of({f.v, f.v_stride, f.v_head_stride}),
          {},
          in_row(f.v_out, f.kv_heads)};
}

// The sums of a block's groups, to its row of `partial`. All threads.
template <class T, int kHeadDim>
DEVICE void store_head_sums(float* partial, const HeadFloats<T, kHeadDim>& sums, int group,
                            HeadSums<T, kHeadDim>& smem) {
  using Lanes = HeadLanes<T, kHeadDim>;
  if (!partial) return;
  __syncthreads();  // the sums that were there before have been read
  const auto store_half = [&](int begin, const auto& half) {
    Lanes::half().each([&](int i, int column) {
      const auto& sum = half.vectors[i].data;
#pragma unroll
      for (int j = 0; j < Lanes::kWidth; j += 4)
        store_shared(&smem.of_group[group][smem.at(begin + column + j) / 4],
                     {sum[j], sum[j + 1], sum[j + 2], sum[j + 3]});
    });
  };
  store_half(0, sums.a);
  store_half(Lanes::kHalf, sums.b);
  __syncthreads();
  for (int channel = threadIdx.x; channel < kHeadDim; channel += kHeadThreads) {
    float sum = 0.0f;
    for (const auto& row : smem.of_group)
      sum += reinterpret_cast<const float*>(row)[smem.at(channel)];
    partial[int64_t{blockIdx.x} * kHeadDim + channel] = sum;
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kHeadThreads, kHeadBlocks)
    qkv_norm_rope_backward_kernel(const __grid_constant__ QkvNormRopeBackwardParams p) {
  using Lanes = HeadLanes<T, kHeadDim>;
  constexpr int kWidth = Lanes::kWidth;
  const QkvNormRopeParams& f = p.forward;
  const int groups = HeadSums<T, kHeadDim>::kGroups, group = threadIdx.x / Lanes::kLanes;
  const int heads = f.q_heads + (f.k ? f.kv_heads : 0) + (f.v ? f.kv_heads : 0);
  HeadFloats<T, kHeadDim> q_sum, k_sum;

  for (int64_t token = blockIdx.x; token < f.tokens; token += gridDim.x) {
    const Rotation<T, kHeadDim> by(f.inv_freq, static_cast<float>(index_at(f.positions, token)));

    // Every group takes every turn: the sums are the whole warp's.
    for (int first = 0; first < heads; first += groups) {
      const int h = first + group;
      const auto head = h < heads ? head_gradient_at<T>(p, token, h) : HeadGradient<T>{};
      const auto half = Lanes::half();
      const HeadVectors<T, kHeadDim> x(head.in), grad(head.grad), raw(head.raw_grad);
      const auto turned_back = [&](int i, int j) -> float2 {
        const float a = grad.a.vectors[i][j], b = grad.b.vectors[i][j];
        const float cos = by.cos[i][j], sin = by.sin[i][j];
        return {a * cos + b * sin, b * cos - a * sin};
      };
      HeadFloats<T, kHeadDim> grad_n;
      float squares = 0.0f, products = 0.0f;
      half.each([&](int i, int column) {
        Vec<float, kWidth> weight_a, weight_b;
        if (head.weight.data) {
          weight_a = load_floats<kWidth>(head.weight, column);
          weight_b = load_floats<kWidth>(head.weight, Lanes::kHalf + column);
        }
#pragma unroll
        for (int j = 0; j < kWidth; j++) {
          float a = grad.a.vectors[i][j], b = grad.b.vectors[i][j];
          if (head.weight.data) {
            const float2 back = turned_back(i, j);
            a = back.x * weight_a[j] + raw.a.vectors[i][j];
            b = back.y * weight_b[j] + raw.b.vectors[i][j];
          }
          grad_n.a.vectors[i].data[j] = a;
          grad_n.b.vectors[i].data[j] = b;
          const float x_a = x.a.vectors[i][j], x_b = x.b.vectors[i][j];
          squares += x_a * x_a + x_b * x_b;
          products += a * x_a + b * x_b;
        }
      });
      const NormGradient dx(lane_sum<Lanes::kLanes>(squares), lane_sum<Lanes::kLanes>(products),
                            kHeadDim, f.eps);
      if (h >= heads) continue;

      const auto add_to = [&](HeadFloats<T, kHeadDim>& sum) {
        half.each([&](int i, int) {
#pragma unroll
          for (int j = 0; j < kWidth; j++) {
            const float2 back = turned_back(i, j);
            sum.a.vectors[i].data[j] += back.x * (x.a.vectors[i][j] * dx.r);
            sum.b.vectors[i].data[j] += back.y * (x.b.vectors[i][j] * dx.r);
          }
        });
      };
      if (h < f.q_heads)
        add_to(q_sum);
      else if (head.weight.data)
        add_to(k_sum);
      half.each([&](int i, int column) {
        Vec<T, kWidth> out_a, out_b;
#pragma unroll
        for (int j = 0; j < kWidth; j++) {
          out_a.set(j, dx(grad_n.a.vectors[i][j], x.a.vectors[i][j]));
          out_b.set(j, dx(grad_n.b.vectors[i][j], x.b.vectors[i][j]));
        }
        store(head.out + column, out_a);
        store(head.out + Lanes::kHalf + column, out_b);
      });
    }
  }
  auto& smem = shared_memory<HeadSums<T, kHeadDim>>();
  store_head_sums(p.weights.partial[0], q_sum, group, smem);
  store_head_sums(p.weights.partial[1], k_sum, group, smem);
}

}  // namespace gemma4
