// Linear layers of few tokens, and what stands behind a linear layer: the gated product and the cap
// on logits.
#pragma once

#include "../common/types.h"
#include "packed.h"

namespace gemma4 {

constexpr int kMostSmallTokens = 16;
// Of one norm's row, and of all rows that a block keeps beside its sums in 99 KB.
constexpr int kMostNormedWidth = 6144, kMostNormedElements = 40960;

// What such a product multiplies.
struct OpeningParams {
  const void* x;                        // [tokens, width]
  const void* other;                    // [tokens, width] or null
  const void *x_weight, *other_weight;  // [width], with another branch
  const void* residual;                 // [tokens, width] or null
  const void* post_weight;              // [width], with a residual
  const void* scale;                    // one number or null
  const void* norm_weight;              // [width] or null
  void* new_residual;                   // [tokens, width]
  int64_t x_stride, other_stride, residual_stride;
  int tokens, width;  // a multiple of 8
  int a_stride;       // in shared memory; the launcher's
  float eps;
};

struct LinearSmallParams : OpeningParams {
  const void* weight;  // [rows, width]; gated: [2 rows, width], gate rows first; null if packed
  PackedWeight packed;
  const void* factor;  // [tokens, rows] or null
  void* y;             // [tokens, rows]
  int64_t factor_stride;
  int rows;  // a multiple of 8
  bool gated;
};
void linear_small(LinearSmallParams params, DType dtype, const Device& device);
void linear_small_packed(const LinearSmallParams& params, DType dtype, const Device& device);

struct LinearPackedParams {
  const void* x;  // [tokens, width]
  PackedWeight weight;
  void* y;  // [tokens, rows]
  int64_t x_stride, tokens;
  int width, rows;
};
void linear_packed(const LinearPackedParams& params, DType dtype, const Device& device);

struct GeluMulParams {
  const void* gate;   // [rows, width]
  const void* other;  // [rows, width], of ple_gate's other dtype
  void* y;            // [rows, width], likewise
  int64_t rows, gate_stride, other_stride;
  int width;
};
// Of both ops, so that the kernel is compiled once.
void gelu_mul(const char* name, const GeluMulParams& params, const DTypes& dtypes,
              const Device& device);
void geglu(const GeluMulParams& params, DType dtype, const Device& device);

struct GeluMulBackwardParams {
  const void* grad;   // [rows, width], of y
  const void* gate;   // [rows, width]
  const void* other;  // [rows, width]
  void* d_gate;       // [rows, width], of gate's dtype, or null
  void* d_other;      // [rows, width], of the other dtype, or null
  int64_t rows, grad_stride, gate_stride, other_stride, d_stride;
  int width;
};
void gelu_mul_backward(const char* name, const GeluMulBackwardParams& params, const DTypes& dtypes,
                       const Device& device);
void geglu_backward(const GeluMulBackwardParams& params, DType dtype, const Device& device);

struct SoftcapParams {
  const void* logits;  // [rows, width]
  void* y;             // [rows, width]
  int64_t rows, stride;
  int width;
  float cap;
};
void softcap(const SoftcapParams& params, DType dtype, const Device& device);

struct SoftcapArgmaxParams {
  const void* logits;  // [rows, width]
  void* index;         // [rows] int64; until the last kernel a packed (value, index) each
  int64_t rows, stride;
  int width;
  float cap;
};
void softcap_argmax(const SoftcapArgmaxParams& params, DType dtype, const Device& device);

constexpr int64_t kIgnoredTarget = -100;

struct CrossEntropyParams {
  const void* logits;  // [rows, width]
  Indices targets;     // [rows]; kIgnoredTarget, or below width
  float *nll, *lse;    // [rows]
  int64_t rows, stride;
  int width;
  float cap;  // 0: none
};
void softcap_cross_entropy(const CrossEntropyParams& params, DType dtype, const Device& device);

struct CrossEntropyBackwardParams {
  const void* logits;                      // [rows, width]
  void* d_logits;                          // [rows, width], which may be the logits
  Indices targets;                         // [rows]
  const float *lse, *grad_nll, *grad_lse;  // [rows]
  int64_t rows, stride;
  int width;
  float cap;  // 0: none
};
void softcap_cross_entropy_backward(const CrossEntropyBackwardParams& params, DType dtype,
                                    const Device& device);

// Of a block; and the most that may be cut to.
constexpr int kSampleKeys = 2048, kMostTopK = 256;

struct SampleParams {
  const void* logits;    // [rows, width]
  const int64_t* seeds;  // [rows]
  Indices positions;     // [rows]
  int64_t* ids;          // [rows]
  int64_t* done;         // [rows]
  unsigned* counters;    // [rows, sample_parts]; zeros, and left so
  const int64_t* eos;    // [eos_count]
  void* kept;            // [rows, sample_nodes, sample_slots] of 64 bits, round behind round
  int64_t rows, stride, pad;
  int width, eos_count;
  int k;                    // 1 where nothing is cut
  float cap, temperature;   // 0: no cap, the best
  float top_p, min_p;       // 1 and 0: none
  int parts, slots, nodes;  // the launcher's
};
// Blocks that read a row; keys of each winner's set, which travel in pairs; winners' sets of a row.
int sample_parts(int width);
int sample_slots(int k);
int sample_nodes(int width, int k);
void sample(SampleParams params, DType dtype, const Device& device);

}  // namespace gemma4
