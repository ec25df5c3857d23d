"""Faults put into copies of the kernels, each of which a test of the kernel must catch.

A fault that survives is a missing test. One table takes this file past 400 lines.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated
import pytest
from conftest import needs_compiler

pytestmark = [pytest.mark.slow, needs_compiler]

WARP = "attention/attention_warp.cuh"
BACKWARD = "attention/attention_prefill_backward.cuh"
# op: {the test that catches them, of the op's own file if it names none:
#      [(file, what stands there, what to write instead)]}
FAULTS = {
    "rms_norm": {
        "test_rms_norm[emulated-eps decides-weight-float32]": [
            ("norm/rms_norm.cuh", "/ p.width + p.eps);\n\n", "/ p.width);\n\n"),
        ],
        "test_rms_norm[emulated-one row-weight-float32]": [
            ("norm/rms_norm.cuh", "x[i][j] * scale * (p.weight", "x[i][j] * scale * (!p.weight"),
            ("common/reduce.cuh", "step = kLanes / 2; step > 0", "step = kLanes / 2; step > 1"),
            ("common/reduce.cuh", "lane < warps ? partial[lane] : 0.0f", "partial[lane]"),
        ],
        "test_strided[emulated-columns]": [
            (
                "norm/rms_norm.cuh",
                "row * p.x_stride;\n    T* y_row",
                "row * p.width;\n    T* y_row",
            ),
        ],
        "test_traffic.py::test_traffic[rms_norm, E2B-bf16]": [
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
            ("common/reduce.cuh", "  __syncthreads();\n", ""),
            (
                "norm/row_plan.h",
                "round_up(ceil_div(pieces_in_row, plan.pieces), kWarpSize)",
                "pieces_in_row / plan.pieces / kWarpSize * kWarpSize + kWarpSize / 2",
            ),
        ],
        "test_traffic.py::test_traffic[rms_norm, 12B-bf16]": [
            (
                "norm/rms_norm.cuh",
                "if (column(i) >= p.width) continue;\n      Vec<T, kWidth> y;",
                "Vec<T, kWidth> y;",
            ),
        ],
        "test_rms_norm[emulated-one channel-weight-float32]": [
            (
                "norm/rms_norm.cuh",
                "i < p.width; i += blockDim.x) sum +=",
                "i < p.width - 1; i += blockDim.x) sum +=",
            ),
        ],
        "test_rows_that_start_anywhere[emulated-dtype0]": [
            ("common/launch.h", "row_stride % kWidth == 0 &&", "true &&"),
        ],
        "test_weight_of_another_dtype[emulated-31B width-torch.bfloat16-torch.float32]": [
            ("common/vec.cuh", "load<kHalf, kOnce>(p + kHalf HERE)", "load<kHalf, kOnce>(p HERE)"),
        ],
    },
    "add_rms_norm": {
        "test_add_rms_norm[emulated-one row-float32]": [
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
        ],
        "test_traffic.py::test_traffic[add_rms_norm, fp32 residual-bf16]": [
            (
                "norm/add_rms_norm.cu",
                "plan.pieces == 0",
                "plan.pieces == 0 || sizeof(T) != sizeof(R)",
            ),
        ],
        "test_mixed_dtypes[emulated-12B width-autocast to bf16]": [
            ("norm/add_rms_norm.cu", "plan_rows<T, R>", "plan_rows<T>"),
        ],
        "test_mixed_dtypes[emulated-odd width-autocast to bf16]": [
            (
                "norm/add_rms_norm.cuh",
                "const R* residual = static_cast<const R*>(",
                "const T* residual = static_cast<const T*>(",
            ),
        ],
        "test_mixed_rows_that_start_anywhere[emulated]": [
            ("norm/add_rms_norm.cu", "in_pieces_of_16<T>(p.x, p.x_stride, p.width) &&", ""),
            ("norm/add_rms_norm.cu", "in_pieces_of_16<R>(p.residual,", "in_pieces_of_16<R>(p.x,"),
        ],
        "test_x_and_residual_have_strides_of_their_own[emulated-64]": [
            (
                "norm/add_rms_norm.cuh",
                "row * p.residual_stride;\n    Vec",
                "row * p.x_stride;\n    Vec",
            ),
        ],
        "test_traffic.py::test_traffic[add_rms_norm, E4B-bf16]": [
            (
                "norm/add_rms_norm.cuh",
                "const float post_scale = 1.0f / sqrtf(block_sum(sum, smem, turn++)",
                "const float post_scale = 1.0f / sqrtf(block_sum(sum, smem, turn)",
            ),
        ],
        "test_x_and_residual_have_strides_of_their_own[emulated-37]": [
            (
                "norm/add_rms_norm.cuh",
                "    if (!p.y) continue;\n    const float next_scale",
                "    const float next_scale",
            ),
        ],
    },
    "moe_norm": {
        "test_moe_norm[emulated-one row-float32]": [
            ("norm/moe_norm.cuh", "x[i][j] * norm * weight[i][j]", "x[i][j] * norm * scale[i][j]"),
            ("norm/moe_norm.cuh", "router_x[j] * p.factor", "router_x[j] / p.factor"),
        ],
        "test_router_x_is_rounded_after_each_product[emulated-bf16-512]": [
            (
                "norm/moe_norm.cuh",
                "to_float(from_float<T>(x[i][j] * norm)) * scale[i][j]",
                "x[i][j] * norm * scale[i][j]",
            ),
        ],
        "test_router_x_is_rounded_after_each_product[emulated-bf16-511]": [
            ("norm/moe_norm.cuh", "to_float(from_float<T>(n)) *", "n *"),
        ],
        "test_moe_norm[emulated-large eps-float32]": [
            ("norm/moe_norm.cuh", "/ p.width + p.eps);\n\n", "/ p.width);\n\n"),
        ],
        "test_strided[emulated-columns-dtype0]": [
            ("norm/moe_norm.cuh", "row * p.x_stride;\n    Vec", "row * p.width;\n    Vec"),
        ],
        "test_traffic.py::test_traffic[moe_norm, 26B-bf16]": [
            (
                "norm/moe_norm.cuh",
                "block_sum(sum, smem, turn++) / p.width + p.eps);\n\n",
                "block_sum(sum, smem, turn) / p.width + p.eps);\n\n",
            ),
        ],
        "test_memory_that_16_byte_loads_cannot_read[emulated-scale]": [
            ("norm/moe_norm.cu", "in_pieces_of_16<W>(p.scale, p.width, p.width) &&", ""),
        ],
        "test_mixed_dtypes[emulated-26B-A4B width-fp32 weights]": [
            ("common/vec.cuh", "ptx::store_8(p, bits HERE);", "ptx::store_8(p + 1, bits HERE);"),
        ],
        "test_router_x_is_rounded_after_each_product[emulated-mixed-511]": [
            (
                "norm/moe_norm.cuh",
                "const R scaled = from_float<R>(",
                "const T scaled = from_float<T>(",
            ),
        ],
    },
    "qkv_norm_rope": {
        "test_cos_and_sin_to_the_last_bits[emulated-1.0]": [
            ("common/math.cuh", "-1.9515295891e-4f", "-1.3e-4f"),
            ("common/math.cuh", "2.443315711809948e-5f", "3.4e-5f"),
        ],
        "test_qkv_norm_rope[emulated-one token-float32]": [
            (
                "norm/qkv_norm_rope.cuh",
                "x * cos[i][j] - y * sin[i][j]",
                "x * cos[i][j] + y * sin[i][j]",
            ),
            (
                "norm/qkv_norm_rope.cuh",
                "kHalf = kHeadDim / 2;",
                "kHalf = kHeadDim / 4;",
            ),
            ("norm/qkv_norm_rope.cuh", "lane_sum<Lanes::kLanes>(sum)", "lane_sum(sum)"),
            ("norm/qkv_norm_rope.cuh", "/ kHeadDim + p.eps", "/ kHalf + p.eps"),
            ("norm/qkv_norm_rope.cuh", "raw_a.set(j, a[i][j] * scale);", "raw_a.set(j, a[i][j]);"),
            (
                "norm/qkv_norm_rope.cuh",
                "b[i][j] * scale * weight_b[j]",
                "b[i][j] * scale * weight_a[j]",
            ),
            (
                "norm/qkv_norm_rope.cuh",
                "static_cast<const W*>(p.k_weight)",
                "static_cast<const W*>(p.q_weight)",
            ),
            (
                "common/math.cuh",
                "if ((quadrant + 1) & 2) cos = -cos;",
                "if (quadrant & 2) cos = -cos;",
            ),
        ],
        "test_traffic.py::test_traffic[qkv_norm_rope, sliding-bf16]": [
            ("norm/qkv_norm_rope.cuh", "if (is_v) h -= p.kv_heads;", ""),
            (
                "norm/qkv_norm_rope.cuh",
                "const bool has_head = first + group < num_heads(p);",
                "const bool has_head = first + group < num_heads(p) - 1;",
            ),
        ],
        "test_qkv_norm_rope[emulated-smallest head-float32]": [
            (
                "norm/qkv_norm_rope.cuh",
                "token * p.q_stride + h * p.q_head_stride",
                "token * p.q_head_stride * p.q_heads + h * p.q_head_stride",
            ),
            ("common/math.cuh", "  r = fmaf(-quarters, -4.37113900018624283e-8f, r);\n", ""),
        ],
    },
    "qkv_norm_rope_cache": {
        "test_qkv_norm_rope_cache[emulated-dropped tokens-float32]": [
            ("norm/qkv_norm_rope.cuh", "slot >= 0 && slot < p.num_slots", "slot < p.num_slots"),
        ],
        "test_qkv_norm_rope_cache[emulated-rows-float32]": [
            (
                "norm/qkv_norm_rope.cuh",
                "p.slots.data ? index_at(p.slots, token) : token;\n    float sin",
                "token;\n    float sin",
            ),
            ("norm/qkv_norm_rope.cuh", "(slot * p.kv_heads + h) * p.head_dim", "slot * p.head_dim"),
        ],
        "test_traffic.py::test_traffic[qkv_norm_rope_cache-bf16]": [
            ("common/indices.cuh", "indices.is_64 ?", "!indices.is_64 ?"),
        ],
        "test_a_slot_past_the_cache_writes_nothing[emulated]": [
            ("norm/qkv_norm_rope.cuh", "slot >= 0 && slot < p.num_slots", "slot >= 0"),
        ],
    },
    "geglu": {
        "test_fp16_saturates[emulated]": [
            ("common/platform.h", "x < -kMost ? -kMost : x;", "x;"),
        ],
        "test_geglu[emulated-one value-float32]": [
            (
                "linear/geglu.cuh",
                "load_once<kWidth>(gate_up + p.width)",
                "load_once<kWidth>(gate_up)",
            ),
            ("linear/geglu.cuh", "gelu_tanh(gate[j]) * up[j]", "gate[j] * gelu_tanh(up[j])"),
            ("linear/geglu.cuh", "if (column >= p.width) return;", ""),
            ("common/math.cuh", "0.044715f * x * x * x", "0.044715f * x * x"),
            ("common/math.cuh", "expf(-2.0f * u)", "expf(-u)"),
        ],
        "test_strided[emulated-columns]": [
            ("linear/geglu.cuh", "row * p.stride + column", "row * p.width * 2 + column"),
        ],
        "test_geglu[emulated-odd half-float32]": [
            ("linear/geglu.cuh", "row += gridDim.y * blockDim.y", "row += gridDim.y"),
        ],
    },
    "ple_gate": {
        "test_ple_gate[emulated-odd width-float32]": [
            ("ple/ple_gate.cuh", "row * p.ple_stride", "row * p.gate_stride"),
        ],
        "test_ple_gate[emulated-one token-float32]": [
            ("ple/ple_gate.cuh", "gelu_tanh(gate[j]) * ple[j]", "gate[j] * ple[j]"),
            ("ple/ple_gate.cuh", "if (column >= p.width) return;", ""),
        ],
        "test_strided[emulated]": [
            ("ple/ple_gate.cuh", "row * p.width + column, y", "row * p.gate_stride + column, y"),
        ],
        "test_layers_that_start_anywhere[emulated]": [
            ("ple/ple_gate.cu", "in_pieces_of_16<R>(p.ple, p.ple_stride, p.width) &&", ""),
        ],
    },
    "ple_embed": {
        "test_ple_embed[emulated-ids of no row-float32]": [
            ("ple/ple_embed.cuh", "id >= 0 && id < p.vocabulary", "id >= 0 && id <= p.vocabulary"),
            ("ple/ple_embed.cuh", "id >= 0 && id < p.vocabulary", "id < p.vocabulary"),
        ],
        "test_ple_embed[emulated-one token-float32]": [
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
        ],
        "test_eps[emulated]": [
            (
                "ple/ple_embed.cuh",
                "(lane_sum(sum) / p.width + p.eps);\n#pragma",
                "(lane_sum(sum) / p.width);\n#pragma",
            ),
        ],
        "test_ple_embed[emulated-repeated ids-float32]": [
            (
                "ple/ple_embed.cuh",
                "int64_t{layer} * p.width;\n      const R* table",
                "0;\n      const R* table",
            ),
        ],
        "test_int32_ids_and_strided_rows[emulated]": [
            (
                "ple/ple_embed.cuh",
                "token * p.projected_stride + offset;\n      R* y = static_cast<R*>(p.y) "
                "+ (token * p.layers + layer) * p.width;\n      Vec",
                "token * p.table_stride + offset;\n      R* y = static_cast<R*>(p.y) "
                "+ (token * p.layers + layer) * p.width;\n      Vec",
            ),
        ],
        "test_mixed_dtypes[emulated-E2B-autocast to bf16]": [
            (
                "ple/ple_embed.cu",
                "if (in_pieces && p.width <= 32 * kWidth)",
                "if (in_pieces && p.width <= 32 * kFullWidth<T>)",
            ),
        ],
        "test_ple_embed[emulated-E2B-float32]": [
            ("ple/ple_embed.cuh", "(piece * 32 + lane) * kWidth", "(piece * 16 + lane) * kWidth"),
        ],
    },
    "softcap": {
        "test_softcap[emulated-one value-float32]": [
            ("common/math.cuh", "cap * tanhf(x / cap)", "tanhf(x / cap)"),
            ("common/math.cuh", "cap * tanhf(x / cap)", "cap * tanhf(cap * tanhf(x / cap) / cap)"),
            ("linear/softcap.cuh", "if (column >= p.width) return;", ""),
            (
                "linear/softcap.cu",
                "in_pieces ? p.width / kFullWidth<T> : p.width",
                "p.width / kFullWidth<T>",
            ),
        ],
        "test_strided[emulated-columns]": [
            ("linear/softcap.cuh", "row * p.stride + column", "row * p.width + column"),
        ],
    },
    "softcap_argmax": {
        "test_launch.py::test_softcap_argmax_of_many_rows": [
            ("linear/softcap_argmax.cu", "(params.logits) + first * p.stride", "(params.logits)"),
            ("linear/softcap_argmax.cu", "(params.index) + first;", "(params.index);"),
        ],
        "test_softcap_argmax[emulated-one value-float32]": [
            (
                "common/order.cuh",
                "<< 32 | ~static_cast<unsigned>(index)",
                "<< 32 | static_cast<unsigned>(index)",
            ),
        ],
        "test_softcap_argmax[emulated-one dimension-float32]": [
            (
                "common/order.cuh",
                "bits >> 31 ? ~bits : bits | 0x80000000u",
                "bits | 0x80000000u",
            ),
            ("linear/softcap_argmax.cuh", "step = 16; step > 0", "step = 8; step > 0"),
        ],
        "test_not_a_number_wins_and_the_first_of_them[emulated]": [
            (
                "common/order.cuh",
                "if (value != value) bits = 0xffffffffu;",
                "if (value != value) bits = 0;",
            ),
        ],
        "test_traffic.py::test_traffic[softcap_argmax-bf16]": [
            ("linear/softcap_argmax.cuh", "  __syncthreads();\n", ""),
        ],
        "test_softcap_argmax[emulated-all below zero-float32]": [
            ("linear/softcap_argmax.cuh", "column + j)", "column)"),
            (
                "linear/softcap_argmax.cu",
                'clear(device, "softcap_argmax", p.index, p.rows * sizeof(int64_t));',
                "",
            ),
        ],
        "test_softcap_argmax[emulated-batch-float32]": [
            ("linear/softcap_argmax.cuh", "warp < blockDim.x / 32; warp++", "warp < 2; warp++"),
        ],
    },
    "attention_prefill": {
        "test_attention_lengths.py::test_rows_of_no_sequence_are_zero"
        "[one is longer than said-emulated]": [
            ("attention/attention.cuh", "min(s.queries, p.max_seqlen_q), end", "s.queries, end"),
        ],
        "test_attention_lengths.py::test_rows_of_no_sequence_are_zero[begin late-emulated]": [
            ("attention/attention.cuh", "  if (of.b == 0) fill(0, s.q_begin);\n", ""),
        ],
        "test_attention_lengths.py::test_rows_of_no_sequence_are_zero[end early-emulated]": [
            ("attention/attention.cuh", "last ? p.tokens : within", "within"),
        ],
        "test_attention_lengths.py::test_rows_of_no_sequence_are_zero[below zero-emulated]": [
            ("attention/attention.cuh", "max(int64_t{0}, min(x, size))", "min(x, size)"),
        ],
        "test_traffic.py::test_prefill_work[512-99 KB]": [
            ("common/tile.cuh", "    if (!in_tile(i)) break;\n", ""),
        ],
        "test_traffic.py::test_prefill_work[64-99 KB]": [
            (
                "attention/attention.cuh",
                "    ptx::cp_async_wait<0>();\n    __syncthreads();\n    copy_v",
                "    ptx::cp_async_wait<0>();\n    copy_v",
            ),
            (
                "attention/attention.cuh",
                "    ptx::cp_async_wait<0>();\n    __syncthreads();\n    copy_v",
                "    ptx::cp_async_wait<1>();\n    __syncthreads();\n    copy_v",
            ),
            (
                "attention/attention.cuh",
                "    __syncthreads();\n    copy_k(turn + 1);",
                "    copy_k(turn + 1);",
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
            (
                "attention/attention.cuh",
                "(first_row + row) % group;\n    return static",
                "(first_row + row) / group;\n    return static",
            ),
            (
                "attention/attention.cuh",
                "smem.k_offset[turn % smem.kPlaces][threadIdx.x] =",
                "smem.k_offset[0][threadIdx.x] =",
            ),
            (
                "attention/attention.cuh",
                "  place_keys(0);\n  __syncthreads();\n",
                "  place_keys(0);\n",
            ),
        ],
        "test_attention_prefill[emulated-window of many tiles-out-bfloat16]": [
            ("common/tile.cuh", "columns % 64 * 2", "columns % 32 * 2"),
            (WARP, "      sum[i] *= decay[i];\n", ""),
            (WARP, "out[n][e] *= decay[e / 2];", "out[n][e] *= 1.0f;"),
            ("attention/attention.cuh", "key < by_all.begin || ", ""),
            (
                WARP,
                "decay[0] != 1.0f || decay[1] != 1.0f",
                "decay[0] != 1.0f",
            ),
        ],
        "test_attention_prefill[emulated-window-out-bfloat16]": [
            ("attention/attention.cuh", "i - p.window + 1)", "i - p.window)"),
        ],
        "test_attention_prefill[emulated-one token-out-bfloat16]": [
            ("attention/attention.cuh", "i + p.window_right + 1)", "i + p.window_right)"),
            ("attention/attention.cuh", "j >= visible[e / 2].end", "j > visible[e / 2].end"),
        ],
        "test_attention_prefill[emulated-below a tile-out-bfloat16]": [
            (
                WARP,
                "__shfl_xor_sync(0xffffffffu, new_highest, 2)",
                "__shfl_xor_sync(0xffffffffu, new_highest, 1)",
            ),
        ],
        "test_attention_prefill[emulated-one token-lse-bfloat16]": [
            (
                WARP,
                "for (int w = 1; w < Tile::kColumnWarps; w++)",
                "for (int w = 2; w < Tile::kColumnWarps; w++)",
            ),
        ],
        "test_traffic.py::test_prefill_work[256-Hopper]": [
            (
                "attention/attention.cuh",
                "    ptx::fence_async_proxy();\n    __syncthreads();\n    copy_k",
                "    __syncthreads();\n    copy_k",
            ),
            (
                "attention/attention.cuh",
                "    ptx::fence_async_proxy();\n    __syncthreads();\n    copy_k",
                "    ptx::fence_async_proxy();\n    copy_k",
            ),
            (
                "attention/attention.cuh",
                "  ptx::fence_async_proxy();\n  __syncthreads();\n  start_multiply",
                "  __syncthreads();\n  start_multiply",
            ),
            (
                "attention/attention.cuh",
                "ptx::cp_async_wait<0>();\n    ptx::fence_async_proxy();",
                "ptx::cp_async_wait<1>();\n    ptx::fence_async_proxy();",
            ),
            (
                "attention/attention.cuh",
                "Tile::kStages + 1;",
                "2;",
            ),
            (
                "attention/attention.cuh",
                "    ptx::wgmma_wait<0>(out);\n  };",
                "    ptx::wgmma_wait<1>(out);\n  };",
            ),
        ],
        "test_attention_tiles.py::test_prefill_tiles[227 KB-256-causal-bf16]": [
            ("attention/plan.h", "wgmma && rows > 64", "rows > 64"),
        ],
        "test_traffic.py::test_prefill_work[512-Hopper]": [
            (
                "attention/attention.cuh",
                "smem.put(next, (turn + 1) % 2);",
                "smem.put(next, turn % 2);",
            ),
        ],
        "test_attention_tiles.py::test_prefill_tiles[Hopper-256-causal-bf16]": [
            (
                "attention/attention.cuh",
                "      ptx::wgmma_wait<1>(next);\n      smem.put",
                "      smem.put",
            ),
            (
                "attention/attention.cuh",
                "smem.q, smem.k[(turn + 1) % 2])",
                "smem.q, smem.k[turn % 2])",
            ),
            (WARP, "same_in_warp(Tile::row() / 64 * 64)", "0"),
            (
                WARP,
                "ptx::wgmma_fence(d);\n#pragma unroll\n  for (int n",
                "#pragma unroll\n  for (int n",
            ),
            ("common/tile.cuh", "kRows * 128);", "kRows * 64);"),
            ("common/tile.cuh", "(columns / 64 * kRows + rows) * 8", "(columns / 64 * kRows) * 8"),
        ],
        "test_attention_tiles.py::test_prefill_tiles[Hopper-512-causal-bf16]": [
            (
                "attention/attention.cuh",
                "      ptx::wgmma_wait<1>(next);\n      smem.put",
                "      smem.put",
            ),
            ("common/tile.cuh", "(columns / 64 * kRows + rows) * 8", "(columns / 64 + rows) * 8"),
            (WARP, "(b_tile, 0, column)", "(b_tile, 0, 0)"),
        ],
        "test_paged[emulated-exact pages-in order-out-dtype1]": [
            (
                "attention/attention.cuh",
                "slot_of(p, s, b, min(key, keys.end - 1))",
                "slot_of(p, s, b, key)",
            ),
        ],
    },
    "attention_prefill_backward": {
        "test_traffic.py::test_prefill_backward_work[(64, 99)]": [
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
            (BACKWARD, "p_pairs, smem.w);\n      __syncthreads();\n", "p_pairs, smem.w);\n"),
            (BACKWARD, "ds_pairs, smem.u);\n    __syncthreads();\n", "ds_pairs, smem.u);\n"),
            (WARP, "__syncwarp();\n", ""),
            (BACKWARD, "(most - s.first() + 1) * group", "(most - s.first()) * group"),
        ],
        "test_traffic.py::test_prefill_backward_work[(256, 99)]": [
            (BACKWARD, "if constexpr (Tile::kColumnWarps > 1) __syncthreads();", ""),
        ],
        "test_gradient[emulated-one token-out-torch.bfloat16]": [
            (BACKWARD, "ds -= kOfKeys", "ds -= true ? 0.0f : kOfKeys"),
            (BACKWARD, "g * group + q_row % group", "q_row % group"),
        ],
        "test_gradient[emulated-one token-out and lse-torch.bfloat16]": [
            (BACKWARD, "sum - p.grad_lse[at]", "sum"),
            (BACKWARD, "key - query > right", "key - query >= right"),
        ],
        "test_gradient[emulated-softcap-out-torch.bfloat16]": [
            (BACKWARD, "ds *= 1.0f - (x", "ds *= 1.0f + (x"),
        ],
        "test_gradient[emulated-scale-out-torch.bfloat16]": [
            (BACKWARD, "by_u, f.scale,", "by_u, 1.0f,"),
        ],
        "test_gradient[emulated-window-out-torch.bfloat16]": [
            (BACKWARD, "query - key >= left", "query - key > left"),
            (BACKWARD, "min(last + min(left", "min(first + min(left"),
        ],
        "test_gradient[emulated-left only, no or one key out-out-torch.bfloat16]": [
            (BACKWARD, "q_high - k_low >= left", "q_high - k_low > left"),
        ],
        "test_gradient[emulated-more queries than keys-out-torch.bfloat16]": [
            (BACKWARD, "lse == -INFINITY ? INFINITY :", "false ? INFINITY :"),
        ],
        "test_gradient[emulated-full heads-out-torch.bfloat16]": [
            (BACKWARD, "k_high - q_low > right", "k_high - q_low - 1 > right"),
        ],
        "test_scores_far_below_zero[emulated]": [
            (BACKWARD, "|| k_high >= s.keys;", ";"),
            (BACKWARD, "first_row + i < range.end ? log2_sum", "true ? log2_sum"),
        ],
        "test_gradient[emulated-below a tile-out-torch.bfloat16]": [
            (BACKWARD, "max(first - right, s.first())", "max(last - right, s.first())"),
            (BACKWARD, ": own_delta[i]", ": own_delta[0]"),
        ],
        "test_gradient[emulated-sliding heads-out-torch.bfloat16]": [
            (WARP, "[first_warp + w * Tile::kRowWarps]", "[w * Tile::kRowWarps]"),
        ],
        "test_strided[emulated-0]": [
            (BACKWARD, "smem.rows[turn % 2].u, first_row", "smem.rows[turn % 2].w, first_row"),
        ],
        "test_gradient[emulated-exact tile-out-torch.bfloat16]": [
            (BACKWARD, "place_rows(turn + 1, row + kKeys);", "place_rows(turn + 1, row);"),
        ],
        "test_tokens_outside_of_all_sequences[emulated]": [
            (
                "attention/attention_prefill_backward.cu",
                "clear(device, name, p.grad_k,",
                "(void)sizeof(p.grad_k,",
            ),
        ],
    },
    "attention_decode": {
        "test_traffic.py::test_decode_work[256-pages]": [
            ("attention/attention.cuh", "key / p.page_size)", "key / p.page_size + 1)"),
            ("attention/attention.cuh", "key % p.page_size};", "key};"),
        ],
        "test_attention_decode[emulated-ring, not yet full-bfloat16]": [
            ("attention/attention.cuh", "? key % p.ring :", "? (key + 1) % p.ring :"),
        ],
        "test_launch.py::test_keys_and_values_have_strides_of_their_own": [
            (
                "attention/attention.cuh",
                "slot.offset(p.v_strides, g)",
                "slot.offset(p.k_strides, g)",
            ),
        ],
        "test_launch.py::test_decode_of_many_sequences": [
            ("attention/attention.cu", "* p.batch, p.kv_heads", "* (p.batch % 65536), p.kv_heads"),
        ],
        "test_traffic.py::test_decode_work[256-rows]": [
            (
                "attention/attention.cuh",
                "all.begin + split * size",
                "all.begin + split * (size - 1)",
            ),
            ("attention/attention.cuh", "row >= rows || sum[i] == 0.0f", "sum[i] == 0.0f"),
        ],
        "test_attention_tiles.py::test_many_keys": [
            ("attention/attention.cuh", "(even + 63) / 64 * 64", "even / 64 * 64"),
        ],
        "test_attention_decode[emulated-one key-bfloat16]": [
            ("attention/attention.cuh", "log2f(sum[i])) * kLn2", "log2f(sum[i]))"),
        ],
        "test_attention_decode[emulated-rows alike-bfloat16]": [
            (
                "attention/attention.cuh",
                "int first() const { return keys - queries; }",
                "int first() const { return keys - 1; }",
            ),
            (
                "attention/attention.cuh",
                "p.q_heads + head) * p.lse_head_stride + query] = lse;",
                "p.q_heads + head) * p.lse_head_stride] = lse;",
            ),
        ],
        "test_attention_decode[emulated-many tiles-bfloat16]": [
            ("attention/attention_merge.cuh", "expf(lse - highest)", "expf(lse)"),
            ("attention/attention_merge.cuh", "    if (lse == -INFINITY) continue;\n", ""),
            (
                "attention/attention_merge.cuh",
                "split = 0; split < p.splits; split++) {",
                "split = 1; split < p.splits; split++) {",
            ),
            ("attention/attention_merge.cuh", "highest + logf(total)", "highest"),
        ],
    },
    "moe_route": {
        "test_moe_route[emulated-one token-float32]": [
            ("moe/moe_route.cuh", "      if (candidate[i] == best) candidate[i] = 0;", "      {}"),
            ("moe/moe_route.cuh", "weight / sum", "weight"),
            ("moe/moe_route.cuh", "float_at(p.scale, expert)", "float_at(p.scale, lane)"),
            ("moe/moe_route.cuh", "e < p.num_experts ?", "e <= p.num_experts ?"),
        ],
        "test_strided_and_of_any_value[emulated]": [
            ("moe/moe_route.cuh", "token * p.stride", "token * p.num_experts"),
        ],
        "test_large_logits_do_not_overflow[emulated]": [
            ("moe/moe_route.cuh", "value_of(best) - highest", "value_of(best)"),
        ],
        "test_moe_route[emulated-one token-bfloat16]": [
            (
                "common/indices.cuh",
                "floats.dtype == DType::kBFloat16",
                "floats.dtype == DType::kFloat16",
            ),
        ],
        "test_moe_route[emulated-all experts-float32]": [
            ("common/order.cuh", "bits & 0x7fffffffu : ~bits", "bits & 0x7fffffffu : bits"),
        ],
    },
    "moe_experts": {
        "test_traffic.py::test_moe_experts_few_work[12-bf16]": [
            ("moe/moe_sort.cuh", "  __syncthreads();\n", ""),
        ],
        "test_traffic.py::test_moe_experts_few_work[1-bf16]": [
            ("moe/moe_sort.cuh", "lane < warp ? others", "lane <= warp ? others"),
            ("moe/moe_sort.cuh", "found & ((1u << lane) - 1)", "found & ((2u << lane) - 1)"),
            ("moe/moe_sort.cuh", "if (lane >= step) through", "through"),
            ("moe/moe_sort.cuh", "    n -= __shfl_sync(0xffffffffu, through, 31);\n", ""),
            (
                "moe/moe_sort.cuh",
                "min(most_rows, __shfl_sync(0xffffffffu, end, owner) - from)",
                "most_rows",
            ),
            (
                "moe/moe_stream.cuh",
                "gate_row + int64_t{p.hidden_width} * p.width;",
                "gate_row + int64_t{p.hidden_width - 1} * p.width;",
            ),
            (
                "moe/moe_stream.cuh",
                "__syncthreads();\n  if (warp < kBlocks)",
                "if (warp < kBlocks)",
            ),
            ("moe/moe_stream.cuh", "  }\n  __syncthreads();\n  const int i", "  }\n  const int i"),
            ("moe/moe_stream.cuh", "(row ^ token / 4 % 2 * 8)", "row"),
            (
                "moe/moe_stream.cuh",
                "first += kStreamWarps * Columns::kColumns",
                "first += Columns::kColumns",
            ),
            ("moe/moe_stream.cuh", "p.order[tile.begin + i] / p.k", "p.order[tile.begin + i]"),
            ("moe/moe_stream.cuh", "for (int t = warp;;", "for (int t = warp + 1;;"),
            (
                "moe/moe_stream.cuh",
                "  __syncthreads();\n\n  for (int i = threadIdx.x; i < 2",
                "\n  for (int i = threadIdx.x; i < 2",
            ),
        ],
        "test_traffic.py::test_moe_experts_few_work[60-bf16]": [
            (
                "moe/moe_sort.cuh",
                "p.offsets[expert + 1] = offset + total",
                "p.offsets[expert + 1] = offset",
            ),
        ],
        "test_moe_experts[emulated-several tiles of 128-bfloat16]": [
            ("common/tile.cuh", "from[i].exists && chunk * 8 < columns", "from[i].exists"),
            ("moe/moe_sort.cuh", "? touched : touched + all / most_rows", "? touched : touched"),
        ],
        "test_moe_experts[emulated-one expert-bfloat16]": [
            (
                "moe/moe_stream.cuh",
                "return load_once_if(exists && column < width,",
                "return load_once_if(exists,",
            ),
        ],
        "test_fp32_weights[emulated-one expert-bf16]": [
            (
                "moe/moe_stream.cuh",
                "load_once_if(exists && column + 16 < width,",
                "load_once_if(exists,",
            ),
        ],
        "test_fp32_weights[emulated-one token-bf16]": [
            (
                "moe/moe_stream.cuh",
                "load_8_if(exists && column + 16 < width, row + column + 16",
                "load_8_if(exists && column + 16 < width, row + column + 4",
            ),
            ("moe/moe_stream.cuh", "pack_pair<T>(w[4], w[5])", "pack_pair<T>(w[5], w[4])"),
        ],
        "test_fp32_weights[emulated-several tiles of 128-bf16]": [
            (
                "common/tile.cuh",
                "if (from.exists && chunk * 8 < columns) values",
                "if (from.exists) values",
            ),
            (
                "common/tile.cuh",
                "const SourceRow<float> from = source(first + i * kStep);",
                "const SourceRow<float> from = source(first);",
            ),
        ],
        "test_fp32_weights_on_hopper[all on one expert]": [
            (
                "moe/moe_tiles.cuh",
                "    if (ptx::has_wgmma()) ptx::fence_async_proxy();\n",
                "",
            ),
        ],
        "test_moe_experts[emulated-one token-bfloat16]": [
            ("moe/moe_stream.cuh", "token.x, token.y HERE", "token.y, token.x HERE"),
            (
                "moe/moe_stream.cuh",
                "const float weight = float_at(p.weights, a);",
                "const float weight = float_at(p.weights, token);",
            ),
        ],
        "test_moe_experts[emulated-eight tokens, wider than a block's step-bfloat16]": [
            ("moe/moe_stream.cuh", "w < kStreamWarps; w++", "w < kStreamWarps - 1; w++"),
        ],
        "test_moe_experts[emulated-all skipped-bfloat16]": [
            ("moe/moe_stream.cuh", "expert < 0 || expert >= p.num_experts", "expert < 0"),
        ],
        "test_moe_experts[emulated-all on one expert-bfloat16]": [
            ("moe/moe_tiles.cuh", "row < kOutColumns ? 0 : p.hidden_width", "0"),
            (
                "moe/moe_tiles.cuh",
                "gelu_tanh(low) * sum[i][n + 8]",
                "gelu_tanh(low) * sum[i][n + 7]",
            ),
            (
                "moe/moe_tiles.cuh",
                "width - first);\n    const auto weight",
                "kTileColumns);\n    const auto weight",
            ),
        ],
        "test_traffic.py::test_moe_experts_many_work[128-64]": [
            (
                "moe/moe_tiles.cuh",
                "cp_async_wait<kTileStages - 2>",
                "cp_async_wait<kTileStages - 1>",
            ),
            (
                "moe/moe_tiles.cuh",
                "    __syncthreads();\n    if (step + kTileStages",
                "    if (step + kTileStages",
            ),
            ("moe/moe_tiles.cuh", "  __syncthreads();\n\n  const T* x", "  const T* x"),
            ("moe/moe_tiles.cuh", "cp_async_wait<0>();\n  __syncthreads();", "cp_async_wait<0>();"),
            (
                "moe/moe_tiles.cuh",
                "blockIdx.x % column_tiles * kOutColumns",
                "blockIdx.x / column_tiles * kOutColumns",
            ),
        ],
        "test_moe_experts[emulated-some skipped-bfloat16]": [
            (
                "moe/moe_tiles.cuh",
                "tile.begin + row : p.order[tile.begin + row]",
                "tile.begin + row : tile.begin + row",
            ),
            ("moe/moe_tiles.cuh", "expert < 0 || expert >= p.num_experts", "expert < 0"),
        ],
        "test_tiles_on_hopper[all on one expert-bf16]": [
            (
                "moe/moe_tiles.cuh",
                "    if (ptx::has_wgmma()) ptx::fence_async_proxy();\n",
                "",
            ),
            ("moe/moe_tiles.cuh", "ptx::wgmma_wait<0>(sum);", "ptx::wgmma_wait<1>(sum);"),
        ],
        "test_tiles_on_hopper[more tokens than a tile-bf16]": [
            ("common/tile.cuh", "+ columns % 64 / 8;", "+ columns % 64 / 16;"),
        ],
        "test_tiles_on_hopper[several tiles of 128-bf16]": [
            (
                "moe/moe_tiles.cuh",
                "wgmma_step<kRows>(i * 64, column)",
                "wgmma_step<kRows>(0, column)",
            ),
            ("moe/moe_tiles.cuh", "if (rows > 64)", "if (rows > 128)"),
        ],
    },
}
CASES = [
    (op, test, n)
    for op, tests in FAULTS.items()
    for test, faults in tests.items()
    for n in range(len(faults))
]


def run_test(case, folder):
    """The case's test over a library with the case's fault in it."""
    op, test, n = case
    path, old, new = FAULTS[op][test][n]
    csrc = folder / "csrc"
    shutil.copytree(emulated.CSRC, csrc)
    text = (csrc / path).read_text()
    assert old in text, f"{path} no longer says {old!r}"
    (csrc / path).write_text(text.replace(old, new, 1))
    return run_tests(emulated.rebuild(op, csrc, folder), [node(op, test)], folder)


def node(op, test):
    return emulated.ROOT / "tests" / (test if "::" in test else f"test_{op}.py::{test}")


own = threading.local()


def run_tests(library, tests, folder):
    """pytest's exit status and output, slow tests too, from forks of this thread's process."""
    if not hasattr(own, "forks"):
        command = [sys.executable, Path(__file__).with_name("pytest_forks.py")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        own.forks = subprocess.Popen(command, env=environment, **pipes)
    output = folder / "output"
    line = [output, "-m", "", f"--emulated-library={library}", *tests]
    print(json.dumps([str(word) for word in line]), file=own.forks.stdin, flush=True)
    status = int(own.forks.stdout.readline())
    return status, output.read_text()


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory):
    """Under way, as many at once as there are processors, for the faults that this run asks for."""
    emulated.build()
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [call.params["case"] for call in chosen if call and "case" in call.params]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            case: pool.submit(run_test, case, tmp_path_factory.mktemp("fault"))
            for case in CASES
            if case in cases
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_fault_is_caught(runs, case):
    op, test, n = case
    path, old, new = FAULTS[op][test][n]
    status, output = runs[case].result()
    assert status == 1, f"survives: {path}: {old!r} -> {new!r}\n{output[-2000:]}"
    assert "1 failed" in output, output[-2000:]


def test_without_a_fault_nothing_is_caught(tmp_path):
    tests = {node(op, test) for op, by_test in FAULTS.items() for test in by_test}
    status, output = run_tests(emulated.build(), sorted(tests), tmp_path)
    assert status == 0, output[-2000:]
    assert f"{len(tests)} passed" in output, output[-2000:]
