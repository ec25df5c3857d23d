// A packed weight's tensors as kernels take them.
#pragma once

#include "../linear/packed.h"
#include "torch.h"

namespace binding {

inline bool is_packed(const Tensor& weight) {
  const ScalarType type = weight.scalar_type();
  return type == ScalarType::Byte || type == ScalarType::Char || type == ScalarType::Float8_e4m3fn;
}

// Of codes [..., rows / 16, width / 64, 512 or 1024], whose leading sizes are `experts`. Nothing is
// copied: what does not lie ready is refused.
inline gemma4::PackedWeight packed(Call& call, const char* name, const Tensor& codes,
                                   const OptionalTensor& scales, const OptionalTensor& row_scales,
                                   Shape experts, int64_t rows, int64_t width) {
  using gemma4::Numbers, gemma4::Scales;
  const std::string of = name;
  const auto whole = [&](const std::string& part, const Tensor& t, Shape tail) {
    tail.insert(tail.begin(), experts.begin(), experts.end());
    call.expect_here(part.c_str(), t);
    expect_shape(part.c_str(), t, tail);
    STD_TORCH_CHECK(t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, part,
                    " must be contiguous and begin on a multiple of 16 bytes");
    return call.in(part.c_str(), t);
  };
  const int64_t tile_rows = rows / gemma4::kPackedRows, tiles = width / gemma4::kPackedColumns;
  STD_TORCH_CHECK(rows % gemma4::kPackedRows == 0 && width % gemma4::kPackedColumns == 0, name,
                  " must be made of whole tiles, got ", rows, " rows and ", width, " columns");
  gemma4::PackedWeight w{};
  const ScalarType numbers = codes.scalar_type();
  const bool four = numbers == ScalarType::Byte;
  STD_TORCH_CHECK(is_packed(codes), name, " must hold codes in uint8, int8 or float8_e4m3fn");
  w.codes = whole(of, codes, {tile_rows, tiles, four ? 512 : 1024});
  w.numbers = four                                   ? Numbers::kInt4
              : numbers == ScalarType::Float8_e4m3fn ? Numbers::kE4m3
                                                     : Numbers::kInt8;
  w.kind = Scales::kNone;
  if (scales) {
    Shape shape{tile_rows, tiles, 32};
    const ScalarType type = scales->scalar_type();
    if (type == ScalarType::BFloat16) {
      w.kind = Scales::kBFloat16;
    } else if (type == ScalarType::Half) {
      w.kind = Scales::kFloat16;
    } else if (four && type == ScalarType::Float8_e8m0fnu) {
      w.kind = Scales::kE8m0, w.numbers = Numbers::kE2m1;
    } else if (four && type == ScalarType::Float8_e4m3fn) {
      w.kind = Scales::kE4m3, w.numbers = Numbers::kE2m1, shape.back() = 64;
    } else {
      STD_TORCH_CHECK(!four && type == ScalarType::Float, name,
                      "_scales has no dtype of its codes");
      w.kind = Scales::kTile, shape.pop_back();
    }
    w.scales = whole(of + "_scales", *scales, shape);
  }
  if (row_scales) {
    expect_dtype((of + "_row_scales").c_str(), *row_scales, ScalarType::Float);
    w.row_scales = static_cast<const float*>(whole(of + "_row_scales", *row_scales, {rows}));
  }
  return w;
}

}  // namespace binding
