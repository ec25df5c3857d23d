#include "moe_experts_backward.cuh"

namespace gemma4 {

namespace {

template <class T, class W>
void launch_weight_gradient(const char* name, const MoeExpertsBackwardParams& p, const MoeRows& a,
                            const MoeRows& b, void* out, int height, int width,
                            const Device& device) {
  const int64_t tiles = int64_t{ceil_div(height, kGradientRows)} * ceil_div(width, kTileWeightRows);
  launch(device, name, moe_weight_gradient_kernel<T, W>, p.num_experts * tiles, kTileThreads,
         sizeof(MoeWeightGradientSmem<T>),
         {.a = a,
          .b = b,
          .out = out,
          .offsets = p.offsets,
          .order = p.order,
          .k = Divisor(p.k),
          .height = height,
          .width = width});
}

template <class T, class W>
void launch_backward(const MoeExpertsBackwardParams& p, const DTypes& dtypes,
                     const Device& device) {
  const int64_t row_tiles = most_moe_tiles(p, kGradientRows);
  const int pair_width = 2 * p.hidden_width;
  launch(device, "moe_experts_backward, hidden", moe_hidden_gradient_kernel<T, W>,
         row_tiles * p.hidden_tiles, kTileThreads, sizeof(MoeHiddenSmem<T>), p);
  if (p.y) {
    MoeExpertsParams dx = p;
    dx.hidden = p.d_pair;
    dx.hidden_width = pair_width;
    dx.down = p.gate_up;
    dx.weights = {};
    launch(device, "moe_experts_backward, x", moe_tiles_kernel<T, W, kGradientRows, false, true>,
           row_tiles * ceil_div(p.width, kTileWeightRows), kTileThreads,
           sizeof(MoeTilesSmem<T, kGradientRows>), dx);
    moe_combine(dx, dtypes.x, device);
  }
  const MoeRows x{p.x, p.x_stride, true}, grad{p.grad, p.grad_stride, true};
  const MoeRows pair{p.d_pair, pair_width, false}, hidden{p.hidden, p.hidden_width, false};
  if (p.d_gate_up)
    launch_weight_gradient<T, W>("moe_experts_backward, gate_up", p, pair, x, p.d_gate_up,
                                 pair_width, p.width, device);
  if (p.d_down)
    launch_weight_gradient<T, W>("moe_experts_backward, down", p, grad, hidden, p.d_down, p.width,
                                 p.hidden_width, device);
  if (p.d_weights)
    launch(device, "moe_experts_backward, weights", moe_routing_gradient_kernel<>,
           ceil_div<int64_t>(int64_t{p.tokens} * p.k, kSumThreads), kSumThreads, 0, p);
}

}  // namespace

void moe_experts_backward(const MoeExpertsBackwardParams& p, const DTypes& dtypes,
                          const Device& device) {
  constexpr const char* name = "moe_experts_backward";
  const int64_t all = int64_t{p.tokens} * p.k;
  // Of what was skipped, zeros.
  if (p.d_weights) clear(device, name, p.d_weights, sizeof(float) * all);
  if (all == 0 || p.num_experts == 0 || p.width == 0 || p.hidden_width == 0) {
    const size_t bytes = dtypes.weight == DType::kFloat32 ? 4 : 2;
    const size_t weights = bytes * p.num_experts * p.width * p.hidden_width;
    if (p.y) clear(device, name, p.y, size_t{2} * p.tokens * p.width);
    if (p.d_gate_up) clear(device, name, p.d_gate_up, 2 * weights);
    if (p.d_down) clear(device, name, p.d_down, weights);
    return;
  }
  moe_sort(p, device);
  with_half_type(name, dtypes.x, [&]<class T>() {
    dtypes.weight == DType::kFloat32 ? launch_backward<T, float>(p, dtypes, device)
                                     : launch_backward<T, T>(p, dtypes, device);
  });
}

}  // namespace gemma4
