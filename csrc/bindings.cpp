// The ops for torch's dispatcher: checks, allocation, parameters. The only file that knows torch.
//
// On libtorch's stable ABI, so that one binary serves every torch from the target version on. The
// schemas are defined in Python (gemma4_kernels/library.py), once more for compiled code; here they
// get their implementation for one device: CUDA, or, with GEMMA4_EMULATION, the CPU in a namespace
// of the test suite's own.
//
// Checks here keep a direct caller of torch.ops from reading astray and speak of torch's
// RuntimeError; the Python wrappers turn a refusal into the sentence of checks.py.
//
// Longer than 400 lines so that one file alone includes torch, which is slow.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"

#ifdef GEMMA4_EMULATION
#include "emulation/emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

// Not in namespace gemma4: an op has one name here and there.
namespace binding {
namespace {

using gemma4::AttentionParams, gemma4::Device, gemma4::DType, gemma4::DTypes, gemma4::Floats;
using gemma4::Indices, gemma4::QkvNormRopeParams;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

const Tensor* pointer_to(const OptionalTensor& t) { return t ? &*t : nullptr; }

void expect_dtype(const char* name, const Tensor& t, ScalarType want) {
  STD_TORCH_CHECK(t.scalar_type() == want, name, " has another dtype than the op expects of it");
}

void expect_shape(const char* name, const Tensor& t, const Shape& want) {
  const auto got = t.sizes();
  bool same = got.size() == want.size();
  for (size_t i = 0; same && i < want.size(); i++) same = got[i] == want[i];
  STD_TORCH_CHECK(same, name, " must have shape ", text(want), ", got ", text(shape_of(t)));
}

// One call of an op: makes the tensors' device current and knows its stream. Every pointer that a
// kernel gets is taken through `in` or `out`, so that under emulation all else is out of bounds.
class Call {
 public:
  explicit Call(const Tensor& on)
      : on_(on),
        dtype_(on.scalar_type())
#ifdef GEMMA4_EMULATION
  {
    const auto& card = emulation::settings();
    device_ = {nullptr, card.sm_count, card.max_smem_bytes, card.has_wgmma ? 9 : 8};
  }
  ~Call() { emulation::forget(); }
#else
        ,
        guard_(on.get_device_index()) {
    const int index = on.get_device_index();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &device_.stream));
    static std::vector<Device> known(64);
    Device& limits = known.at(index);
    if (limits.sm_count == 0) {
      query(cudaDeviceGetAttribute(&limits.max_smem_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   index));
      query(cudaDeviceGetAttribute(&limits.capability, cudaDevAttrComputeCapabilityMajor, index));
      query(cudaDeviceGetAttribute(&limits.sm_count, cudaDevAttrMultiProcessorCount, index));
    }
    device_.sm_count = limits.sm_count;
    device_.max_smem_bytes = limits.max_smem_bytes;
    device_.capability = limits.capability;
  }
#endif
  Call(const Call&) = delete;

  const Device& device() const { return device_; }

  DType dtype() const { return dtype(dtype_); }
  static DType dtype(ScalarType type) {
    switch (type) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Half:
        return DType::kFloat16;
      default:
        STD_TORCH_CHECK(false, "there are kernels for float32, bfloat16 and float16 alone");
    }
  }

  // Of x, of what it meets, and of weights that a kernel reads all in one dtype: that of what they
  // are multiplied with, or float32.
  DTypes dtypes(ScalarType other, std::initializer_list<const Tensor*> weights) const {
    const bool alike = std::ranges::all_of(
        weights, [&](const Tensor* w) { return !w || w->scalar_type() == other; });
    return {dtype(), dtype(other), alike ? dtype(other) : DType::kFloat32};
  }
  // What x and a tensor of this dtype promote to.
  ScalarType promoted(ScalarType other) const {
    return other == dtype_ ? other : ScalarType::Float;
  }

  // A tensor of the op's own dtype and of this shape, wherever the first tensor lives.
  void expect(const char* name, const Tensor& t, const Shape& shape) const {
    expect_dtype(name, t, dtype_);
    expect_here(name, t);
    expect_shape(name, t, shape);
  }
  void expect_here(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.device() == on_.device(), name, " is on another device");
  }

  const void* in(const char* name, const Tensor& t) { return pointer(name, t, false); }
  const void* in(const char* name, const OptionalTensor& t) { return t ? in(name, *t) : nullptr; }
  void* out(const char* name, const Tensor& t) { return pointer(name, t, true); }

  Indices indices(const char* name, const Tensor& t, int64_t count) {
    expect_shape(name, t, {count});
    return flat_indices(name, t);
  }

  Indices flat_indices(const char* name, const Tensor& t) {
    expect_here(name, t);
    const bool is_64 = t.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(is_64 || t.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
    return {in(name, keep(torch::stable::contiguous(t))), is_64};
  }

  Floats floats(const char* name, const Tensor& t, const Shape& shape) {
    expect_here(name, t);
    expect_shape(name, t, shape);
    return {in(name, keep(torch::stable::contiguous(t))), dtype(t.scalar_type())};
  }

  // A weight as kernels read it; converted, which is cheap for one row, where it is not.
  const void* weight(const char* name, const Tensor& t, int64_t width, DType want) {
    expect_here(name, t);
    expect_shape(name, t, {width});
    const Tensor& w = dtype(t.scalar_type()) == want ? t : keep(as_float(t));
    return in(name, keep(torch::stable::contiguous(w)));
  }
  const void* weight(const char* name, const OptionalTensor& t, int64_t width, DType want) {
    return t ? weight(name, *t, width, want) : nullptr;
  }
  static Tensor as_float(const Tensor& t) { return torch::stable::to(t, ScalarType::Float); }

  Tensor empty(const Shape& shape, std::optional<ScalarType> dtype = std::nullopt) const {
    return torch::stable::new_empty(on_, shape, dtype ? *dtype : dtype_);
  }

  // A tensor made on the way, alive until the op returns.
  const Tensor& keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back();
  }

 private:
  void* pointer(const char* name, const Tensor& t, bool writable) {
#ifdef GEMMA4_EMULATION
    int64_t extent = 1;
    for (int64_t d = 0; d < t.dim(); d++)
      extent = t.size(d) == 0 ? 0 : extent == 0 ? 0 : extent + (t.size(d) - 1) * t.stride(d);
    emulation::allow(t.data_ptr(), extent * t.element_size(), name, writable);
#endif
    return t.data_ptr();
  }

#ifndef GEMMA4_EMULATION
  static void query(cudaError_t status) {
    STD_TORCH_CHECK(status == cudaSuccess, cudaGetErrorString(status));
  }
#endif

  Tensor on_;
  ScalarType dtype_;
  Device device_{};
  std::deque<Tensor> kept_;  // a vector would move what `keep` has handed out
#ifndef GEMMA4_EMULATION
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A tensor as rows of its last dimension. Views whose rows are not evenly spaced, or not contiguous
// themselves, are copied first.
struct Rows {
  Tensor tensor;
  int64_t rows, width, stride;
};

Rows as_rows(const Tensor& t) {
  const int64_t dims = t.dim();
  if (dims == 0) return {t, 1, 1, 1};
  const int64_t width = t.size(dims - 1);
  int64_t rows = 1, stride = width;
  bool even = t.stride(dims - 1) == 1 || width <= 1;
  for (int64_t d = dims - 2; d >= 0; d--) {
    if (t.size(d) == 1) continue;
    if (rows == 1) stride = t.stride(d);
    even = even && t.stride(d) == rows * stride;
    rows *= t.size(d);
  }
  if (rows == 0 || width == 0 || even) return {t, rows, width, stride};
  return {torch::stable::contiguous(t), rows, width, width};
}

// Rows that 16-byte copies can read: heads contiguous, everything else on multiples of 8.
bool is_aligned(const Tensor& t) {
  if (t.numel() == 0) return true;
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.stride(t.dim() - 1) == 1;
  for (int64_t d = 0; d + 1 < t.dim(); d++) aligned = aligned && t.stride(d) % 8 == 0;
  return aligned;
}

Tensor aligned(const Tensor& t) {
  return is_aligned(t) ? t : torch::stable::clone(torch::stable::contiguous(t));
}

int as_int(const char* name, int64_t value) {
  STD_TORCH_CHECK(value <= INT32_MAX, name, " is too wide: ", value);
  return static_cast<int>(value);
}

Tensor rms_norm(Tensor x, OptionalTensor weight, double eps) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const int64_t width = x.size(x.dim() - 1);
  const DTypes dtypes = call.dtypes(x.scalar_type(), {pointer_to(weight)});
  const Rows rows = as_rows(x);
  Tensor y = call.empty(shape_of(x));
  gemma4::rms_norm({.x = call.in("x", rows.tensor),
                    .weight = call.weight("weight", weight, width, dtypes.weight),
                    .y = call.out("y", y),
                    .rows = rows.rows,
                    .x_stride = rows.stride,
                    .width = as_int("x", width),
                    .eps = static_cast<float>(eps)},
                   dtypes, call.device());
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor post_weight,
                                        OptionalTensor next_weight, OptionalTensor scale,
                                        double eps) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const int64_t width = x.size(x.dim() - 1);
  call.expect_here("residual", residual);
  expect_shape("residual", residual, shape_of(x));
  const ScalarType other = call.promoted(residual.scalar_type());
  if (residual.scalar_type() != other) residual = Call::as_float(residual);
  const DTypes dtypes =
      call.dtypes(other, {&post_weight, pointer_to(next_weight), pointer_to(scale)});
  const Rows x_rows = as_rows(x), residual_rows = as_rows(residual);
  Tensor new_residual = call.empty(shape_of(x), other);
  Tensor y = call.empty(next_weight ? shape_of(x) : Shape{0}, other);
  gemma4::add_rms_norm(
      {.x = call.in("x", x_rows.tensor),
       .residual = call.in("residual", residual_rows.tensor),
       .post_weight = call.weight("post_weight", post_weight, width, dtypes.weight),
       .next_weight = call.weight("next_weight", next_weight, width, dtypes.weight),
       .scale = call.weight("scale", scale, 1, dtypes.weight),
       .new_residual = call.out("new_residual", new_residual),
       .y = next_weight ? call.out("y", y) : nullptr,
       .rows = x_rows.rows,
       .x_stride = x_rows.stride,
       .residual_stride = residual_rows.stride,
       .width = as_int("x", width),
       .eps = static_cast<float>(eps)},
      dtypes, call.device());
  return {new_residual, y};
}

std::tuple<Tensor, Tensor> moe_norm(Tensor x, Tensor weight, Tensor scale, double eps) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const int64_t width = x.size(x.dim() - 1);
  const ScalarType other = call.promoted(scale.scalar_type());
  const DTypes dtypes = call.dtypes(other, {&weight, &scale});
  const Rows rows = as_rows(x);
  Tensor y = call.empty(shape_of(x)), router_x = call.empty(shape_of(x), other);
  gemma4::moe_norm({.x = call.in("x", rows.tensor),
                    .weight = call.weight("weight", weight, width, dtypes.weight),
                    .scale = call.weight("scale", scale, width, dtypes.weight),
                    .y = call.out("y", y),
                    .router_x = call.out("router_x", router_x),
                    .rows = rows.rows,
                    .x_stride = rows.stride,
                    .width = as_int("x", width),
                    .eps = static_cast<float>(eps),
                    .factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(width)))},
                   dtypes, call.device());
  return {y, router_x};
}

Tensor heads_in_place(const Tensor& t) {
  return t.stride(2) == 1 || t.size(2) <= 1 ? t : torch::stable::contiguous(t);
}

// Everything of both qkv ops but where k and v go.
QkvNormRopeParams qkv_params(Call& call, const DTypes& dtypes, const Tensor& q, OptionalTensor& k,
                             OptionalTensor& v, const Tensor& q_weight,
                             const OptionalTensor& k_weight, const Tensor& positions,
                             const Tensor& inv_freq, double eps) {
  STD_TORCH_CHECK(q.dim() == 3, "q must be [T, H, C], got ", text(shape_of(q)));
  const int64_t tokens = q.size(0), heads = q.size(1), head_dim = q.size(2);
  STD_TORCH_CHECK(head_dim % 2 == 0, "q must have an even head_dim, got ", head_dim);
  STD_TORCH_CHECK(k.has_value() == k_weight.has_value(), "k and k_weight must come together");
  STD_TORCH_CHECK(k || !v, "v must not come without k");
  int64_t kv_heads = 0;
  if (k) {
    STD_TORCH_CHECK(k->dim() == 3, "k must be [T, G, C], got ", text(shape_of(*k)));
    kv_heads = k->size(1);
    call.expect("k", *k, {tokens, kv_heads, head_dim});
    k = heads_in_place(*k);
  }
  if (v) {
    call.expect("v", *v, {tokens, kv_heads, head_dim});
    v = heads_in_place(*v);
  }
  call.expect_here("inv_freq", inv_freq);
  expect_dtype("inv_freq", inv_freq, ScalarType::Float);
  expect_shape("inv_freq", inv_freq, {head_dim / 2});
  const Tensor& q_held = call.keep(heads_in_place(q));
  QkvNormRopeParams p{};
  p.q = call.in("q", q_held);
  p.k = call.in("k", k);
  p.v = call.in("v", v);
  p.q_weight = call.weight("q_weight", q_weight, head_dim, dtypes.weight);
  p.k_weight = call.weight("k_weight", k_weight, head_dim, dtypes.weight);
  p.inv_freq = static_cast<const float*>(
      call.in("inv_freq", call.keep(torch::stable::contiguous(inv_freq))));
  p.positions = call.indices("positions", positions, tokens);
  p.q_stride = q_held.stride(0);
  p.q_head_stride = q_held.stride(1);
  if (k) {
    p.k_stride = k->stride(0);
    p.k_head_stride = k->stride(1);
  }
  if (v) {
    p.v_stride = v->stride(0);
    p.v_head_stride = v->stride(1);
  }
  p.tokens = p.num_slots = tokens;
  p.q_heads = as_int("q", heads);
  p.kv_heads = as_int("k", kv_heads);
  p.head_dim = as_int("q", head_dim);
  p.eps = static_cast<float>(eps);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> qkv_norm_rope(Tensor q, OptionalTensor k, OptionalTensor v,
                                                 Tensor q_weight, OptionalTensor k_weight,
                                                 Tensor positions, Tensor inv_freq, double eps) {
  Call call(q);
  const DTypes dtypes = call.dtypes(q.scalar_type(), {&q_weight, pointer_to(k_weight)});
  QkvNormRopeParams p =
      qkv_params(call, dtypes, q, k, v, q_weight, k_weight, positions, inv_freq, eps);
  Tensor q_out = call.empty(shape_of(q));
  const Shape kv_shape = k ? Shape{p.tokens, p.kv_heads, p.head_dim} : Shape{0};
  Tensor k_out = call.empty(kv_shape), v_out = call.empty(kv_shape);
  p.q_out = call.out("q_out", q_out);
  p.k_out = call.out("k_out", k_out);
  p.v_out = call.out("v_out", v_out);
  gemma4::qkv_norm_rope(p, dtypes, call.device());
  return {q_out, k_out, v_out};
}

Tensor qkv_norm_rope_cache(Tensor q, Tensor k, OptionalTensor v, Tensor q_weight, Tensor k_weight,
                           Tensor positions, Tensor inv_freq, double eps, Tensor k_cache,
                           Tensor v_cache, Tensor slots) {
  Call call(q);
  OptionalTensor k_in = k;
  const DTypes dtypes = call.dtypes(q.scalar_type(), {&q_weight, &k_weight});
  QkvNormRopeParams p =
      qkv_params(call, dtypes, q, k_in, v, q_weight, k_weight, positions, inv_freq, eps);
  const Shape cache_shape = shape_of(k_cache);
  STD_TORCH_CHECK(cache_shape.size() >= 3 && cache_shape.rbegin()[0] == p.head_dim &&
                      cache_shape.rbegin()[1] == p.kv_heads,
                  "k_cache must end in [G, C], got ", text(cache_shape));
  call.expect("k_cache", k_cache, cache_shape);
  call.expect("v_cache", v_cache, cache_shape);
  STD_TORCH_CHECK(k_cache.is_contiguous() && v_cache.is_contiguous(),
                  "k_cache and v_cache must be contiguous");
  p.num_slots = 1;
  for (size_t d = 0; d + 2 < cache_shape.size(); d++) p.num_slots *= cache_shape[d];
  Tensor q_out = call.empty(shape_of(q));
  p.q_out = call.out("q_out", q_out);
  p.k_out = call.out("k_cache", k_cache);
  p.v_out = call.out("v_cache", v_cache);
  p.slots = call.indices("slots", slots, p.tokens);
  gemma4::qkv_norm_rope(p, dtypes, call.device());
  return q_out;
}

Tensor geglu(Tensor gate_up) {
  Call call(gate_up);
  Shape shape = shape_of(gate_up);
  STD_TORCH_CHECK(!shape.empty() && shape.back() % 2 == 0,
                  "gate_up must end in an even width, got ", text(shape));
  shape.back() /= 2;
  const Rows rows = as_rows(gate_up);
  Tensor y = call.empty(shape);
  gemma4::geglu({.gate_up = call.in("gate_up", rows.tensor),
                 .y = call.out("y", y),
                 .rows = rows.rows,
                 .stride = rows.stride,
                 .width = as_int("gate_up", shape.back())},
                call.dtype(), call.device());
  return y;
}

std::tuple<Tensor, Tensor> moe_route(Tensor logits, Tensor per_expert_scale, int64_t k) {
  Call call(logits);
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [T, E], got ", text(shape_of(logits)));
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  STD_TORCH_CHECK(1 <= k && k <= num_experts, "k must lie in 1..E = ", num_experts, ", got ", k);
  const Rows rows = as_rows(logits);
  Tensor weights = call.empty({tokens, k}, ScalarType::Float);
  Tensor experts = call.empty({tokens, k}, ScalarType::Int);
  gemma4::moe_route({.logits = call.in("logits", rows.tensor),
                     .scale = call.floats("per_expert_scale", per_expert_scale, {num_experts}),
                     .weights = static_cast<float*>(call.out("weights", weights)),
                     .experts = static_cast<int32_t*>(call.out("experts", experts)),
                     .tokens = tokens,
                     .stride = rows.stride,
                     .num_experts = as_int("logits", num_experts),
                     .k = as_int("k", k)},
                    call.dtype(), call.device());
  return {weights, experts};
}

Tensor moe_experts(Tensor x, Tensor gate_up, Tensor down, Tensor experts, Tensor weights) {
  Call call(x);
  STD_TORCH_CHECK(x.dim() == 2 && down.dim() == 3 && experts.dim() == 2,
                  "x must be [T, D], down [E, D, F] and experts [T, K]");
  const int64_t tokens = x.size(0), width = x.size(1), k = experts.size(1);
  const int64_t num_experts = down.size(0), hidden_width = down.size(2);
  const DTypes dtypes = call.dtypes(x.scalar_type(), {&gate_up, &down});
  for (const auto& [name, t] : {std::pair("gate_up", &gate_up), std::pair("down", &down)}) {
    call.expect_here(name, *t);
    STD_TORCH_CHECK(Call::dtype(t->scalar_type()) == dtypes.weight, name,
                    " must be float32 or of the dtype of x, and the other like it");
  }
  expect_shape("gate_up", gate_up, {num_experts, 2 * hidden_width, width});
  expect_shape("down", down, {num_experts, width, hidden_width});
  expect_shape("experts", experts, {tokens, k});
  STD_TORCH_CHECK(width % 8 == 0 && hidden_width % 8 == 0,
                  "there are kernels for widths that are multiples of 8, got ", width, " and ",
                  hidden_width);
  // A copy would be as large as the layer.
  STD_TORCH_CHECK(
      gate_up.is_contiguous() && down.is_contiguous() && is_aligned(gate_up) && is_aligned(down),
      "gate_up and down must be contiguous and begin on a multiple of 16 bytes");
  const int assignments = as_int("experts", tokens * k);
  const bool streams = gemma4::moe_experts_streams(tokens, k, num_experts);
  const Tensor& x_held = call.keep(aligned(x));
  Tensor y = call.empty({tokens, width});
  Tensor offsets = call.empty({num_experts + 1}, ScalarType::Int);
  Tensor order = call.empty({assignments}, ScalarType::Int);
  Tensor hidden = call.empty({assignments, hidden_width});
  Tensor expert_out = call.empty({streams ? 0 : assignments, width});
  gemma4::moe_experts({.x = call.in("x", x_held),
                       .gate_up = call.in("gate_up", gate_up),
                       .down = call.in("down", down),
                       .experts = call.flat_indices("experts", experts),
                       .weights = call.floats("weights", weights, {tokens, k}),
                       .y = call.out("y", y),
                       .offsets = static_cast<int32_t*>(call.out("offsets", offsets)),
                       .order = static_cast<int32_t*>(call.out("order", order)),
                       .hidden = call.out("hidden", hidden),
                       .expert_out = call.out("expert_out", expert_out),
                       .x_stride = x_held.stride(0),
                       .tokens = as_int("x", tokens),
                       .k = as_int("experts", k),
                       .num_experts = as_int("down", num_experts),
                       .width = as_int("x", width),
                       .hidden_width = as_int("down", hidden_width)},
                      dtypes, call.device());
  return y;
}

// As the reference's embedding rounds it.
float round_to(ScalarType dtype, float x) {
  if (dtype == ScalarType::BFloat16) return torch::headeronly::BFloat16(x);
  if (dtype == ScalarType::Half) return torch::headeronly::Half(x);
  return x;
}

Tensor ple_embed(Tensor ids, Tensor table, Tensor projected, Tensor weight, double eps) {
  Call call(projected);
  STD_TORCH_CHECK(ids.dim() == 1 && table.dim() == 2 && weight.dim() == 1,
                  "ids must be [T], table [V, L P] and weight [P]");
  const int64_t tokens = ids.size(0), width = weight.size(0), columns = table.size(1);
  STD_TORCH_CHECK(width > 0 && columns % width == 0, "table must be [V, L P] with P = ", width,
                  ", got ", text(shape_of(table)));
  expect_shape("projected", projected, {tokens, columns});
  const ScalarType other = table.scalar_type();
  STD_TORCH_CHECK(other == call.promoted(other),
                  "table must be float32 or of the dtype of projected for a kernel to read it");
  const DTypes dtypes = call.dtypes(other, {&weight});
  const Rows table_rows = as_rows(table), projected_rows = as_rows(projected);
#ifndef GEMMA4_EMULATION
  if (table.is_cpu()) {
    cudaPointerAttributes attributes{};
    const bool known = cudaPointerGetAttributes(&attributes, table.data_ptr()) == cudaSuccess;
    STD_TORCH_CHECK(known && attributes.type == cudaMemoryTypeHost,
                    "table is in host memory and must be pinned for a kernel to read it");
  } else {
    call.expect_here("table", table);
  }
#endif
  Tensor y = call.empty({tokens, columns / width, width}, other);
  gemma4::ple_embed(
      {.ids = call.indices("ids", ids, tokens),
       .table = call.in("table", table_rows.tensor),
       .projected = call.in("projected", projected_rows.tensor),
       .weight = call.weight("weight", weight, width, dtypes.weight),
       .y = call.out("y", y),
       .tokens = tokens,
       .vocabulary = table.size(0),
       .table_stride = table_rows.stride,
       .projected_stride = projected_rows.stride,
       .layers = as_int("table", columns / width),
       .width = as_int("weight", width),
       .token_scale = round_to(table.scalar_type(), std::sqrt(static_cast<float>(width))),
       .eps = static_cast<float>(eps)},
      dtypes, call.device());
  return y;
}

Tensor ple_gate(Tensor gate, Tensor ple, int64_t layer) {
  Call call(gate);
  STD_TORCH_CHECK(gate.dim() == 2 && ple.dim() == 3, "gate must be [T, P] and ple [T, L, P]");
  call.expect_here("ple", ple);
  expect_shape("ple", ple, {gate.size(0), ple.size(1), gate.size(1)});
  STD_TORCH_CHECK(0 <= layer && layer < ple.size(1), "layer must lie in 0..L-1 = ", ple.size(1) - 1,
                  ", got ", layer);
  const ScalarType other = call.promoted(ple.scalar_type());
  Tensor slice = torch::stable::select(ple, 1, layer);
  if (slice.scalar_type() != other) slice = Call::as_float(slice);
  const Rows gate_rows = as_rows(gate), layer_rows = as_rows(slice);
  Tensor y = call.empty(shape_of(gate), other);
  gemma4::ple_gate({.gate = call.in("gate", gate_rows.tensor),
                    .ple = call.in("ple", layer_rows.tensor),
                    .y = call.out("y", y),
                    .rows = gate_rows.rows,
                    .gate_stride = gate_rows.stride,
                    .ple_stride = layer_rows.stride,
                    .width = as_int("gate", gate.size(1))},
                   call.dtypes(other, {}), call.device());
  return y;
}

Tensor softcap(Tensor logits, double cap) {
  Call call(logits);
  STD_TORCH_CHECK(cap > 0, "cap must be positive, got ", cap);
  const Rows rows = as_rows(logits);
  Tensor y = call.empty(shape_of(logits));
  gemma4::softcap({.logits = call.in("logits", rows.tensor),
                   .y = call.out("y", y),
                   .rows = rows.rows,
                   .stride = rows.stride,
                   .width = as_int("logits", rows.width),
                   .cap = static_cast<float>(cap)},
                  call.dtype(), call.device());
  return y;
}

Tensor softcap_argmax(Tensor logits, double cap) {
  Call call(logits);
  STD_TORCH_CHECK(cap > 0, "cap must be positive, got ", cap);
  Shape shape = shape_of(logits);
  STD_TORCH_CHECK(!shape.empty() && shape.back() > 0,
                  "logits must end in a non-empty vocabulary, got ", text(shape));
  shape.pop_back();
  const Rows rows = as_rows(logits);
  Tensor index = call.empty(shape, ScalarType::Long);
  gemma4::softcap_argmax({.logits = call.in("logits", rows.tensor),
                          .index = call.out("index", index),
                          .rows = rows.rows,
                          .stride = rows.stride,
                          .width = as_int("logits", rows.width),
                          .cap = static_cast<float>(cap)},
                         call.dtype(), call.device());
  return index;
}

// The common part of both attention ops: what does not depend on where the keys lie.
AttentionParams attention_params(Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                                 double scale, int64_t window, double softcap) {
  const int64_t heads = q.size(q.dim() - 2), kv_heads = k.size(k.dim() - 2);
  const int64_t head_dim = q.size(q.dim() - 1);
  STD_TORCH_CHECK(k.size(k.dim() - 1) == head_dim, "k must have the head_dim of q, ", head_dim,
                  ", got ", k.size(k.dim() - 1));
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0,
                  "the query heads must be a multiple of the KV heads, got ", heads, " and ",
                  kv_heads);
  STD_TORCH_CHECK(window >= 0, "window must be 0 (none) or a key count, got ", window);
  call.expect("k", k, shape_of(k));
  call.expect("v", v, shape_of(k));
  AttentionParams p{};
  p.q_heads = as_int("q", heads);
  p.kv_heads = as_int("k", kv_heads);
  p.head_dim = as_int("q", head_dim);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.window = static_cast<int>(std::min<int64_t>(window, INT32_MAX));
  p.splits = 1;
  return p;
}

const int32_t* lengths(Call& call, const char* name, const Tensor& t, int64_t count) {
  call.expect_here(name, t);
  expect_dtype(name, t, ScalarType::Int);
  expect_shape(name, t, {count});
  return static_cast<const int32_t*>(call.in(name, call.keep(torch::stable::contiguous(t))));
}

void set_pages(Call& call, AttentionParams& p, const Tensor& k, const Tensor& block_table,
               int64_t batch) {
  STD_TORCH_CHECK(k.dim() == 4, "with a block_table k and v must be [pages, page_size, G, C]");
  STD_TORCH_CHECK(block_table.dim() == 2 && block_table.size(0) == batch,
                  "block_table must be [B, pages] with B = ", batch);
  p.pages_per_row = as_int("block_table", block_table.size(1));
  p.page_size = as_int("k", k.size(1));
  p.capacity = int64_t{p.pages_per_row} * p.page_size;
  p.block_table = call.flat_indices("block_table", block_table);
}

void set_keys(Call& call, AttentionParams& p, const Tensor& k_in, const Tensor& v_in) {
  Tensor k = aligned(k_in), v = aligned(v_in);
  bool alike = true;
  for (int64_t d = 0; d < k.dim(); d++) alike = alike && k.stride(d) == v.stride(d);
  if (!alike) {
    k = torch::stable::contiguous(k);
    v = torch::stable::contiguous(v);
  }
  const int64_t dims = k.dim();
  p.k = call.in("k", call.keep(k));
  p.v = call.in("v", call.keep(v));
  p.outer_stride = dims == 4 ? k.stride(0) : 0;
  p.inner_stride = k.stride(dims - 3);
  p.kv_head_stride = k.stride(dims - 2);
}

// What the forward and the backward over packed sequences know alike.
AttentionParams packed(Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                       double scale, bool causal, int64_t window, int64_t window_right,
                       double softcap) {
  AttentionParams p = attention_params(call, q, k, v, scale, window, softcap);
  const int64_t batch = cu_seqlens_q.size(0) - 1;
  const Tensor& q_held = call.keep(aligned(q));
  set_keys(call, p, k, v);
  p.q = call.in("q", q_held);
  p.cu_seqlens_q = lengths(call, "cu_seqlens_q", cu_seqlens_q, batch + 1);
  p.cu_seqlens_k = lengths(call, "cu_seqlens_k", cu_seqlens_k, batch + 1);
  p.q_stride = q_held.stride(0);
  p.q_head_stride = q_held.stride(1);
  p.lse_head_stride = q.size(0);
  p.tokens = q.size(0);
  p.capacity = k.size(0);
  p.batch = as_int("cu_seqlens_q", batch);
  p.max_seqlen_q = static_cast<int>(std::min(max_seqlen_q, q.size(0)));
  p.window_right = causal ? 0 : static_cast<int>(std::min<int64_t>(window_right, INT32_MAX / 2));
  return p;
}

std::tuple<Tensor, Tensor> attention_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                             Tensor cu_seqlens_k, int64_t max_seqlen_q,
                                             int64_t max_seqlen_k, double scale, bool causal,
                                             int64_t window, int64_t window_right, double softcap,
                                             OptionalTensor block_table, bool return_lse) {
  Call call(q);
  STD_TORCH_CHECK(q.dim() == 3, "q must be [T, H, C], got ", text(shape_of(q)));
  STD_TORCH_CHECK(k.dim() == (block_table ? 4 : 3),
                  "k must be [T, G, C], or pages with a block_table");
  STD_TORCH_CHECK(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) >= 1,
                  "cu_seqlens_q must be [B + 1]");
  AttentionParams p = packed(call, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale, causal,
                             window, window_right, softcap);
  Tensor out = call.empty(shape_of(q));
  Tensor lse = call.empty({q.size(1), return_lse ? q.size(0) : 0}, ScalarType::Float);
  if (block_table) set_pages(call, p, k, *block_table, p.batch);
  p.out = call.out("out", out);
  p.lse = return_lse ? static_cast<float*>(call.out("lse", lse)) : nullptr;
  gemma4::attention_prefill(p, call.dtype(), call.device());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_prefill_backward(
    Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double scale, bool causal, int64_t window, int64_t window_right, double softcap) {
  Call call(q);
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "q must be [T, H, C] and k [T, G, C]");
  STD_TORCH_CHECK(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) >= 1,
                  "cu_seqlens_q must be [B + 1]");
  const Shape of_lse{q.size(1), q.size(0)};
  call.expect("grad_out", grad_out, shape_of(q));
  call.expect("out", out, shape_of(q));
  for (const Tensor* t : {&lse, &grad_lse}) {
    call.expect_here("lse and its gradient", *t);
    expect_dtype("lse and its gradient", *t, ScalarType::Float);
    expect_shape("lse and its gradient", *t, of_lse);
  }
  const auto dense = [&](const Tensor& t) -> const Tensor& {
    return call.keep(aligned(torch::stable::contiguous(t)));
  };
  Tensor grad_q = call.empty(shape_of(q)), grad_k = call.empty(shape_of(k));
  Tensor grad_v = call.empty(shape_of(k)), delta = call.empty(of_lse, ScalarType::Float);
  AttentionParams f = packed(call, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale, causal,
                             window, window_right, softcap);
  f.out = const_cast<void*>(call.in("out", dense(out)));
  f.lse = static_cast<float*>(const_cast<void*>(call.in("lse", dense(lse))));
  gemma4::attention_prefill_backward(
      {.forward = f,
       .grad_out = call.in("grad_out", dense(grad_out)),
       .grad_lse = static_cast<const float*>(call.in("grad_lse", dense(grad_lse))),
       .delta = static_cast<float*>(call.out("delta", delta)),
       .grad_q = call.out("grad_q", grad_q),
       .grad_k = call.out("grad_k", grad_k),
       .grad_v = call.out("grad_v", grad_v),
       .max_seqlen_k = static_cast<int>(std::min(max_seqlen_k, k.size(0)))},
      call.dtype(), call.device());
  return {grad_q, grad_k, grad_v};
}

std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k_cache, Tensor v_cache,
                                            Tensor seq_lens, OptionalTensor block_table,
                                            double scale, int64_t window, bool ring, double softcap,
                                            bool return_lse) {
  Call call(q);
  STD_TORCH_CHECK(q.dim() == 4, "q must be [B, N, H, C], got ", text(shape_of(q)));
  STD_TORCH_CHECK(k_cache.dim() == 4, "k_cache must be 4-d, got ", text(shape_of(k_cache)));
  AttentionParams p = attention_params(call, q, k_cache, v_cache, scale, window, softcap);
  const int64_t batch = q.size(0), new_tokens = q.size(1), slots = k_cache.size(1);
  STD_TORCH_CHECK(block_table || k_cache.size(0) == batch,
                  "k_cache must have one row per sequence, ", batch, ", got ", k_cache.size(0));
  STD_TORCH_CHECK(
      !ring || (!block_table && window > 0 && window + new_tokens - 1 <= slots),
      "a ring cache needs a window and window + new tokens - 1 slots, and no block_table");
  Tensor out = call.empty(shape_of(q));
  Tensor lse = call.empty({batch, q.size(2), return_lse ? new_tokens : 0}, ScalarType::Float);
  Tensor flat = aligned(q);
  if (new_tokens > 1 && flat.stride(0) != new_tokens * flat.stride(1))
    flat = torch::stable::contiguous(q);
  const Tensor& q_held = call.keep(flat);
  p.capacity = slots;
  if (block_table) set_pages(call, p, k_cache, *block_table, batch);
  set_keys(call, p, k_cache, v_cache);
  p.ring = ring ? as_int("k_cache", slots) : 0;
  p.q = call.in("q", q_held);
  p.out = call.out("out", out);
  p.lse = return_lse ? static_cast<float*>(call.out("lse", lse)) : nullptr;
  p.seq_lens = lengths(call, "seq_lens", seq_lens, batch);
  p.q_stride = new_tokens > 1 ? q_held.stride(1) : q_held.stride(0);
  p.q_head_stride = q_held.stride(2);
  p.lse_head_stride = new_tokens;
  p.tokens = batch * new_tokens;
  p.batch = as_int("q", batch);
  p.new_tokens = p.max_seqlen_q = as_int("q", new_tokens);
  const int64_t seen = window > 0 ? window + new_tokens - 1 : p.capacity;
  p.splits = gemma4::attention_decode_splits(ring ? seen : std::min(seen, p.capacity));
  OptionalTensor partial_out, partial_lse;
  if (p.splits > 1) {
    partial_out = call.empty({p.splits, p.tokens, p.q_heads, p.head_dim}, ScalarType::Float);
    partial_lse = call.empty({p.splits, p.tokens, p.q_heads}, ScalarType::Float);
    p.partial_out = static_cast<float*>(call.out("partial_out", *partial_out));
    p.partial_lse = static_cast<float*>(call.out("partial_lse", *partial_lse));
  }
  gemma4::attention_decode(p, call.dtype(), call.device());
  return {out, lse};
}

}  // namespace
}  // namespace binding

#ifdef GEMMA4_EMULATION
STABLE_TORCH_LIBRARY_IMPL(GEMMA4_EMULATION, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(gemma4_kernels_compiled, CUDA, m) {
#endif
  m.impl("rms_norm", TORCH_BOX(&binding::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&binding::add_rms_norm));
  m.impl("moe_norm", TORCH_BOX(&binding::moe_norm));
  m.impl("qkv_norm_rope", TORCH_BOX(&binding::qkv_norm_rope));
  m.impl("qkv_norm_rope_cache", TORCH_BOX(&binding::qkv_norm_rope_cache));
  m.impl("geglu", TORCH_BOX(&binding::geglu));
  m.impl("attention_prefill", TORCH_BOX(&binding::attention_prefill));
  m.impl("attention_prefill_backward", TORCH_BOX(&binding::attention_prefill_backward));
  m.impl("attention_decode", TORCH_BOX(&binding::attention_decode));
  m.impl("moe_route", TORCH_BOX(&binding::moe_route));
  m.impl("moe_experts", TORCH_BOX(&binding::moe_experts));
  m.impl("ple_embed", TORCH_BOX(&binding::ple_embed));
  m.impl("ple_gate", TORCH_BOX(&binding::ple_gate));
  m.impl("softcap", TORCH_BOX(&binding::softcap));
  m.impl("softcap_argmax", TORCH_BOX(&binding::softcap_argmax));
}
