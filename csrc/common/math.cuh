// Functions of one number, as exact as fp32 allows and without a stack frame.
#pragma once

#include <cmath>

#include "ptx.h"

namespace gemma4 {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// x Φ(x) in its tanh form, written as x / (1 + exp(-2u)): no cancellation where tanh nears -1.
DEVICE float gelu_tanh(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x / (1.0f + expf(-2.0f * u));
}

// The gated product of an MLP, finite in fp16 too.
template <class T>
DEVICE float gated(float gate, float other) {
  return saturate<T>(gelu_tanh(gate) * other);
}

// It and its gradients, given the product's; what fp16's largest value holds back passes nothing
// on.
struct GatedGradient {
  float product, d_gate, d_other;
};
template <class T>
DEVICE GatedGradient gated_gradient(float gate, float other, float grad) {
  constexpr float kScale = 0.7978845608028654f, kCube = 0.044715f;
  const float share = 1.0f / (1.0f + expf(-2.0f * kScale * (gate + kCube * gate * gate * gate)));
  const float u_slope = kScale * (1.0f + 3.0f * kCube * gate * gate);
  const float slope = share + 2.0f * gate * u_slope * share * (1.0f - share);
  const float act = gate * share, product = act * other, held = saturate<T>(product);
  if (fabsf(product) > fabsf(held)) grad = 0.0f;
  return {held, grad * other * slope, grad * act};
}

DEVICE float softcap(float x, float cap) { return cap * tanhf(x / cap); }

// cap tanh(x / cap) for attention scores: 1 - 2 / (1 + e^2u), exact to a few ulp of cap, and cheap.
DEVICE float softcap_fast(float x, float cap) {
  return cap - __fdividef(2.0f * cap, 1.0f + ptx::exp2_approx(x * (2.88539008177792681f / cap)));
}

// The same and its slope 1 - (softcap / cap)², by e = exp(-2|x| / cap), which cannot overflow: the
// value exact to a few ulp of cap, the slope to a few of its own, however near the cap.
struct Sloped {
  float value, slope;
};
DEVICE Sloped sloped_softcap(float x, float cap) {
  const float e = ptx::exp2_approx(fabsf(x) * (-2.88539008177792681f / cap));
  const float r = __fdividef(1.0f, 1.0f + e);
  return {copysignf(cap * (1.0f - e) * r, x), 4.0f * e * r * r};
}

// sin and cos of an angle of at most 2^20 either way. CUDA's own sincosf keeps a table on the stack
// for angles past 105615, which positions of long prompts reach. fma(-k, float(π/2), angle) is
// exact here: a multiple of 2^-23 below 1.
DEVICE void sin_cos(float angle, float& sin, float& cos) {
  const float quarters = rintf(angle * 0.636619772367581343f);
  float r = fmaf(-quarters, 1.57079637050628662f, angle);
  r = fmaf(-quarters, -4.37113900018624283e-8f, r);
  const float r2 = r * r;
  const float s =
      fmaf(r * r2, fmaf(r2, fmaf(r2, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f), r);
  const float c =
      fmaf(r2 * r2,
           fmaf(r2, fmaf(r2, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f),
           fmaf(r2, -0.5f, 1.0f));
  const int quadrant = static_cast<int>(quarters) & 3;
  sin = quadrant & 1 ? c : s;
  cos = quadrant & 1 ? s : c;
  if (quadrant & 2) sin = -sin;
  if ((quadrant + 1) & 2) cos = -cos;
}

}  // namespace gemma4
