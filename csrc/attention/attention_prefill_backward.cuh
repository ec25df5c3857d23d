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
// Warps divide rows and columns as attention_warp.cuh says, and exchange partial sums of s and of
// grad_out vᵀ. Barriers a tile: w has landed; u has landed; the partial sums are there; w is free;
// u is free. The copy of the next w runs under ds u, that of u under y wᵀ.
//
// Shared memory: sizeof(BackwardSmem): 2 (kRows + kKeys) rows, 4 KB per warp and 32 keys of partial
// sums, and what is known of each row of u. Bound: shared memory by the static report, of which
// each warp reads u twice and w once or twice; then L2 and issue. Seven products for the forward's
// two.
#pragma once

#include <climits>

#include "../common/reduce.cuh"
#include "attention.cuh"

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

template <class T, class Tile, bool kOfKeys>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_backward_kernel(const __grid_constant__ AttentionBackwardParams p) {
  constexpr int kHeadDim = Tile::kHeadDim, kRows = Tile::kRows, kKeys = Tile::kKeys;
  constexpr int kColumns = Tile::kColumns;
  auto& smem = shared_memory<BackwardSmem<T, Tile>>();
  const AttentionParams& f = p.forward;
  const int lane = threadIdx.x % 32;

  const int g = blockIdx.y, group = f.q_heads / f.kv_heads;
  const RowTile of = row_tile(kOfKeys ? p.max_seqlen_k : f.max_seqlen_q * group, kRows);
  const int b = of.b;
  const Sequence s = sequence_at(f, b);
  const int q_rows = s.queries * group;
  // The last queries and the first keys have the most to do in the causal case: they start first.
  const int first = (kOfKeys ? of.tiles - 1 - of.tile : of.tile) * kRows;
  const int rows = (kOfKeys ? s.keys : q_rows) - first;  // those beyond kRows are others'
  if (rows <= 0) return;
  const int last = first + min(rows, kRows) - 1;

  const auto position = [&](int q_row) { return s.first() + q_row / group; };
  const int left = f.window > 0 ? f.window : INT_MAX;  // visible: -right <= query - key < left
  const int right = f.window_right >= 0 ? f.window_right : INT_MAX;
  // The rows of u that one of the block's rows sees or is seen by.
  KeyRange range;
  if constexpr (kOfKeys) {
    const int least = f.window_right >= 0 ? max(first - right, s.first()) : s.first();
    const int most = f.window > 0 ? min(last + min(left, s.keys) - 1, s.keys - 1) : s.keys - 1;
    range = {(least - s.first()) * group, (most - s.first() + 1) * group};
  } else {
    range = {visible_at(f, position(first), s.keys).begin,
             visible_at(f, position(last), s.keys).end};
  }

  const auto token_of = [&](int q_row) { return s.q_begin + q_row / group; };
  const auto head_of = [&](int q_row) { return g * group + q_row % group; };
  const auto q_at = [&](int row) {
    return token_of(row) * f.q_stride + int64_t{head_of(row)} * f.q_head_stride;
  };
  const auto out_at = [&](int row) {
    return (token_of(row) * f.q_heads + head_of(row)) * int64_t{kHeadDim};
  };
  // Keys are packed here, neither in pages nor in a ring.
  const auto key_at = [&](int key) {
    return (s.k_begin + key) * f.key_strides.inner + g * f.key_strides.head;
  };
  const auto lse_at = [&](int row) { return head_of(row) * f.tokens + token_of(row); };
  // As a multiple of ln 2; where a row sees no key, p is 0 and not exp(-inf + inf).
  const auto log2_sum = [&](int row) {
    const float lse = f.lse[lse_at(row)];
    return lse == -INFINITY ? INFINITY : lse * kLog2e;
  };

  const auto place_rows = [&](int turn, int first_row) {
    const int i = threadIdx.x;
    if (i >= kKeys) return;
    const int row = min(first_row + i, range.end - 1);
    BackwardRows<kKeys>& to = smem.rows[turn % 2];
    if constexpr (kOfKeys) {
      to.u[i] = q_at(row);
      to.w[i] = out_at(row);
      to.position[i] = position(row);
      // A row that does not exist has p = 0.
      to.lse[i] = first_row + i < range.end ? log2_sum(row) : INFINITY;
      to.delta[i] = p.delta[lse_at(row)];
    } else {
      to.u[i] = to.w[i] = key_at(row);
      to.position[i] = first_row + i;
    }
  };
  const auto copy_own = [&](T* tile, const void* base, const auto& offset) {
    copy_rows<kHeadDim, kRows, Tile::kThreads>(tile, [&](int row) {
      return SourceRow<T>{static_cast<const T*>(base) + offset(min(first + row, last)), row < rows};
    });
  };
  const auto copy_tile = [&](T* tile, const void* base, const int64_t* offset, int first_row) {
    if (first_row < range.end)
      copy_rows<kHeadDim, kKeys, Tile::kThreads>(tile, [&](int row) {
        return SourceRow<T>{static_cast<const T*>(base) + offset[row], first_row + row < range.end};
      });
    ptx::cp_async_commit();
  };
  const auto copy_w = [&](int turn, int first_row) {
    copy_tile(smem.w, kOfKeys ? p.grad_out : f.v, smem.rows[turn % 2].w, first_row);
  };
  const auto copy_u = [&](int turn, int first_row) {
    copy_tile(smem.u, kOfKeys ? f.q : f.k, smem.rows[turn % 2].u, first_row);
  };

  const float inverse_cap = 1.0f / f.softcap;

  // Each lane keeps two rows of the warp's sixteen.
  int own_position[2];
  float own_lse[2] = {}, own_delta[2] = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = min(first + Tile::row() + lane / 4 + i * 8, last);
    own_position[i] = kOfKeys ? row : position(row);
    if constexpr (!kOfKeys) {
      own_lse[i] = log2_sum(row);
      own_delta[i] = p.delta[lse_at(row)];
    }
  }

  float by_u[kColumns / 8][4] = {}, by_w[kOfKeys ? kColumns / 8 : 1][4] = {};
  if (range.begin < range.end) {
    if constexpr (kOfKeys) {
      copy_own(smem.x, f.k, key_at);
      copy_own(smem.y, f.v, key_at);
    } else {
      copy_own(smem.x, f.q, q_at);
      copy_own(smem.y, p.grad_out, out_at);
    }
    place_rows(0, range.begin);
    __syncthreads();
    copy_w(0, range.begin);
    copy_u(0, range.begin);
  }

  for (int row = range.begin, turn = 0; row < range.end; row += kKeys, turn++) {
    ptx::cp_async_wait<1>();
    __syncthreads();
    place_rows(turn + 1, row + kKeys);
    float slope[kKeys / 8][4] = {}, score[kKeys / 8][4] = {};
    multiply<Tile>(slope, smem.y, smem.w);
    ptx::cp_async_wait<0>();
    __syncthreads();
    multiply<Tile>(score, smem.x, smem.u);
    smem.slope.put(slope);
    smem.score.put(score);
    if constexpr (Tile::kColumnWarps > 1) __syncthreads();
    smem.slope.total(slope);
    smem.score.total(score);

    // Pairs of a query and a key, of which the nearest and the farthest decide whether all are
    // seen.
    const BackwardRows<kKeys>& tile = smem.rows[turn % 2];
    const int q_low = kOfKeys ? tile.position[0] : position(first);
    const int q_high = kOfKeys ? tile.position[kKeys - 1] : position(last);
    const int k_low = kOfKeys ? first : row, k_high = kOfKeys ? last : row + kKeys - 1;
    const bool masked = k_high - q_low > right || q_high - k_low >= left || k_high >= s.keys;
    // Each step over all of the scores in turn, so that a call without it skips it at once.
    const auto each = [&](const auto& step) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          step(score[n][e], slope[n][e], e / 2, n * 8 + lane % 4 * 2 + e % 2);
    };
    each([&](float& x, float& ds, int i, int other) {
      x *= f.scale;
      ds -= kOfKeys ? tile.delta[other] : own_delta[i];
    });
    if (f.softcap > 0) {
      each([&](float& x, float& ds, int, int) {
        x = softcap_fast(x, f.softcap);
        ds *= 1.0f - (x * inverse_cap) * (x * inverse_cap);
      });
    }
    if (masked) {
      each([&](float& x, float& ds, int i, int other) {
        const int query = kOfKeys ? tile.position[other] : own_position[i];
        const int key = kOfKeys ? own_position[i] : tile.position[other];
        if (key - query > right || query - key >= left || key >= s.keys) x = -INFINITY, ds = 0.0f;
      });
    }
    uint32_t p_pairs[kKeys / 8][2], ds_pairs[kKeys / 8][2];
    each([&](float& x, float& ds, int i, int other) {
      x = ptx::exp2_approx(x * kLog2e - (kOfKeys ? tile.lse[other] : own_lse[i]));
      ds *= x;
    });
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        p_pairs[n][i] = pack_pair<T>(score[n][2 * i], score[n][2 * i + 1]);
        ds_pairs[n][i] = pack_pair<T>(slope[n][2 * i], slope[n][2 * i + 1]);
      }

    if constexpr (kOfKeys) {
      accumulate<Tile>(by_w, p_pairs, smem.w);
      __syncthreads();
    }
    copy_w(turn + 1, row + kKeys);
    accumulate<Tile>(by_u, ds_pairs, smem.u);
    __syncthreads();
    copy_u(turn + 1, row + kKeys);
  }
  ptx::cp_async_wait<0>();

  const auto write = [&](T* tile, const float (&d)[kColumns / 8][4], float factor, void* to) {
    write_rows<Tile>(tile, d, {factor, factor}, rows, [&](int row) {
      const int64_t at = kOfKeys ? ((s.k_begin + first + row) * f.kv_heads + g) * int64_t{kHeadDim}
                                 : out_at(first + row);
      return static_cast<T*>(to) + at;
    });
  };
  write(smem.x, by_u, f.scale, kOfKeys ? p.grad_k : p.grad_q);
  if constexpr (kOfKeys) write(smem.y, by_w, 1.0f, p.grad_v);
}

}  // namespace gemma4
