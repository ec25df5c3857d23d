// How a block's warps divide its tiles, and the products of one warp.
//
// A block owns kRows rows and meets kKeys others at a time, all of kHeadDim columns. Its warps form
// kRowWarps x kColumnWarps: a warp owns 16 rows and kColumns columns. Products are as the tensor
// cores leave them: element e of d[n] is row lane / 4 + e / 2 * 8 of the warp's and column n * 8 +
// lane % 4 * 2 + e % 2.
#pragma once

#include "../common/tile.cuh"

namespace gemma4 {

template <int kHeadDim_, int kRows_, int kKeys_, int kColumnWarps_>
struct AttentionTile {
  static constexpr int kHeadDim = kHeadDim_, kRows = kRows_, kKeys = kKeys_;
  static constexpr bool kWgmma = false;
  static constexpr bool kCoded = false;  // whether keys are codes with a scale each
  static constexpr int kStages = 1;      // tiles of keys in shared memory at a time
  static constexpr int kColumnWarps = kColumnWarps_, kRowWarps = kRows / 16;
  static constexpr int kWarps = kRowWarps * kColumnWarps, kThreads = kWarps * 32;
  static constexpr int kColumns = kHeadDim / kColumnWarps;
  static_assert(kRows % 16 == 0 && kKeys % 16 == 0 && kColumns % 16 == 0);

  // The first of the warp's rows and of its columns.
  DEVICE static int row() { return threadIdx.x / 32 % kRowWarps * 16; }
  DEVICE static int column() { return threadIdx.x / 32 / kRowWarps * kColumns; }
};

// The same over keys in e4m3, 16 rows at a time.
template <int kHeadDim, int kKeys>
struct CodedTile : AttentionTile<kHeadDim, 16, kKeys, 4> {
  static constexpr bool kCoded = true;
  static_assert(kHeadDim / 4 % 64 == 0);
};

// Where the warps of the same rows add their parts of a product over all columns.
template <class Tile, bool kNeeded = (Tile::kColumnWarps > 1)>
struct ScoreExchange {
  float4 partial[Tile::kStages][Tile::kWarps][Tile::kKeys / 8][32];

  DEVICE void store_partial(const float (&d)[Tile::kKeys / 8][4], int stage = 0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; n++)
      store_shared(&partial[stage][warp][n][lane], {d[n][0], d[n][1], d[n][2], d[n][3]});
  }

  // After a barrier; in the order of the warps, so that all of them round alike.
  DEVICE void reduce(float (&d)[Tile::kKeys / 8][4], int stage = 0) const {
    const int lane = threadIdx.x % 32, first_warp = threadIdx.x / 32 % Tile::kRowWarps;
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; n++) {
      float4 sum = load_shared(&partial[stage][first_warp][n][lane]);
#pragma unroll
      for (int w = 1; w < Tile::kColumnWarps; w++) {
        const float4 part = load_shared(&partial[stage][first_warp + w * Tile::kRowWarps][n][lane]);
        sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
      }
      d[n][0] = sum.x, d[n][1] = sum.y, d[n][2] = sum.z, d[n][3] = sum.w;
    }
  }
};
template <class Tile>
struct ScoreExchange<Tile, false> {
  DEVICE void store_partial(const float (&)[Tile::kKeys / 8][4], int = 0) {}
  DEVICE void reduce(float (&)[Tile::kKeys / 8][4], int = 0) const {}
};

// d += a bᵀ over the warp's columns alone.
template <class Tile, class T>
DEVICE void multiply(float (&d)[Tile::kKeys / 8][4], const T* a_tile, const T* b_tile) {
  const auto a_at = lane_address<Tile::kRows>(a_tile, Tile::row(), Tile::column());
  const auto b_at = transposed_lane_address<Tile::kKeys>(b_tile, 0, Tile::column());
#pragma unroll 4
  for (int column = 0; column < Tile::kColumns; column += 16) {
    uint32_t a[4];
    ptx::ldmatrix_x4(a, a_at.at(0, column));
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 16; n++) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, b_at.at(n * 16, column));
      ptx::mma_16816<T>(d[2 * n], a, b[0], b[1]);
      ptx::mma_16816<T>(d[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// d += a b in the warp's columns; a is a product in 16 bits: a[n][i] holds elements 2 i and 2 i
// + 1.
template <class Tile, class T>
DEVICE void accumulate(float (&d)[Tile::kColumns / 8][4], const uint32_t (&a)[Tile::kKeys / 8][2],
                       const T* b_tile) {
  const auto b_at = lane_address<Tile::kKeys>(b_tile, 0, Tile::column());
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 16; n++) {
    const uint32_t operand[4] = {a[2 * n][0], a[2 * n][1], a[2 * n + 1][0], a[2 * n + 1][1]};
#pragma unroll
    for (int m = 0; m < Tile::kColumns / 16; m++) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, b_at.at(n * 16, m * 16));
      ptx::mma_16816<T>(d[2 * m], operand, b[0], b[1]);
      ptx::mma_16816<T>(d[2 * m + 1], operand, b[2], b[3]);
    }
  }
}

// The same two products with tiles of codes, of which they make code / 256 in registers. A word of
// four codes gives two operands, of its even and of its odd ones, and that is how the columns of q
// are paired here and how those of the result come out: elements 0 and 1 of d[2 m] are the lane's
// columns 0 and 2 of the four that begin with m * 16 + lane % 4 * 4, those of d[2 m + 1] are
// columns 1 and 3.
template <class Tile, class T>
DEVICE void multiply(float (&d)[Tile::kKeys / 8][4], const T* a_tile, const e4m3* b_tile) {
  const int lane = threadIdx.x % 32, row = lane / 4;
#pragma unroll
  for (int first = 0; first < Tile::kColumns; first += 64) {
    const int column = Tile::column() + first + lane % 4 * 16;  // the lane's sixteen
    uint32_t a[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {  // a row's first eight columns, then its others
      const T* from =
          chunk_of<Tile::kRows>(a_tile, Tile::row() + row + i % 2 * 8, column / 8 + i / 2);
      const uint4 q = load_shared(reinterpret_cast<const uint4*>(from));
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint32_t low = j ? q.z : q.x, high = j ? q.w : q.y;
        a[i / 2 * 2 + j][i % 2] = (low & 0xffff) | high << 16;
        a[i / 2 * 2 + j][i % 2 + 2] = low >> 16 | (high & 0xffff0000u);
      }
    }
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; n++) {
      const e4m3* from = chunk_of<Tile::kKeys>(b_tile, n * 8 + row, column / 16);
      const uint4 codes = load_shared(reinterpret_cast<const uint4*>(from));
      const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t even, odd;
        unpack_codes<T>(words[j], even, odd);
        ptx::mma_16816<T>(d[n], a[j], even, odd);
      }
    }
  }
}

template <class Tile, class T>
DEVICE void accumulate(float (&d)[Tile::kColumns / 8][4], const uint32_t (&a)[Tile::kKeys / 8][2],
                       const e4m3* b_tile) {
  const int lane = threadIdx.x % 32;
  const e4m3* first = chunk_of<Tile::kKeys>(b_tile, lane % 16, Tile::column() / 16 + lane / 16);
  const LaneAddress<Tile::kKeys> b_at{ptx::shared_address(first)};
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 16; n++) {
    const uint32_t operand[4] = {a[2 * n][0], a[2 * n][1], a[2 * n + 1][0], a[2 * n + 1][1]};
#pragma unroll
    for (int m = 0; m < Tile::kColumns / 32; m++) {
      uint32_t codes[4];  // of keys 0 to 7 and 8 to 15, of the first 16 columns and of the last
      ptx::ldmatrix_x4_trans(codes, b_at.at(n * 16, m * 16));  // which counts columns of 16 bits
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t even[2], odd[2];
        unpack_codes<T>(codes[2 * i], even[0], odd[0]);
        unpack_codes<T>(codes[2 * i + 1], even[1], odd[1]);
        ptx::mma_16816<T>(d[4 * m + 2 * i], operand, even[0], even[1]);
        ptx::mma_16816<T>(d[4 * m + 2 * i + 1], operand, odd[0], odd[1]);
      }
    }
  }
}

}  // namespace gemma4
