// What the bindings of all families share: checks, and a call's pointers and tensors.
//
// The bindings turn torch's tensors into the parameters of ops.h: they check, allocate and launch.
// They alone know torch. Checks here keep a direct caller of torch.ops from reading astray and
// speak of torch's RuntimeError; Python puts the sentence of the op's own check in its place.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../common/types.h"
#include "device.h"

// Not in namespace gemma4: an op has one name here and there.
namespace binding {

using gemma4::Device, gemma4::DType, gemma4::DTypes, gemma4::Floats, gemma4::Indices;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline const Tensor* pointer_to(const OptionalTensor& t) { return t ? &*t : nullptr; }

inline void expect_dtype(const char* name, const Tensor& t, ScalarType want) {
  STD_TORCH_CHECK(t.scalar_type() == want, name, " has another dtype than the op expects of it");
}

inline void expect_shape(const char* name, const Tensor& t, const Shape& want) {
  const auto got = t.sizes();
  bool same = got.size() == want.size();
  for (size_t i = 0; same && i < want.size(); i++) same = got[i] == want[i];
  STD_TORCH_CHECK(same, name, " must have shape ", text(want), ", got ", text(shape_of(t)));
}

// One call of an op: makes the tensors' device current and knows its stream. Every pointer that a
// kernel gets is taken through `in` or `out`, so that under emulation all else is out of bounds.
class Call {
 public:
  explicit Call(const Tensor& on) : on_(on), dtype_(on.scalar_type()), device_(on) {}
  Call(const Call&) = delete;

  const Device& device() const { return device_.get(); }

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

  // Of any integer type; what is neither int32 nor int64 is widened first.
  Indices flat_indices(const char* name, const Tensor& t) {
    expect_here(name, t);
    const ScalarType type = index_type(name, t.scalar_type());
    const Tensor& wide = type == t.scalar_type() ? t : keep(torch::stable::to(t, type));
    return {in(name, keep(torch::stable::contiguous(wide))), type == ScalarType::Long};
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
    return parameter(name, t,
                     torch::stable::contiguous(dtype(t.scalar_type()) == want ? t : as_float(t)));
  }
  const void* weight(const char* name, const OptionalTensor& t, int64_t width, DType want) {
    return t ? weight(name, *t, width, want) : nullptr;
  }
  // One that kernels read before they wait for those before them: `t`, or what was just made of it.
  const void* parameter(const char* name, const Tensor& t, Tensor read) {
    if (read.data_ptr() != t.data_ptr()) device_.launch_fully();
    return in(name, keep(std::move(read)));
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
  static ScalarType index_type(const char* name, ScalarType type) {
    switch (type) {
      case ScalarType::Byte:
      case ScalarType::Char:
      case ScalarType::Short:
      case ScalarType::UInt16:
      case ScalarType::Int:
        return ScalarType::Int;
      case ScalarType::UInt32:
      case ScalarType::UInt64:
      case ScalarType::Long:
        return ScalarType::Long;
      default:
        STD_TORCH_CHECK(false, name, " must hold integers");
    }
  }

  void* pointer(const char* name, const Tensor& t, bool writable) {
    int64_t extent = t.numel() == 0 ? 0 : 1;
    for (int64_t d = 0; extent > 0 && d < t.dim(); d++) extent += (t.size(d) - 1) * t.stride(d);
    allow(t.data_ptr(), extent * t.element_size(), name, writable);
    return t.data_ptr();
  }

  Tensor on_;
  ScalarType dtype_;
  CurrentDevice device_;
  std::deque<Tensor> kept_;  // a vector would move what `keep` has handed out
};

// A tensor as rows of its last dimension. Views whose rows are not evenly spaced, or not contiguous
// themselves, are copied first.
struct Rows {
  Tensor tensor;
  int64_t rows, width, stride;
};

inline Rows as_rows(const Tensor& t) {
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
inline bool is_aligned(const Tensor& t) {
  if (t.numel() == 0) return true;
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < t.dim(); d++) {
    const bool fits = d + 1 == t.dim() ? t.stride(d) == 1 : t.stride(d) % 8 == 0;
    aligned = aligned && (fits || t.size(d) == 1);
  }
  return aligned;
}

// A step's own tensor, copied if it is not; what is kept for many steps is refused instead.
inline Tensor aligned(const Tensor& t) {
  if (is_aligned(t)) return t;
  const Tensor dense = torch::stable::contiguous(t);
  return is_aligned(dense) ? dense : torch::stable::clone(dense);
}

// A weight of the op's dtype that is read where it lies: a copy would be as large as the layer.
inline const void* whole(Call& call, const char* name, const Tensor& t, const Shape& shape) {
  call.expect(name, t, shape);
  STD_TORCH_CHECK(t.is_contiguous() && is_aligned(t), name,
                  " must be contiguous and begin on a multiple of 16 bytes");
  return call.in(name, t);
}

// Whether a cache is in e4m3, which has a scale for each head of each key.
inline bool expect_scales(Call& call, const Tensor& k_cache, const Tensor& v_cache,
                          const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  STD_TORCH_CHECK(k_scales.has_value() == v_scales.has_value(),
                  "k_scales and v_scales must come together");
  if (!k_scales) return false;
  Shape shape = shape_of(k_cache);
  shape.pop_back();
  for (const Tensor* scales : {&*k_scales, &*v_scales}) {
    call.expect_here("k_scales and v_scales", *scales);
    expect_dtype("k_scales and v_scales", *scales, ScalarType::Float);
    expect_shape("k_scales and v_scales", *scales, shape);
  }
  for (const Tensor* t : {&k_cache, &v_cache, &*k_scales, &*v_scales})
    STD_TORCH_CHECK(t->is_contiguous(), "a cache in e4m3 and its scales must be contiguous");
  return true;
}

inline int as_int(const char* name, int64_t value) {
  STD_TORCH_CHECK(value <= INT32_MAX, name, " is too wide: ", value);
  return static_cast<int>(value);
}

}  // namespace binding
