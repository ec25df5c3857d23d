// Gradients of attention. With s = softcap(scale q kᵀ), p = exp(s - lse) and
// delta = Σ grad_out out - grad_lse, one number a row, which attention_delta_kernel makes first:
//
//   ds = p (grad_out vᵀ - delta) (1 - (s / cap)²)
//   grad_q = scale ds k,   grad_k = scale dsᵀ q,   grad_v = pᵀ grad_out
//
// One kernel in two forms. A block owns kRows rows of two tensors, x and y, and walks over the rows
// of two others, u and w, in tiles of kKeys:
//
//   of queries   x = q, y = grad_out, u = k, w = v          makes grad_q from ds u
//   of keys      x = k, y = v, u = q, w = grad_out          makes grad_k from ds u, grad_v from p w
//
// Either way s = x uᵀ and ds leave the tensor cores as the operand of the next product. p and ds
// are made twice, and in return no sum crosses blocks: no atomics, the same bits every time. Rows
// of q and grad_out are (token, query head of one KV head) pairs as in attention.cuh, so that
// grad_k and grad_v are whole.
//
// Warps divide rows and columns as products.cuh says, and exchange partial sums of s and of
// grad_out vᵀ. Barriers a tile: w has landed; u has landed; the partial sums are there; w is free;
// u is free. The copy of the next w runs under ds u, that of u under y wᵀ.
//
// Shared memory: sizeof(BackwardSmem): 2 (kRows + kKeys) rows, 4 KB per warp and 32 keys of partial
// sums, and what is known of each row of u. Bound: shared memory by the static report, of which
// each warp reads u twice and w once or twice; then L2 and issue. Seven products for the forward's
// two.
#pragma once

#include <climits>
#include <type_traits>

#include "../common/launch.h"
#include "../common/reduce.cuh"
#include "cards.h"
#include "epilogue.cuh"
#include "products.cuh"
#include "sequence.cuh"
#include "softmax.cuh"

namespace gemma4 {

// Rows of u and w: where they lie, in elements, at which position they stand, and of queries the
// lse, as a multiple of ln 2, and the delta.
template <int kCount>
struct BackwardRows {
  int64_t u[kCount], w[kCount];
  int position[kCount];
  float lse[kCount], delta[kCount];
};

template <class T, class Tile>
struct BackwardSmem {
  alignas(128) T x[Tile::kRows * Tile::kHeadDim];  // at the end: a result
  alignas(128) T y[Tile::kRows * Tile::kHeadDim];  // the same
  alignas(128) T u[Tile::kKeys * Tile::kHeadDim];
  alignas(128) T w[Tile::kKeys * Tile::kHeadDim];
  ScoreExchange<Tile> score, slope;
  BackwardRows<Tile::kKeys> rows[2];  // of this tile and of the next
};

// Calls f.operator()<Tile>() with the largest tile that fits.
template <class T, class F>
constexpr void with_backward_tile(int head_dim, size_t max_smem_bytes, F&& f) {
  const auto either = [&]<class Large, class Small>() {
    if (sizeof(BackwardSmem<T, Large>) <= max_smem_bytes) return f.template operator()<Large>();
    if (sizeof(BackwardSmem<T, Small>) <= max_smem_bytes) return f.template operator()<Small>();
    throw std::runtime_error("attention_prefill_backward: no tile of head_dim " +
                             std::to_string(head_dim) + " fits in " +
                             std::to_string(max_smem_bytes) + " bytes of shared memory");
  };
  switch (head_dim) {
    case 64:
      return f.template operator()<AttentionTile<64, 64, 64, 1>>();
    case 128:
      return f.template operator()<AttentionTile<128, 64, 32, 1>>();
    case 256:
      return either
          .template operator()<AttentionTile<256, 64, 32, 2>, AttentionTile<256, 64, 16, 2>>();
    case 512:
      return either
          .template operator()<AttentionTile<512, 32, 16, 4>, AttentionTile<512, 16, 16, 4>>();
    default:
      throw std::runtime_error(
          "attention_prefill_backward: there are kernels for head_dim 64, 128, 256 and 512, got " +
          std::to_string(head_dim));
  }
}

// Whether a card that runs this code is ever given this tile.
template <class T, class Tile>
constexpr bool backward_chosen_on_any_card() {
  bool found = false;
  for (const Card& card : kCards)
    with_backward_tile<T>(Tile::kHeadDim, card.max_smem_bytes,
                          [&]<class Chosen>() { found |= std::is_same_v<Chosen, Tile>; });
  return found;
}
template <class T, class Tile>
constexpr bool kBackwardChosenHere = backward_chosen_on_any_card<T, Tile>();

constexpr int kDeltaWarps = 8;

// A warp owns one row of one head. Bound: 4 C bytes of DRAM a row.
template <class T>
__global__ void __launch_bounds__(kDeltaWarps * 32)
    attention_delta_kernel(const __grid_constant__ AttentionBackwardParams p) {
  const AttentionParams& f = p.forward;
  const int64_t row = int64_t{blockIdx.x} * kDeltaWarps + threadIdx.x / 32;
  if (row >= f.tokens * f.q_heads) return;
  float sum = 0.0f;
  for (int c = threadIdx.x % 32 * 8; c < f.head_dim; c += 32 * 8) {
    const auto out = load<8>(static_cast<const T*>(f.out) + row * f.head_dim + c);
    const auto grad = load<8>(static_cast<const T*>(p.grad_out) + row * f.head_dim + c);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += out[j] * grad[j];
  }
  sum = lane_sum(sum);
  const int64_t at = row % f.q_heads * f.tokens + row / f.q_heads;
  if (threadIdx.x % 32 == 0) p.delta[at] = sum - p.grad_lse[at];
}

// Query and key see each other if -right <= query - key < left and the key exists.
struct Window {
  int left, right, keys;

  DEVICE bool hides(int query, int key) const {
    return key - query > right || query - key >= left || key >= keys;
  }
  // Of pairs of a query and a key, the nearest and the farthest decide.
  DEVICE bool hides_some(int q_low, int q_high, int k_low, int k_high) const {
    return k_high - q_low > right || q_high - k_low >= left || k_high >= keys;
  }
};

DEVICE Window window_of(const AttentionParams& f, int keys) {
  return {f.window > 0 ? f.window : INT_MAX, f.window_right >= 0 ? f.window_right : INT_MAX, keys};
}

// The rows of u that one of the block's rows [first, last] sees or is seen by.
template <bool kOfKeys>
DEVICE KeyRange rows_of_u(const AttentionParams& f, const Window& window, const QueryRows& queries,
                          int first, int last) {
  const Sequence& s = queries.s;
  if constexpr (!kOfKeys)
    return {visible_at(f, queries.position(first), s.keys).begin,
            visible_at(f, queries.position(last), s.keys).end};
  int begin = s.first(), end = s.keys;
  if (f.window_right >= 0) begin = max(first - window.right, s.first());
  if (f.window > 0) end = min(last + min(window.left, s.keys), s.keys);
  return {(begin - s.first()) * queries.group.divisor, (end - s.first()) * queries.group.divisor};
}

// Where rows lie, in elements.
template <int kHeadDim>
struct BackwardOffsets {
  const AttentionParams& f;
  const QueryRows& queries;

  DEVICE int64_t q(int row) const {
    return queries.token(row) * f.q_stride + int64_t{queries.head(row)} * f.q_head_stride;
  }
  DEVICE int64_t out(int row) const {
    return (queries.token(row) * f.q_heads + queries.head(row)) * int64_t{kHeadDim};
  }
  // Keys are packed here, neither in pages nor in a ring.
  DEVICE int64_t key(int key) const {
    return (queries.s.k_begin + key) * f.key_strides.inner + queries.g * f.key_strides.head;
  }
  DEVICE int64_t grad_key(int key) const {
    return ((queries.s.k_begin + key) * f.kv_heads + queries.g) * int64_t{kHeadDim};
  }
  DEVICE int64_t lse(int row) const { return queries.head(row) * f.tokens + queries.token(row); }
};

// As a multiple of ln 2; where a row sees no key, p is 0 and not exp(-inf + inf).
DEVICE float log2_sum(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }

// Tiles of u and w, one an iteration; of those beyond the range, nothing is copied.
template <class T, class Tile, bool kOfKeys>
struct BackwardTiles {
  const AttentionBackwardParams& p;
  BackwardSmem<T, Tile>& smem;
  const BackwardOffsets<Tile::kHeadDim>& at;
  KeyRange range;

  DEVICE void load_rows(int iteration, int first_row) const {
    const AttentionParams& f = p.forward;
    const int i = threadIdx.x;
    if (i >= Tile::kKeys) return;
    const int row = min(first_row + i, range.end - 1);
    BackwardRows<Tile::kKeys>& to = smem.rows[iteration % 2];
    if constexpr (kOfKeys) {
      to.u[i] = at.q(row);
      to.w[i] = at.out(row);
      to.position[i] = at.queries.position(row);
      // A row that does not exist has p = 0.
      to.lse[i] = first_row + i < range.end ? log2_sum(f.lse[at.lse(row)]) : INFINITY;
      to.delta[i] = p.delta[at.lse(row)];
    } else {
      to.u[i] = to.w[i] = at.key(row);
      to.position[i] = first_row + i;
    }
  }
  DEVICE void copy_w(int iteration, int first_row) const {
    copy(smem.w, kOfKeys ? p.grad_out : p.forward.v, smem.rows[iteration % 2].w, first_row);
  }
  DEVICE void copy_u(int iteration, int first_row) const {
    copy(smem.u, kOfKeys ? p.forward.q : p.forward.k, smem.rows[iteration % 2].u, first_row);
  }

 private:
  DEVICE void copy(T* tile, const void* base, const int64_t* offset, int first_row) const {
    if (first_row < range.end)
      copy_rows<Tile::kHeadDim, Tile::kKeys, Tile::kThreads>(tile, [&](int row) {
        return SourceRow<T>{static_cast<const T*>(base) + offset[row], first_row + row < range.end};
      });
    ptx::cp_async_commit();
  }
};

// A lane's two rows of the warp's sixteen.
struct OwnRows {
  int position[2];
  float lse[2], delta[2];  // of queries
};

// Makes p of scores and ds of slopes, which are grad_out vᵀ. Each step goes over all of the scores
// in turn, so that a call without it skips it at once.
template <bool kOfKeys, int kKeys>
DEVICE void differentiate(float (&score)[kKeys / 8][4], float (&slope)[kKeys / 8][4],
                          const AttentionParams& f, const BackwardRows<kKeys>& tile,
                          const OwnRows& own, const Window& window, bool masked) {
  const int lane = threadIdx.x % 32;
  const auto each = [&](const auto& step) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        step(score[n][e], slope[n][e], e / 2, n * 8 + lane % 4 * 2 + e % 2);
  };
  each([&](float& x, float& ds, int i, int other) {
    x *= f.scale;
    ds -= kOfKeys ? tile.delta[other] : own.delta[i];
  });
  if (f.softcap > 0) {
    const float inverse_cap = 1.0f / f.softcap;
    each([&](float& x, float& ds, int, int) {
      x = softcap_fast(x, f.softcap);
      ds *= 1.0f - (x * inverse_cap) * (x * inverse_cap);
    });
  }
  if (masked) {
    each([&](float& x, float& ds, int i, int other) {
      const int query = kOfKeys ? tile.position[other] : own.position[i];
      const int key = kOfKeys ? own.position[i] : tile.position[other];
      if (window.hides(query, key)) x = -INFINITY, ds = 0.0f;
    });
  }
  each([&](float& x, float& ds, int i, int other) {
    x = ptx::exp2_approx(x * kLog2e - (kOfKeys ? tile.lse[other] : own.lse[i]));
    ds *= x;
  });
}

// A tile of sums as an operand in 16 bits.
template <class T, int kCount>
DEVICE void pack(uint32_t (&pairs)[kCount][2], const float (&d)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) pairs[n][i] = pack_pair<T>(d[n][2 * i], d[n][2 * i + 1]);
}

template <class T, class Tile, bool kOfKeys>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_backward_kernel(const __grid_constant__ AttentionBackwardParams p) {
  constexpr int kHeadDim = Tile::kHeadDim, kRows = Tile::kRows, kKeys = Tile::kKeys;
  constexpr int kColumns = Tile::kColumns;
  // Chosen wrongly; where it never is, no more code is made than this.
  if (!kBackwardChosenHere<T, Tile>) return ptx::trap();
  auto& smem = shared_memory<BackwardSmem<T, Tile>>();
  const AttentionParams& f = p.forward;
  const int lane = threadIdx.x % 32;

  const int g = blockIdx.y, group = f.group.divisor;
  const RowTile of = row_tile(f.tiles);
  const Sequence s = sequence_at(f, of.b);
  const QueryRows queries{s, g, f.group};
  const BackwardOffsets<kHeadDim> at{f, queries};
  // The last queries and the first keys have the most to do in the causal case: they start first.
  const int first = (kOfKeys ? of.tiles - 1 - of.tile : of.tile) * kRows;
  // From here on; those beyond kRows are others'.
  const int rows = (kOfKeys ? s.keys : s.queries * group) - first;
  if (rows <= 0) return;
  const int last = first + min(rows, kRows) - 1;
  const Window window = window_of(f, s.keys);
  const KeyRange range = rows_of_u<kOfKeys>(f, window, queries, first, last);
  const BackwardTiles<T, Tile, kOfKeys> tiles{p, smem, at, range};

  const auto copy_own = [&](T* tile, const void* base, const auto& offset) {
    copy_rows<kHeadDim, kRows, Tile::kThreads>(tile, [&](int row) {
      return SourceRow<T>{static_cast<const T*>(base) + offset(min(first + row, last)), row < rows};
    });
  };
  OwnRows own{};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = min(first + Tile::row() + lane / 4 + i * 8, last);
    own.position[i] = kOfKeys ? row : queries.position(row);
    if constexpr (!kOfKeys) {
      own.lse[i] = log2_sum(f.lse[at.lse(row)]);
      own.delta[i] = p.delta[at.lse(row)];
    }
  }

  float by_u[kColumns / 8][4] = {}, by_w[kOfKeys ? kColumns / 8 : 1][4] = {};
  if (range.begin < range.end) {
    if constexpr (kOfKeys) {
      copy_own(smem.x, f.k, [&](int key) { return at.key(key); });
      copy_own(smem.y, f.v, [&](int key) { return at.key(key); });
    } else {
      copy_own(smem.x, f.q, [&](int row) { return at.q(row); });
      copy_own(smem.y, p.grad_out, [&](int row) { return at.out(row); });
    }
    tiles.load_rows(0, range.begin);
    __syncthreads();
    tiles.copy_w(0, range.begin);
    tiles.copy_u(0, range.begin);
  }

  for (int row = range.begin, iteration = 0; row < range.end; row += kKeys, iteration++) {
    ptx::cp_async_wait<1>();
    __syncthreads();
    tiles.load_rows(iteration + 1, row + kKeys);
    float slope[kKeys / 8][4] = {}, score[kKeys / 8][4] = {};
    multiply<Tile>(slope, smem.y, smem.w);
    ptx::cp_async_wait<0>();
    __syncthreads();
    multiply<Tile>(score, smem.x, smem.u);
    smem.slope.store_partial(slope);
    smem.score.store_partial(score);
    if constexpr (Tile::kColumnWarps > 1) __syncthreads();
    smem.slope.reduce(slope);
    smem.score.reduce(score);

    const BackwardRows<kKeys>& tile = smem.rows[iteration % 2];
    const int q_low = kOfKeys ? tile.position[0] : queries.position(first);
    const int q_high = kOfKeys ? tile.position[kKeys - 1] : queries.position(last);
    const int k_low = kOfKeys ? first : row, k_high = kOfKeys ? last : row + kKeys - 1;
    const bool masked = window.hides_some(q_low, q_high, k_low, k_high);
    differentiate<kOfKeys>(score, slope, f, tile, own, window, masked);
    uint32_t p_pairs[kKeys / 8][2], ds_pairs[kKeys / 8][2];
    pack<T>(p_pairs, score);
    pack<T>(ds_pairs, slope);

    if constexpr (kOfKeys) {
      accumulate<Tile>(by_w, p_pairs, smem.w);
      __syncthreads();
    }
    tiles.copy_w(iteration + 1, row + kKeys);
    accumulate<Tile>(by_u, ds_pairs, smem.u);
    __syncthreads();
    tiles.copy_u(iteration + 1, row + kKeys);
  }
  ptx::cp_async_wait<0>();

  const auto store = [&](T* tile, const float (&d)[kColumns / 8][4], float factor, void* to) {
    store_rows<Tile>(tile, d, {factor, factor}, rows, [&](int row) {
      return static_cast<T*>(to) + (kOfKeys ? at.grad_key(first + row) : at.out(first + row));
    });
  };
  store(smem.x, by_u, f.scale, kOfKeys ? p.grad_k : p.grad_q);
  if constexpr (kOfKeys) store(smem.y, by_w, 1.0f, p.grad_v);
}

}  // namespace gemma4
