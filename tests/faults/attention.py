WARP = "attention/attention_warp.cuh"
FAULTS = {
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
                "smem.offset[turn % smem.kPlaces][threadIdx.x] =",
                "smem.offset[0][threadIdx.x] =",
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
                "key_offset(p, s, b, g, min(key, keys.end - 1))",
                "key_offset(p, s, b, g, key)",
            ),
        ],
    },
    "attention_decode": {
        "test_traffic.py::test_decode_work[256-pages]": [
            ("attention/attention.cuh", "key / p.page_size)", "key / p.page_size + 1)"),
            ("attention/attention.cuh", "inner = key % p.page_size;", "inner = key;"),
        ],
        "test_attention_decode[emulated-ring, not yet full-bfloat16]": [
            ("attention/attention.cuh", "inner = key % p.ring;", "inner = (key + 1) % p.ring;"),
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
}
