"""Faults put into copies of the kernels, each of which the kernel's own tests must catch.

A fault that survives is a missing test. One table takes this file past 400 lines.
"""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import emulated
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not emulated.has_compiler(), reason="no C++ compiler to build the faulty kernels with"
    ),
]

BACKWARD = "attention/attention_prefill_backward.cuh"
FAULTS = {  # op: (file, what stands there, what to write instead)
    "rms_norm": [
        ("norm/rms_norm.cuh", "/ p.width + p.eps);\n\n", "/ p.width);\n\n"),
        ("norm/rms_norm.cuh", "x[i][j] * scale * (p.weight", "x[i][j] * scale * (!p.weight"),
        ("norm/rms_norm.cuh", "row * p.x_stride;\n    T* y_row", "row * p.width;\n    T* y_row"),
        (
            "norm/rms_norm.cuh",
            "row < p.rows; row += gridDim.x) {\n    const T* x_row",
            "row + 1 < p.rows; row += gridDim.x) {\n    const T* x_row",
        ),
        (
            "norm/rms_norm.cuh",
            "block_sum(sum, smem, turn++) / p.width + p.eps);\n\n",
            "block_sum(sum, smem, 0) / p.width + p.eps);\n\n",
        ),
        (
            "norm/rms_norm.cuh",
            "if (column(i) >= p.width) continue;\n      Vec<T, kWidth> y;",
            "Vec<T, kWidth> y;",
        ),
        (
            "norm/rms_norm.cuh",
            "i < p.width; i += blockDim.x) sum +=",
            "i < p.width - 1; i += blockDim.x) sum +=",
        ),
        ("common/reduce.cuh", "  __syncthreads();\n", ""),
        ("common/reduce.cuh", "step = kLanes / 2; step > 0", "step = kLanes / 2; step > 1"),
        ("common/reduce.cuh", "lane < warps ? partial[lane] : 0.0f", "partial[lane]"),
        (
            "norm/row_plan.h",
            "round_up(ceil_div(pieces_in_row, plan.pieces), kWarpSize)",
            "pieces_in_row / plan.pieces / kWarpSize * kWarpSize + kWarpSize / 2",
        ),
        ("common/launch.h", "row_stride % kWidth == 0 &&", "true &&"),
    ],
    "add_rms_norm": [
        ("norm/add_rms_norm.cuh", "post_weight[i][j]) * layer_scale", "post_weight[i][j])"),
        (
            "norm/add_rms_norm.cuh",
            "(residual[i][j] + x[i][j] * post_scale",
            "(residual[i][j] * layer_scale + x[i][j] * post_scale",
        ),
        (
            "norm/add_rms_norm.cuh",
            "sum += sum_of_squares<kWidth>(residual[i]);",
            "sum += sum_of_squares<kWidth>(x[i]);",
        ),
        ("norm/add_rms_norm.cuh", "    sum = 0.0f;\n#pragma", "#pragma"),
        (
            "norm/add_rms_norm.cuh",
            "residual[i][j] * next_scale * next_weight[i][j]",
            "residual[i][j] * next_scale * post_weight[i][j]",
        ),
        (
            "norm/add_rms_norm.cuh",
            "row * p.residual_stride;\n    Vec",
            "row * p.x_stride;\n    Vec",
        ),
        (
            "norm/add_rms_norm.cuh",
            "const float post_scale = 1.0f / sqrtf(block_sum(sum, smem, turn++)",
            "const float post_scale = 1.0f / sqrtf(block_sum(sum, smem, turn)",
        ),
        (
            "norm/add_rms_norm.cuh",
            "    if (!p.y) continue;\n    const float next_scale",
            "    const float next_scale",
        ),
    ],
    "moe_norm": [
        ("norm/moe_norm.cuh", "x[i][j] * norm * weight[i][j]", "x[i][j] * norm * scale[i][j]"),
        ("norm/moe_norm.cuh", "router_x[j] * p.factor", "router_x[j] / p.factor"),
        (
            "norm/moe_norm.cuh",
            "        router_x.set(j, x[i][j] * norm);\n"
            "        router_x.set(j, router_x[j] * scale[i][j]);\n",
            "        router_x.set(j, x[i][j] * norm * scale[i][j]);\n",
        ),
        ("norm/moe_norm.cuh", "rounded(rounded(n) * ", "rounded(n * "),
        ("norm/moe_norm.cuh", "/ p.width + p.eps);\n\n", "/ p.width);\n\n"),
        ("norm/moe_norm.cuh", "row * p.x_stride;\n    Vec", "row * p.width;\n    Vec"),
        (
            "norm/moe_norm.cuh",
            "block_sum(sum, smem, turn++) / p.width + p.eps);\n\n",
            "block_sum(sum, smem, turn) / p.width + p.eps);\n\n",
        ),
        ("norm/moe_norm.cu", "{p.weight, p.scale,", "{p.weight,"),
    ],
    "qkv_norm_rope": [
        (
            "norm/qkv_norm_rope.cuh",
            "x * cos[i][j] - y * sin[i][j]",
            "x * cos[i][j] + y * sin[i][j]",
        ),
        (
            "norm/qkv_norm_rope.cuh",
            "constexpr int kWidth = Lanes::kWidth, kPieces = Lanes::kPieces, kHalf = kHeadDim / 2;",
            "constexpr int kWidth = Lanes::kWidth, kPieces = Lanes::kPieces, kHalf = kHeadDim / 4;",
        ),
        ("norm/qkv_norm_rope.cuh", "lane_sum<Lanes::kLanes>(sum)", "lane_sum(sum)"),
        ("norm/qkv_norm_rope.cuh", "/ kHeadDim + p.eps", "/ kHalf + p.eps"),
        ("norm/qkv_norm_rope.cuh", "raw_a.set(j, a[i][j] * scale);", "raw_a.set(j, a[i][j]);"),
        (
            "norm/qkv_norm_rope.cuh",
            "b[i][j] * scale * weight_b[j]",
            "b[i][j] * scale * weight_a[j]",
        ),
        ("norm/qkv_norm_rope.cuh", "if (is_v) h -= p.kv_heads;", ""),
        (
            "norm/qkv_norm_rope.cuh",
            "static_cast<const T*>(p.k_weight), kept",
            "static_cast<const T*>(p.q_weight), kept",
        ),
        (
            "norm/qkv_norm_rope.cuh",
            "token * p.q_stride + h * p.q_head_stride",
            "token * p.q_head_stride * p.q_heads + h * p.q_head_stride",
        ),
        (
            "norm/qkv_norm_rope.cuh",
            "const bool has_head = first + group < num_heads(p);",
            "const bool has_head = first + group < num_heads(p) - 1;",
        ),
        ("common/math.cuh", "  r = fmaf(-quarters, -4.37113900018624283e-8f, r);\n", ""),
        ("common/math.cuh", "if ((quadrant + 1) & 2) cos = -cos;", "if (quadrant & 2) cos = -cos;"),
    ],
    "qkv_norm_rope_cache": [
        ("norm/qkv_norm_rope.cuh", "slot >= 0 && slot < p.num_slots", "slot < p.num_slots"),
        (
            "norm/qkv_norm_rope.cuh",
            "p.slots.data ? index_at(p.slots, token) : token;\n    float sin",
            "token;\n    float sin",
        ),
        ("norm/qkv_norm_rope.cuh", "(slot * p.kv_heads + h) * p.head_dim", "slot * p.head_dim"),
        ("common/indices.cuh", "indices.is_64 ?", "!indices.is_64 ?"),
        ("norm/qkv_norm_rope.cuh", "slot >= 0 && slot < p.num_slots", "slot >= 0"),
    ],
    "geglu": [
        ("linear/geglu.cuh", "load_once<kWidth>(gate_up + p.width)", "load_once<kWidth>(gate_up)"),
        ("linear/geglu.cuh", "gelu_tanh(gate[j]) * up[j]", "gate[j] * gelu_tanh(up[j])"),
        ("linear/geglu.cuh", "if (column >= p.width) return;", ""),
        ("linear/geglu.cuh", "row * p.stride + column", "row * p.width * 2 + column"),
        ("common/math.cuh", "0.044715f * x * x * x", "0.044715f * x * x"),
        ("common/math.cuh", "expf(-2.0f * u)", "expf(-u)"),
        ("linear/geglu.cuh", "row += gridDim.y * blockDim.y", "row += gridDim.y"),
    ],
    "ple_gate": [
        ("ple/ple_gate.cuh", "row * p.ple_stride", "row * p.gate_stride"),
        ("ple/ple_gate.cuh", "gelu_tanh(gate[j]) * ple[j]", "gate[j] * ple[j]"),
        ("ple/ple_gate.cuh", "if (column >= p.width) return;", ""),
        ("ple/ple_gate.cuh", "row * p.width + column, y", "row * p.gate_stride + column, y"),
        ("ple/ple_gate.cu", "in_pieces_of_16<T>(p.ple, p.ple_stride, p.width) &&", ""),
    ],
    "ple_embed": [
        ("ple/ple_embed.cuh", "id >= 0 && id < p.vocabulary", "id >= 0 && id <= p.vocabulary"),
        ("ple/ple_embed.cuh", "id >= 0 && id < p.vocabulary", "id < p.vocabulary"),
        (
            "ple/ple_embed.cuh",
            "row[i][j] * p.token_scale) * kInverseRoot2",
            "row[i][j]) * kInverseRoot2",
        ),
        (
            "ple/ple_embed.cuh",
            "row[i][j] * p.token_scale) * kInverseRoot2",
            "row[i][j] * p.token_scale)",
        ),
        (
            "ple/ple_embed.cuh",
            "(lane_sum(sum) / p.width + p.eps);\n#pragma",
            "(lane_sum(sum) / p.width);\n#pragma",
        ),
        (
            "ple/ple_embed.cuh",
            "int64_t{layer} * p.width;\n      const T* table",
            "0;\n      const T* table",
        ),
        (
            "ple/ple_embed.cuh",
            "token * p.projected_stride + offset;\n      T* y = static_cast<T*>(p.y) "
            "+ (token * p.layers + layer) * p.width;\n      Vec",
            "token * p.table_stride + offset;\n      T* y = static_cast<T*>(p.y) "
            "+ (token * p.layers + layer) * p.width;\n      Vec",
        ),
        ("ple/ple_embed.cuh", "(piece * 32 + lane) * kWidth", "(piece * 16 + lane) * kWidth"),
    ],
    "softcap": [
        ("common/math.cuh", "cap * tanhf(x / cap)", "tanhf(x / cap)"),
        ("common/math.cuh", "cap * tanhf(x / cap)", "cap * tanhf(cap * tanhf(x / cap) / cap)"),
        ("linear/softcap.cuh", "row * p.stride + column", "row * p.width + column"),
        ("linear/softcap.cuh", "if (column >= p.width) return;", ""),
        (
            "linear/softcap.cu",
            "in_pieces ? p.width / kFullWidth<T> : p.width",
            "p.width / kFullWidth<T>",
        ),
    ],
    "softcap_argmax": [
        (
            "common/order.cuh",
            "<< 32 | ~static_cast<unsigned>(index)",
            "<< 32 | static_cast<unsigned>(index)",
        ),
        (
            "common/order.cuh",
            "bits >> 31 ? ~bits : bits | 0x80000000u",
            "bits | 0x80000000u",
        ),
        (
            "common/order.cuh",
            "if (value != value) bits = 0xffffffffu;",
            "if (value != value) bits = 0;",
        ),
        ("linear/softcap_argmax.cuh", "  __syncthreads();\n", ""),
        ("linear/softcap_argmax.cuh", "step = 16; step > 0", "step = 8; step > 0"),
        ("linear/softcap_argmax.cuh", "column + j)", "column)"),
        ("linear/softcap_argmax.cu", "clear(device, p.index, p.rows * sizeof(int64_t));", ""),
        ("linear/softcap_argmax.cuh", "warp < blockDim.x / 32; warp++", "warp < 2; warp++"),
    ],
    "attention_prefill": [
        (
            "attention/attention.cuh",
            "    ptx::cp_async_wait<0>();\n    __syncthreads();\n    copy_rows",
            "    ptx::cp_async_wait<0>();\n    copy_rows",
        ),
        (
            "attention/attention.cuh",
            "    ptx::cp_async_wait<0>();\n    __syncthreads();\n    copy_rows",
            "    ptx::cp_async_wait<1>();\n    __syncthreads();\n    copy_rows",
        ),
        (
            "attention/attention.cuh",
            "    __syncthreads();\n    if (key + kKeys < keys.end)",
            "    if (key + kKeys < keys.end)",
        ),
        (
            "attention/attention.cuh",
            "    ptx::cp_async_wait<1>();\n    __syncthreads();\n",
            "    ptx::cp_async_wait<1>();\n",
        ),
        (
            "attention/attention.cuh",
            "    ptx::cp_async_wait<1>();\n    __syncthreads();\n",
            "    ptx::cp_async_wait<2>();\n    __syncthreads();\n",
        ),
        ("attention/attention.cuh", "      sum[i] *= decay[i];\n", ""),
        ("attention/attention.cuh", "out[n][e] *= decay[e / 2];", "out[n][e] *= 1.0f;"),
        ("attention/attention.cuh", "i - p.window + 1)", "i - p.window)"),
        ("attention/attention.cuh", "i + p.window_right + 1)", "i + p.window_right)"),
        ("attention/attention.cuh", "j >= visible[e / 2].end", "j > visible[e / 2].end"),
        ("attention/attention.cuh", "key < by_all.begin || ", ""),
        (
            "attention/attention.cuh",
            "(first_row + row) % group;\n    const auto* from",
            "(first_row + row) / group;\n    const auto* from",
        ),
        (
            "attention/attention.cuh",
            "__shfl_xor_sync(0xffffffffu, new_highest, 2)",
            "__shfl_xor_sync(0xffffffffu, new_highest, 1)",
        ),
        (
            "attention/attention.cuh",
            "for (int w = 1; w < kColumnWarps; w++)",
            "for (int w = 2; w < kColumnWarps; w++)",
        ),
        (
            "attention/attention.cuh",
            "min(first_key + static_cast<int>(threadIdx.x), keys.end - 1)",
            "first_key + static_cast<int>(threadIdx.x)",
        ),
        (
            "attention/attention.cuh",
            "place_keys(turn + 1, key + kKeys);",
            "place_keys(turn, key + kKeys);",
        ),
        (
            "attention/attention.cuh",
            "    place_keys(0, keys.begin);\n    __syncthreads();\n",
            "    place_keys(0, keys.begin);\n",
        ),
        (
            "attention/attention.cuh",
            "decay[0] != 1.0f || decay[1] != 1.0f",
            "decay[0] != 1.0f",
        ),
    ],
    "attention_prefill_backward": [
        (
            BACKWARD,
            "ptx::cp_async_wait<1>();\n    __syncthreads();\n",
            "ptx::cp_async_wait<1>();\n",
        ),
        (
            BACKWARD,
            "ptx::cp_async_wait<1>();\n    __syncthreads();\n",
            "ptx::cp_async_wait<2>();\n    __syncthreads();\n",
        ),
        (
            BACKWARD,
            "ptx::cp_async_wait<0>();\n    __syncthreads();\n",
            "ptx::cp_async_wait<0>();\n",
        ),
        (
            BACKWARD,
            "ptx::cp_async_wait<0>();\n    __syncthreads();\n",
            "ptx::cp_async_wait<1>();\n    __syncthreads();\n",
        ),
        (BACKWARD, "  __syncthreads();\n  const int first_warp", "  const int first_warp"),
        (BACKWARD, "p_pairs, smem.w);\n      __syncthreads();\n", "p_pairs, smem.w);\n"),
        (BACKWARD, "ds_pairs, smem.u);\n    __syncthreads();\n", "ds_pairs, smem.u);\n"),
        (BACKWARD, "__syncwarp();\n    constexpr int kChunks", "constexpr int kChunks"),
        (BACKWARD, "[2 * i + e] - delta)", "[2 * i + e])"),
        (BACKWARD, "sum - p.grad_lse[at]", "sum"),
        (BACKWARD, "factor = 1.0f - (x", "factor = 1.0f + (x"),
        (BACKWARD, "by_u, f.scale,", "by_u, 1.0f,"),
        (BACKWARD, "key - query > right", "key - query >= right"),
        (BACKWARD, "query - key >= left", "query - key > left"),
        (BACKWARD, "q_high - k_low >= left", "q_high - k_low > left"),
        (BACKWARD, "k_high - q_low > right", "k_high - q_low - 1 > right"),
        (BACKWARD, "|| k_high >= s.keys;", ";"),
        (BACKWARD, "first_row + i < range.end ? f.lse", "true ? f.lse"),
        (BACKWARD, "g * group + q_row % group", "q_row % group"),
        (BACKWARD, "(most - s.first() + 1) * group", "(most - s.first()) * group"),
        (BACKWARD, "min(last + min(left", "min(first + min(left"),
        (BACKWARD, "max(first - right, s.first())", "max(last - right, s.first())"),
        (BACKWARD, "smem.partial[first_warp + w]", "smem.partial[w]"),
        (BACKWARD, ": own_delta[i]", ": own_delta[0]"),
        (BACKWARD, "smem.rows[turn % 2].u, first_row", "smem.rows[turn % 2].w, first_row"),
        (BACKWARD, "place_rows(turn + 1, row + kKeys);", "place_rows(turn + 1, row);"),
        (
            "attention/attention_prefill_backward.cu",
            "clear(device, p.grad_k,",
            "(void)sizeof(p.grad_k,",
        ),
    ],
    "attention_decode": [
        ("attention/attention.cuh", "key / p.page_size)", "key / p.page_size + 1)"),
        ("attention/attention.cuh", "inner = key % p.page_size;", "inner = key;"),
        ("attention/attention.cuh", "inner = key % p.ring;", "inner = (key + 1) % p.ring;"),
        ("attention/attention.cuh", "all.begin + split * size", "all.begin + split * (size - 1)"),
        ("attention/attention.cuh", "(even + 63) / 64 * 64", "even / 64 * 64"),
        ("attention/attention.cuh", "row >= rows || sum[i] == 0.0f", "sum[i] == 0.0f"),
        ("attention/attention.cuh", "log2f(sum[i])) * kLn2", "log2f(sum[i]))"),
        (
            "attention/attention.cuh",
            "int first() const { return keys - queries; }",
            "int first() const { return keys - 1; }",
        ),
        ("attention/attention_merge.cuh", "expf(lse - highest)", "expf(lse)"),
        ("attention/attention_merge.cuh", "    if (lse == -INFINITY) continue;\n", ""),
        (
            "attention/attention_merge.cuh",
            "split = 0; split < p.splits; split++) {",
            "split = 1; split < p.splits; split++) {",
        ),
        ("attention/attention_merge.cuh", "highest + logf(total)", "highest"),
        (
            "attention/attention.cuh",
            "p.q_heads + head) * p.lse_head_stride + query] = lse;",
            "p.q_heads + head) * p.lse_head_stride] = lse;",
        ),
    ],
    "moe_route": [
        ("moe/moe_route.cuh", "      if (candidate[i] == best) candidate[i] = 0;", "      {}"),
        ("moe/moe_route.cuh", "weight / sum", "weight"),
        ("moe/moe_route.cuh", "float_at(p.scale, expert)", "float_at(p.scale, lane)"),
        ("moe/moe_route.cuh", "token * p.stride", "token * p.num_experts"),
        ("moe/moe_route.cuh", "e < p.num_experts ?", "e <= p.num_experts ?"),
        ("moe/moe_route.cuh", "value_of(best) - highest", "value_of(best)"),
        (
            "common/indices.cuh",
            "floats.dtype == DType::kBFloat16",
            "floats.dtype == DType::kFloat16",
        ),
        ("common/order.cuh", "bits & 0x7fffffffu : ~bits", "bits & 0x7fffffffu : bits"),
    ],
    "moe_experts": [
        ("moe/moe_sort.cuh", "  __syncthreads();\n", ""),
        ("moe/moe_sort.cuh", "lane < warp ? others", "lane <= warp ? others"),
        ("moe/moe_sort.cuh", "found & ((1u << lane) - 1)", "found & ((2u << lane) - 1)"),
        (
            "moe/moe_sort.cuh",
            "p.offsets[expert + 1] = offset + total",
            "p.offsets[expert + 1] = offset",
        ),
        ("moe/moe_sort.cuh", "if (lane >= step) through", "through"),
        ("moe/moe_sort.cuh", "    n -= __shfl_sync(0xffffffffu, through, 31);\n", ""),
        (
            "moe/moe_sort.cuh",
            "min(most_rows, __shfl_sync(0xffffffffu, end, owner) - from)",
            "most_rows",
        ),
        ("moe/moe_sort.cuh", "? touched : touched + all / most_rows", "? touched : touched"),
        ("moe/moe_stream.cuh", "const bool low = column < p.width && row", "const bool low = row"),
        (
            "moe/moe_stream.cuh",
            "gate_row + int64_t{p.hidden_width} * p.width;",
            "gate_row + int64_t{p.hidden_width - 1} * p.width;",
        ),
        ("moe/moe_stream.cuh", "token.x, token.y HERE", "token.y, token.x HERE"),
        ("moe/moe_stream.cuh", "__syncthreads();\n  if (warp < kBlocks)", "if (warp < kBlocks)"),
        ("moe/moe_stream.cuh", "  }\n  __syncthreads();\n  const int i", "  }\n  const int i"),
        ("moe/moe_stream.cuh", "w < kStreamWarps; w++", "w < kStreamWarps - 1; w++"),
        ("moe/moe_stream.cuh", "(row ^ token / 4 % 2 * 8)", "row"),
        ("moe/moe_stream.cuh", "first += kStreamWarps * kStreamColumns", "first += kStreamColumns"),
        ("moe/moe_stream.cuh", "p.order[tile.begin + i] / p.k", "p.order[tile.begin + i]"),
        ("moe/moe_stream.cuh", "for (int t = warp;;", "for (int t = warp + 1;;"),
        (
            "moe/moe_stream.cuh",
            "  __syncthreads();\n\n  for (int i = threadIdx.x; i < 2",
            "\n  for (int i = threadIdx.x; i < 2",
        ),
        (
            "moe/moe_stream.cuh",
            "const float weight = float_at(p.weights, a);",
            "const float weight = float_at(p.weights, token);",
        ),
        ("moe/moe_stream.cuh", "expert < 0 || expert >= p.num_experts", "expert < 0"),
        ("moe/moe_tiles.cuh", "row < kOutColumns ? 0 : p.hidden_width", "0"),
        ("moe/moe_tiles.cuh", "gelu_tanh(low) * sum[i][n + 8]", "gelu_tanh(low) * sum[i][n + 7]"),
        ("moe/moe_tiles.cuh", "cp_async_wait<kTileStages - 2>", "cp_async_wait<kTileStages - 1>"),
        (
            "moe/moe_tiles.cuh",
            "    __syncthreads();\n    if (step + kTileStages",
            "    if (step + kTileStages",
        ),
        ("moe/moe_tiles.cuh", "  __syncthreads();\n\n  const T* x", "  const T* x"),
        ("moe/moe_tiles.cuh", "cp_async_wait<0>();\n  __syncthreads();", "cp_async_wait<0>();"),
        ("moe/moe_tiles.cuh", "width - first);\n    copy_rows", "kTileColumns);\n    copy_rows"),
        (
            "moe/moe_tiles.cuh",
            "tile.begin + row : p.order[tile.begin + row]",
            "tile.begin + row : tile.begin + row",
        ),
        ("moe/moe_tiles.cuh", "expert < 0 || expert >= p.num_experts", "expert < 0"),
        (
            "moe/moe_tiles.cuh",
            "blockIdx.x % column_tiles * kOutColumns",
            "blockIdx.x / column_tiles * kOutColumns",
        ),
        (
            "moe/moe_tiles.cuh",
            "    if (ptx::has_wgmma()) ptx::fence_async_proxy();\n",
            "",
        ),
        ("moe/moe_tiles.cuh", "ptx::wgmma_wait<0>();", "ptx::wgmma_wait<1>();"),
        ("moe/moe_tiles.cuh", "weight + column / 8);", "weight + column / 16);"),
        ("moe/moe_tiles.cuh", "(i * 64 * kTileColumns + column) / 8", "column / 8"),
        ("moe/moe_tiles.cuh", "if (rows > 64)", "if (rows > 128)"),
    ],
}
CASES = [(op, n) for op, faults in FAULTS.items() for n in range(len(faults))]


def build(op, n, folder):
    """The kernels with one op's fault put in."""
    path, old, new = FAULTS[op][n]
    csrc = folder / "csrc"
    shutil.copytree(emulated.CSRC, csrc)
    text = (csrc / path).read_text()
    assert old in text, f"{path} no longer says {old!r}"
    (csrc / path).write_text(text.replace(old, new, 1))
    return emulated.rebuild(op, csrc, folder)


@pytest.fixture(scope="session")
def faulty(request, tmp_path_factory):
    """Builds under way, of the faults that this run tests: the compiler works beside the tests."""
    emulated.build()
    with ThreadPoolExecutor(1) as pool:
        builds = {
            case: pool.submit(build, *case, tmp_path_factory.mktemp("fault"))
            for item in request.session.items
            if (case := getattr(item, "callspec", None) and item.callspec.params.get("case"))
            in CASES
        }
        yield builds
        pool.shutdown(cancel_futures=True)


def run_tests(op, library):
    """The op's tests over this build."""
    tests = emulated.ROOT / "tests"
    work = op.removeprefix("attention_")
    gradient = op.endswith("_backward")
    # In fp32 and beyond it is the twin that runs.
    chosen = "emulated and not " + ("float32 and not float64" if gradient else "gradient")
    selection = f"{chosen} or {work} and (traffic or work) or tiles"
    command = [sys.executable, "-m", "pytest", "-x", "-k", selection]
    command += [f"--emulated-library={library}", tests / "test_traffic.py"]
    command += [tests / f"test_{op}.py"]
    if op.startswith("attention") and not gradient:
        command += [tests / "test_attention_tiles.py"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("case", CASES, ids=[f"{op}-{n}" for op, n in CASES])
def test_fault_is_caught(faulty, case):
    op, n = case
    path, old, new = FAULTS[op][n]
    run = run_tests(op, faulty[case].result())
    assert run.returncode == 1, f"survives: {path}: {old!r} -> {new!r}\n{run.stdout[-2000:]}"
    assert " failed" in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]


def test_without_a_fault_nothing_is_caught():
    run = run_tests("softcap", emulated.build())
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
