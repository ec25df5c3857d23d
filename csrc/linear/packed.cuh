// What a lane has of a tile of a packed weight, made the operand of a product.
//
// Every number of four or eight bits is a number of T, exactly, and so is that of kE2m1 times its
// scale of kE4m3: only what other scales do is left for the sums, in fp32. Numbers are made by
// moving bits to where T has them and correcting the exponent, two at a time: T's own subnormals
// are the codes', and no table is read. The NaN of e4m3, which no checkpoint may hold, is 480 here.
#pragma once

#include "../common/e4m3.cuh"
#include "../common/platform.h"
#include "../common/stream.cuh"
#include "../common/tile.cuh"
#include "packed.h"

namespace gemma4 {

template <class T>
constexpr uint32_t kOnes = kTwice<(kIsBf16<T> ? 0x3f80 : 0x3c00)>;

DEVICE constexpr int scale_bytes(Scales kind) {  // of a tile
  return kind == Scales::kNone ? 0 : kind == Scales::kTile ? 4 : kind == Scales::kE8m0 ? 32 : 64;
}

template <int kBits>
struct LaneTile {
  uint4 codes[kBits / 4];
  uint2 scales;  // of rows r and r + 8; kE8m0 and kTile: in x
};

// Tile `tile` of a weight, by loads that stay before the wait for the previous kernel.
template <int kBits>
DEVICE void load_tile(LaneTile<kBits>& to, const PackedWeight& w, int tile FROM_HERE) {
  constexpr int kBytes = kPackedRows * kPackedColumns * kBits / 8;
  const int lane = threadIdx.x % 32;
  const char* codes = static_cast<const char*>(w.codes) + int64_t{tile} * kBytes + lane * 16;
#pragma unroll
  for (int i = 0; i < kBits / 4; i++) to.codes[i] = ptx::load_16_first(codes + i * 512 HERE);
  if (w.kind == Scales::kNone) return;
  const char* scales = static_cast<const char*>(w.scales) + int64_t{tile} * scale_bytes(w.kind);
  if (w.kind == Scales::kTile || w.kind == Scales::kE8m0) {
    const int row = w.kind == Scales::kTile ? 0 : lane / 4;
    to.scales.x = ptx::load_one_first(reinterpret_cast<const uint32_t*>(scales) + row HERE);
  } else {
    to.scales = ptx::load_8_first(scales + lane / 4 * 8 HERE);
  }
}

// The same, zeros where there is none.
template <int kBits>
DEVICE LaneTile<kBits> load_tile(const PackedWeight& w, int64_t tile, bool exists FROM_HERE) {
  LaneTile<kBits> of_lane{};
  if (exists) load_tile(of_lane, w, static_cast<int>(tile) HERE);
  return of_lane;
}

// ---- eight numbers from their codes

template <class T>
DEVICE uint4 int4_numbers(uint32_t codes) {
  // 128 or 1024 with the code in the last bits; less that and 8.
  constexpr uint32_t kMagic = kTwice<(kIsBf16<T> ? 0x4300 : 0x6400)>;
  constexpr uint32_t kLess = kTwice<(kIsBf16<T> ? 0xc308 : 0xe408)>;
  const auto pair = [&](int i) {
    return ptx::fma_pair<T>(ptx::and_or(codes >> 4 * i, kTwice<0xf>, kMagic), kOnes<T>, kLess);
  };
  return {pair(0), pair(1), pair(2), pair(3)};
}

// Times `factor`, which holds what T's exponents lack: 2^126 in bf16, 2^14 in fp16.
template <class T>
DEVICE uint4 e2m1_numbers(uint32_t codes, uint32_t factor) {
  constexpr int kPlace = kIsBf16<T> ? 6 : 9;  // of the three bits below the sign
  const auto pair = [&](int i) {
    const int left = kPlace - 4 * i;
    const uint32_t size = (left > 0 ? codes << left : codes >> -left) & kTwice<(7 << kPlace)>;
    return ptx::fma_pair<T>(size | (codes << (12 - 4 * i) & kTwice<0x8000>), factor,
                            kTwice<0x8000>);
  };
  return {pair(0), pair(1), pair(2), pair(3)};
}

// Two numbers, in the low halves' bytes of `pair` or, of kE4m3, in the high ones.
template <class T>
DEVICE uint32_t int8_pair(uint32_t pair) {
  if constexpr (kIsBf16<T>) {  // 128 and the last seven bits, less 128 or, with the sign, 256
    const uint32_t low = ptx::and_or(pair, kTwice<0x7f>, kTwice<0x4300>);
    return ptx::fma_pair<T>(ptx::and_or(pair, kTwice<0x80>, kTwice<0x4300>), kTwice<0xbf80>, low);
  } else {  // 1024 and code + 128, less 1152
    return ptx::fma_pair<T>((pair ^ kTwice<0x80>) | kTwice<0x6400>, kOnes<T>, kTwice<0xe480>);
  }
}
template <class T>
DEVICE uint32_t e4m3_pair(uint32_t pair) {
  constexpr uint32_t kFactor = kTwice<(kIsBf16<T> ? 0x7b80 : 0x5c00)>;
  return ptx::fma_pair<T>(e4m3_pair_unscaled<T>(pair), kFactor, kTwice<0x8000>);
}

template <class T>
DEVICE uint4 int8_numbers(uint32_t first, uint32_t last) {
  const auto pairs = [](uint32_t four, int which) {
    return int8_pair<T>(__byte_perm(four, 0, which ? 0x4342 : 0x4140));
  };
  return {pairs(first, 0), pairs(first, 1), pairs(last, 0), pairs(last, 1)};
}
template <class T>
DEVICE uint4 e4m3_numbers(uint32_t first, uint32_t last) {
  const auto pairs = [](uint32_t four, int which) {
    return e4m3_pair<T>(__byte_perm(four, 0, which ? 0x3424 : 0x1404));
  };
  return {pairs(first, 0), pairs(first, 1), pairs(last, 0), pairs(last, 1)};
}

// ---- and their scales

struct LaneScales {
  float after[2][2];   // [half][r or r + 8], of the sums
  uint32_t before[2];  // [r or r + 8], of e2m1_numbers, in T's bits: the low half's, the high one's
};

template <class T, int kBits>
DEVICE LaneScales lane_scales(const PackedWeight& w, uint2 scales) {
  const auto each = [](const auto& f) {
    LaneScales made;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int row = 0; row < 2; row++) made.after[half][row] = f(half, row);
    made.before[0] = made.before[1] = kTwice<(kIsBf16<T> ? 0x7e80 : 0x7400)>;
    return made;
  };
  const auto of_row = [&](int row) { return row ? scales.y : scales.x; };
  if (w.kind == Scales::kBFloat16)
    return each([&](int half, int row) {
      return __uint_as_float(half ? of_row(row) & 0xffff0000 : of_row(row) << 16);
    });
  if (w.kind == Scales::kFloat16)
    return each([&](int half, int row) {
      const uint16_t bits = static_cast<uint16_t>(of_row(row) >> 16 * half);
      fp16 scale;
      __builtin_memcpy(&scale, &bits, 2);
      return to_float(scale);
    });
  if (kBits == 8 && w.kind == Scales::kTile)
    return each([&](int, int) { return __uint_as_float(scales.x); });
  if (kBits == 4 && w.kind == Scales::kE8m0)
    return each([&](int half, int row) {
      const uint32_t exponent = scales.x >> (row * 16 + half * 8) & 0xff;
      return __uint_as_float(max(exponent << 23, 0x00400000u));
    });
  LaneScales made = each([](int, int) { return 1.0f; });
  if (kBits == 4 && w.kind == Scales::kE4m3) {
    // 2^-16 of what it is in bf16, 2^-8 in fp16: with the numbers' own factor it would overflow.
    made = each([](int, int) { return kIsBf16<T> ? 65536.0f : 256.0f; });
#pragma unroll
    for (int row = 0; row < 2; row++) {
      // Of the row's four groups of 16 columns the lane's, one in each half.
      const uint32_t pair = __byte_perm(of_row(row), 0, threadIdx.x % 4 / 2 ? 0x3414 : 0x2404);
      if constexpr (kIsBf16<T>)  // times 2^110
        made.before[row] = ptx::fma_pair<T>(e4m3_pair<T>(pair), kTwice<0x7680>, kTwice<0x8000>);
      else  // times 2^6
        made.before[row] =
            ptx::fma_pair<T>(e4m3_pair_unscaled<T>(pair), kTwice<0x7400>, kTwice<0x8000>);
    }
  }
  return made;
}

// ---- the operands

struct LaneRows {
  uint4 low, high;  // 8 columns of row r, and of r + 8
};

// Of one half of a tile, yet to be multiplied by `scales.after`. Which half may differ from lane to
// lane.
template <class T, int kBits>
DEVICE LaneRows lane_rows(const PackedWeight& w, const LaneTile<kBits>& tile,
                          const LaneScales& scales, int half) {
  const uint4 codes = half ? tile.codes[kBits / 4 - 1] : tile.codes[0];
  if constexpr (kBits == 4) {
    const uint32_t low = half ? codes.z : codes.x, high = half ? codes.w : codes.y;
    if (w.numbers == Numbers::kInt4) return {int4_numbers<T>(low), int4_numbers<T>(high)};
    const auto factor = [&](int row) {
      return __byte_perm(scales.before[row], 0, half ? 0x3232 : 0x1010);
    };
    return {e2m1_numbers<T>(low, factor(0)), e2m1_numbers<T>(high, factor(1))};
  } else {
    if (w.numbers == Numbers::kInt8)
      return {int8_numbers<T>(codes.x, codes.y), int8_numbers<T>(codes.z, codes.w)};
    return {e4m3_numbers<T>(codes.x, codes.y), e4m3_numbers<T>(codes.z, codes.w)};
  }
}

// sum[i] += half a tile times the i-th eight tokens: x[i] is what a lane has of token lane / 4 of
// them, the same 8 columns as of a row. The sums are those of mma_16816: rows r and r + 8, tokens
// lane % 4 * 2 and the next. The first `eights` are added to.
template <class T, int kBits, int kEights>
DEVICE void multiply_half(float (&sum)[kEights][4], const PackedWeight& w,
                          const LaneTile<kBits>& tile, const LaneScales& scales, int half,
                          const uint4 (&x)[kEights], int eights FROM_HERE) {
  const LaneRows rows = lane_rows<T>(w, tile, scales, half);
  const uint4 a = rows.low, a_8 = rows.high;
#pragma unroll
  for (int i = 0; i < kEights; i++) {
    if (i >= eights) break;
    float of_half[4];
    ptx::mma_16816_first<T>(of_half, {a.x, a_8.x, a.y, a_8.y}, x[i].x, x[i].y HERE);
    ptx::mma_16816<T>(of_half, {a.z, a_8.z, a.w, a_8.w}, x[i].z, x[i].w HERE);
#pragma unroll
    for (int e = 0; e < 4; e++) sum[i][e] += of_half[e] * scales.after[half][e / 2];
  }
}

// The same of both halves: x[i][half].
template <class T, int kBits, int kEights>
DEVICE void multiply_tile(float (&sum)[kEights][4], const PackedWeight& w,
                          const LaneTile<kBits>& tile, const uint4 (&x)[kEights][2],
                          int eights FROM_HERE) {
  const LaneScales scales = lane_scales<T, kBits>(w, tile.scales);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint4 of_half[kEights];
#pragma unroll
    for (int i = 0; i < kEights; i++) of_half[i] = x[i][half];
    multiply_half<T>(sum, w, tile, scales, half, of_half, eights HERE);
  }
}

// ---- a tile of T in shared memory

// Whether T holds these scales exactly, so that a product in T is one in float that is rounded
// once.
template <class T>
DEVICE bool has_exact_scales(const PackedWeight& w) {
  return w.kind == Scales::kNone || w.kind == Scales::kE4m3 ||
         w.kind == (kIsBf16<T> ? Scales::kBFloat16 : Scales::kFloat16) ||
         (kIsBf16<T> && w.kind == Scales::kE8m0);
}

template <class T>
DEVICE uint4 scaled(uint4 numbers, float scale, bool is_exact) {
  const auto each = [&](const auto& f) -> uint4 {
    return {f(numbers.x), f(numbers.y), f(numbers.z), f(numbers.w)};
  };
  const uint32_t both = pack_pair<T>(scale, scale);
  if (is_exact)
    return each([&](uint32_t pair) { return ptx::fma_pair<T>(pair, both, kTwice<0x8000>); });
  return each([&](uint32_t pair) {
    T two[2];
    __builtin_memcpy(two, &pair, 4);
    return pack_pair<T>(to_float(two[0]) * scale, to_float(two[1]) * scale);
  });
}

// A warp writes 16 rows, from `row` on, of a tile of kRows rows and 64 columns: numbers times
// scales, rounded once. Odd rows begin with their last half: eight lanes meet no bank twice.
template <int kRows, class T, int kBits>
DEVICE void write_tile(T* to, int row, const PackedWeight& w, const LaneTile<kBits>& tile) {
  const int lane = threadIdx.x % 32;
  const LaneScales scales = lane_scales<T, kBits>(w, tile.scales);
  const bool is_exact = has_exact_scales<T>(w);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int half = i ^ (lane / 4 & 1);
    const LaneRows rows = lane_rows<T>(w, tile, scales, half);
#pragma unroll
    for (int high = 0; high < 2; high++) {
      const float scale = half ? scales.after[1][high] : scales.after[0][high];
      const int at = chunk_offset<kRows>(row + lane / 4 + high * 8, half * 4 + lane % 4);
      store_shared(reinterpret_cast<uint4*>(to + at),
                   scaled<T>(high ? rows.high : rows.low, scale, is_exact));
    }
  }
}

}  // namespace gemma4
