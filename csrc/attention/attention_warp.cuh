// What the warps of the forward and of the backward kernel do alike.
//
// A block owns kRows rows and meets kKeys others at a time, all of kHeadDim columns. Its warps form
// kRowWarps x kColumnWarps: a warp owns 16 rows and kColumns columns. Products are as the tensor
// cores leave them: element e of d[n] is row lane / 4 + e / 2 * 8 of the warp's and column n * 8 +
// lane % 4 * 2 + e % 2.
//
// multiply and accumulate load a warp's operands and wait for their product. With a HopperTile four
// warps that own the same columns of 64 rows let the tensor cores read the tiles where they lie:
// start_multiply and start_accumulate, whose sums stand in the same places once waited for.
#pragma once

#include "../common/tile.cuh"

namespace gemma4 {

template <int kHeadDim_, int kRows_, int kKeys_, int kColumnWarps_>
struct AttentionTile {
  static constexpr int kHeadDim = kHeadDim_, kRows = kRows_, kKeys = kKeys_;
  static constexpr bool kWgmma = false;
  static constexpr int kStages = 1;  // tiles of keys in shared memory at a time
  static constexpr int kColumnWarps = kColumnWarps_, kRowWarps = kRows / 16;
  static constexpr int kWarps = kRowWarps * kColumnWarps, kThreads = kWarps * 32;
  static constexpr int kColumns = kHeadDim / kColumnWarps;
  static_assert(kRows % 16 == 0 && kKeys % 16 == 0 && kColumns % 16 == 0);

  // The first of the warp's rows and of its columns.
  DEVICE static int row() { return threadIdx.x / 32 % kRowWarps * 16; }
  DEVICE static int column() { return threadIdx.x / 32 / kRowWarps * kColumns; }
};

template <int kHeadDim, int kRows, int kKeys, int kColumnWarps>
struct HopperTile : AttentionTile<kHeadDim, kRows, kKeys, kColumnWarps> {
  static constexpr bool kWgmma = true;
  static constexpr int kStages = 2;
  static_assert(kRows % 64 == 0 && (kKeys == 32 || kKeys == 64));
  static_assert(kHeadDim / kColumnWarps % 128 == 0);
};

// Where the warps of the same rows add their parts of a product over all columns.
template <class Tile, bool kNeeded = (Tile::kColumnWarps > 1)>
struct ScoreExchange {
  float4 partial[Tile::kStages][Tile::kWarps][Tile::kKeys / 8][32];

  DEVICE void put(const float (&d)[Tile::kKeys / 8][4], int stage = 0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; n++)
      store_shared(&partial[stage][warp][n][lane], {d[n][0], d[n][1], d[n][2], d[n][3]});
  }

  // After a barrier; in the order of the warps, so that all of them round alike.
  DEVICE void total(float (&d)[Tile::kKeys / 8][4], int stage = 0) const {
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
  DEVICE void put(const float (&)[Tile::kKeys / 8][4], int = 0) {}
  DEVICE void total(float (&)[Tile::kKeys / 8][4], int = 0) const {}
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

// The softmax of the warp's rows, a tile of scores at a time: each lane keeps two rows' maximum and
// its part of their sum.
template <class Tile>
struct RunningSoftmax {
  float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  // Makes of scores, as multiples of ln 2, what their values weigh, and rescales what stands in
  // out.
  template <class T>
  DEVICE void weigh(uint32_t (&weight)[Tile::kKeys / 8][2],
                    const float (&score)[Tile::kKeys / 8][4], float (&out)[Tile::kColumns / 8][4]) {
    float decay[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float new_highest = highest[i];
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; n++)
        new_highest = fmaxf(new_highest, fmaxf(score[n][2 * i], score[n][2 * i + 1]));
      new_highest = fmaxf(new_highest, __shfl_xor_sync(0xffffffffu, new_highest, 1));
      new_highest = fmaxf(new_highest, __shfl_xor_sync(0xffffffffu, new_highest, 2));
      // A row that has seen no key yet: -inf - -inf would be NaN.
      const float base = new_highest == -INFINITY ? 0.0f : new_highest;
      decay[i] = ptx::exp2_approx(highest[i] - base);
      highest[i] = new_highest;
      sum[i] *= decay[i];
#pragma unroll
      for (int n = 0; n < Tile::kKeys / 8; n++) {
        const float low = ptx::exp2_approx(score[n][2 * i] - base);
        const float high = ptx::exp2_approx(score[n][2 * i + 1] - base);
        sum[i] += low + high;
        weight[n][i] = pack_pair<T>(low, high);
      }
    }
    // Once the maxima stand still, which is soon, there is nothing to rescale.
    if (__any_sync(0xffffffffu, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < Tile::kColumns / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) out[n][e] *= decay[e / 2];
    }
  }
};

// Says to the compiler what it cannot see, so that descriptions of tiles need no vector registers.
DEVICE int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// multiply, as one group of wgmmas.
template <class Tile, class T>
DEVICE void start_multiply(float (&d)[Tile::kKeys / 8][4], const T* a_tile, const T* b_tile) {
  const int row = same_in_warp(Tile::row() / 64 * 64), column = same_in_warp(Tile::column());
  const uint64_t a = wgmma_tile<Tile::kRows>(a_tile, row, column);
  const uint64_t b = wgmma_tile<Tile::kKeys>(b_tile, 0, column);
  ptx::wgmma_fence(d);
#pragma unroll
  for (int c = 0; c < Tile::kColumns; c += 16) {
    const uint64_t a_at = a + wgmma_step<Tile::kRows>(0, c);
    const uint64_t b_at = b + wgmma_step<Tile::kKeys>(0, c);
    if constexpr (Tile::kKeys == 32)
      ptx::wgmma_64x32x16<T>(d, a_at, b_at);
    else
      ptx::wgmma_64x64x16<T>(d, a_at, b_at);
  }
  ptx::wgmma_commit();
}

// accumulate, as one group of wgmmas.
template <class Tile, class T>
DEVICE void start_accumulate(float (&d)[Tile::kColumns / 8][4], uint32_t (&a)[Tile::kKeys / 8][2],
                             const T* b_tile) {
  const uint64_t b = wgmma_tile<Tile::kKeys>(b_tile, 0, same_in_warp(Tile::column()));
  ptx::fence_operand(a);
  ptx::wgmma_fence(d);
#pragma unroll
  for (int n = 0; n < Tile::kKeys / 16; n++) {
    const uint32_t operand[4] = {a[2 * n][0], a[2 * n][1], a[2 * n + 1][0], a[2 * n + 1][1]};
#pragma unroll
    for (int m = 0; m < Tile::kColumns / 128; m++)
      ptx::wgmma_64x128x16_trans<T>(&d[m * 16], operand,
                                    b + wgmma_step<Tile::kKeys>(n * 16, m * 128));
  }
  ptx::wgmma_commit();
}

// The warp's columns of d, each of a lane's two rows by its factor, to the first `rows` rows, which
// start at to(row). They go through the warp's own part of a tile, which no other warp reads any
// more, to leave in whole sectors.
template <class Tile, class T, class To>
DEVICE void write_rows(T* tile, const float (&d)[Tile::kColumns / 8][4], const float (&factor)[2],
                       int rows, const To& to) {
  constexpr int kChunks = Tile::kColumns / 8;
  const int lane = threadIdx.x % 32, first_chunk = Tile::column() / 8;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int n = 0; n < kChunks; n++) {
      const int row = Tile::row() + lane / 4 + i * 8;
      T* at = tile + chunk_offset<Tile::kRows>(row, first_chunk + n) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(at) =
          pack_pair<T>(d[n][2 * i] * factor[i], d[n][2 * i + 1] * factor[i]);
    }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * kChunks / 32; i++) {
    const int row = Tile::row() + (i * 32 + lane) / kChunks;
    const int chunk = first_chunk + (i * 32 + lane) % kChunks;
    if (row >= rows) continue;
    const T* from = tile + chunk_offset<Tile::kRows>(row, chunk);
    ptx::store_16(to(row) + chunk * 8, load_shared(reinterpret_cast<const uint4*>(from)));
  }
}

}  // namespace gemma4
