FAULTS = {
    "attention_prefill": {
        "test_attention_lengths.py::test_rows_of_no_sequence_are_zero"
        "[one is longer than said-emulated]": [
            ("attention/epilogue.cuh", "min(s.queries, p.max_seqlen_q), end", "s.queries, end"),
        ],
        "test_attention_lengths.py::test_rows_of_no_sequence_are_zero[begin late-emulated]": [
            ("attention/epilogue.cuh", "  if (of.b == 0) fill(0, s.q_begin);\n", ""),
        ],
        "test_attention_lengths.py::test_rows_of_no_sequence_are_zero[end early-emulated]": [
            ("attention/epilogue.cuh", "last ? p.tokens : within", "within"),
        ],
        "test_attention_lengths.py::test_rows_of_no_sequence_are_zero[below zero-emulated]": [
            ("attention/sequence.cuh", "max(int64_t{0}, min(x, size))", "min(x, size)"),
        ],
        "test_traffic_attention.py::test_prefill_work[512-99 KB]": [
            ("common/tile.cuh", "    if (!in_tile(i)) break;\n", ""),
        ],
        "test_traffic_attention.py::test_prefill_work[64-99 KB]": [
            (
                "attention/mainloop.cuh",
                "    ptx::cp_async_wait<0>();\n    __syncthreads();\n    keys.copy_v",
                "    ptx::cp_async_wait<0>();\n    keys.copy_v",
            ),
            (
                "attention/mainloop.cuh",
                "    ptx::cp_async_wait<0>();\n    __syncthreads();\n    keys.copy_v",
                "    ptx::cp_async_wait<1>();\n    __syncthreads();\n    keys.copy_v",
            ),
            (
                "attention/mainloop.cuh",
                "    __syncthreads();\n    keys.copy_k(iteration + 1);",
                "    keys.copy_k(iteration + 1);",
            ),
            (
                "attention/mainloop.cuh",
                "    ptx::cp_async_wait<1>();\n    __syncthreads();\n",
                "    ptx::cp_async_wait<1>();\n",
            ),
            (
                "attention/mainloop.cuh",
                "    ptx::cp_async_wait<1>();\n    __syncthreads();\n",
                "    ptx::cp_async_wait<2>();\n    __syncthreads();\n",
            ),
            (
                "attention/attention.cuh",
                "queries.head(first_row + row);\n    return static",
                "queries.query(first_row + row);\n    return static",
            ),
            (
                "attention/key_tiles.cuh",
                "smem.offset[iteration % smem.kOffsets][threadIdx.x] =",
                "smem.offset[0][threadIdx.x] =",
            ),
            (
                "attention/mainloop.cuh",
                "  keys.load_offsets(0);\n  __syncthreads();\n",
                "  keys.load_offsets(0);\n",
            ),
        ],
        "test_attention_prefill[emulated-window of many tiles-out-bfloat16]": [
            ("common/tile.cuh", "columns % 64 * 2", "columns % 32 * 2"),
            ("attention/softmax.cuh", "      row_sum[i] *= rescale[i];\n", ""),
            ("attention/softmax.cuh", "out[n][e] *= rescale[e / 2];", "out[n][e] *= 1.0f;"),
            ("attention/attention.cuh", "key < by_all.begin || ", ""),
            (
                "attention/softmax.cuh",
                "rescale[0] != 1.0f || rescale[1] != 1.0f",
                "rescale[0] != 1.0f",
            ),
        ],
        "test_attention_prefill[emulated-window-out-bfloat16]": [
            ("attention/sequence.cuh", "i - p.window + 1)", "i - p.window)"),
        ],
        "test_attention_prefill[emulated-one token-out-bfloat16]": [
            ("attention/sequence.cuh", "i + p.window_right + 1)", "i + p.window_right)"),
            ("attention/softmax.cuh", "j >= visible[e / 2].end", "j > visible[e / 2].end"),
        ],
        "test_attention_prefill[emulated-below a tile-out-bfloat16]": [
            (
                "attention/softmax.cuh",
                "__shfl_xor_sync(0xffffffffu, new_max, 2)",
                "__shfl_xor_sync(0xffffffffu, new_max, 1)",
            ),
        ],
        "test_attention_prefill[emulated-one token-lse-bfloat16]": [
            (
                "attention/products.cuh",
                "for (int w = 1; w < Tile::kColumnWarps; w++)",
                "for (int w = 2; w < Tile::kColumnWarps; w++)",
            ),
        ],
        "test_traffic_attention.py::test_prefill_work[256-Hopper]": [
            (
                "attention/mainloop_wgmma.cuh",
                "    ptx::fence_async_proxy();\n    __syncthreads();\n    float next",
                "    __syncthreads();\n    float next",
            ),
            (
                "attention/mainloop_wgmma.cuh",
                "    ptx::fence_async_proxy();\n    __syncthreads();\n    float next",
                "    ptx::fence_async_proxy();\n    float next",
            ),
            (
                "attention/mainloop_wgmma.cuh",
                "  ptx::fence_async_proxy();\n  __syncthreads();\n  start_multiply",
                "  __syncthreads();\n  start_multiply",
            ),
            (
                "attention/mainloop_wgmma.cuh",
                "ptx::cp_async_wait<0>();\n    ptx::fence_async_proxy();",
                "ptx::cp_async_wait<1>();\n    ptx::fence_async_proxy();",
            ),
            (
                "attention/plan.h",
                "Tile::kStages + 1;",
                "2;",
            ),
            (
                "attention/mainloop_wgmma.cuh",
                "    ptx::wgmma_wait<0>(out);\n  };",
                "    ptx::wgmma_wait<1>(out);\n  };",
            ),
        ],
        "test_attention_tiles.py::test_prefill_tiles[227 KB-256-causal-bf16]": [
            ("attention/plan.h", "has_wgmma(device)}", "true}"),
        ],
        "test_traffic_attention.py::test_prefill_work[512-Hopper]": [
            (
                "attention/mainloop_wgmma.cuh",
                "smem.store_partial(next, (iteration + 1) % 2);",
                "smem.store_partial(next, iteration % 2);",
            ),
        ],
        "test_attention_tiles.py::test_prefill_tiles[Hopper-256-causal-bf16]": [
            (
                "attention/mainloop_wgmma.cuh",
                "      ptx::wgmma_wait<1>(next);\n      smem.store_partial",
                "      smem.store_partial",
            ),
            (
                "attention/mainloop_wgmma.cuh",
                "smem.q, smem.k[(iteration + 1) % 2])",
                "smem.q, smem.k[iteration % 2])",
            ),
            ("attention/mainloop_wgmma.cuh", "warp_uniform(Tile::row() / 64 * 64)", "0"),
            (
                "attention/mainloop_wgmma.cuh",
                "ptx::wgmma_fence(d);\n#pragma unroll\n  for (int n",
                "#pragma unroll\n  for (int n",
            ),
            ("common/tile.cuh", "kRows * 128);", "kRows * 64);"),
            ("common/tile.cuh", "(columns / 64 * kRows + rows) * 8", "(columns / 64 * kRows) * 8"),
        ],
        "test_attention_tiles.py::test_prefill_tiles[Hopper-512-causal-bf16]": [
            (
                "attention/mainloop_wgmma.cuh",
                "      ptx::wgmma_wait<1>(next);\n      smem.store_partial",
                "      smem.store_partial",
            ),
            ("common/tile.cuh", "(columns / 64 * kRows + rows) * 8", "(columns / 64 + rows) * 8"),
            ("attention/mainloop_wgmma.cuh", "(b_tile, 0, column)", "(b_tile, 0, 0)"),
        ],
        "test_paged[emulated-exact pages-in order-out-dtype1]": [
            (
                "attention/key_tiles.cuh",
                "key_offset(p, s, b, g, min(key, range.end - 1))",
                "key_offset(p, s, b, g, key)",
            ),
        ],
    },
    "attention_decode": {
        "test_traffic_attention.py::test_decode_work[256-pages]": [
            ("attention/sequence.cuh", "key / p.page_size)", "key / p.page_size + 1)"),
            ("attention/sequence.cuh", "inner = key % p.page_size;", "inner = key;"),
        ],
        "test_attention_decode[emulated-ring, not yet full-bfloat16]": [
            ("attention/sequence.cuh", "inner = key % p.ring;", "inner = (key + 1) % p.ring;"),
        ],
        "test_launch.py::test_decode_of_many_sequences": [
            ("attention/attention.cu", "* p.batch, p.kv_heads", "* (p.batch % 65536), p.kv_heads"),
        ],
        "test_traffic_attention.py::test_decode_work[256-rows]": [
            (
                "attention/sequence.cuh",
                "all.begin + split * size",
                "all.begin + split * (size - 1)",
            ),
            ("attention/epilogue.cuh", "row >= rows || row_sum[i] == 0.0f", "row_sum[i] == 0.0f"),
        ],
        "test_attention_tiles.py::test_many_keys": [
            ("attention/sequence.cuh", "(even + 63) / 64 * 64", "even / 64 * 64"),
        ],
        "test_e4m3_cache.py::test_attention_decode[emulated-one key-bf16]": [
            ("common/e4m3.cuh", "upper_codes<T>(word << 8)", "upper_codes<T>(word)"),
        ],
        "test_attention_decode[emulated-one key-bfloat16]": [
            ("attention/softmax.cuh", "log2f(row_sum[i])) * kLn2", "log2f(row_sum[i]))"),
        ],
        "test_attention_decode[emulated-rows alike-bfloat16]": [
            (
                "attention/sequence.cuh",
                "int first() const { return keys - queries; }",
                "int first() const { return keys - 1; }",
            ),
            (
                "attention/epilogue.cuh",
                "p.q_heads + head) * p.lse_head_stride + query] = lse[i];",
                "p.q_heads + head) * p.lse_head_stride] = lse[i];",
            ),
        ],
        "test_attention_decode[emulated-many tiles-bfloat16]": [
            ("attention/merge.cuh", "expf(parts[i].lse - base)", "expf(parts[i].lse)"),
            ("attention/merge.cuh", "    if (parts[i].lse != -INFINITY) {", "    {"),
            (
                "attention/attention_merge.cuh",
                "merge_parts(p, i * kFan, count,",
                "merge_parts(p, i * kFan, count - 1,",
            ),
            ("attention/merge.cuh", "base + logf(total)", "base"),
        ],
    },
    "qkv_attention_decode": {
        "test_qkv_attention_decode[emulated-splits-bfloat16]": [
            ("attention/qkv_attention_decode.cuh", "  ptx::wait_for_previous_kernel();\n", ""),
            ("attention/merge.cuh", "ptx::load_16_coherent(Part", "ptx::load_16(Part"),
            ("norm/heads.cuh", "a(Lanes::half().load_fresh(", "a(Lanes::half().load_once("),
            ("common/ptx/barrier.h", "return a + b; }, 1, true", "return a + b; }, 1, false"),
            ("attention/qkv_attention_decode.cuh", "      if (is_last) counters[knot] = 0;\n", ""),
            ("attention/qkv_attention_decode.cuh", "== count - 1u;", "== count - 0u;"),
            ("attention/qkv_attention_decode.cuh", "== count - 1u;", "== count - 2u;"),
            (
                "attention/qkv_attention_decode.cuh",
                "has_newest = range.end == s.keys &&",
                "has_newest = split == 0 &&",
            ),
            (
                "attention/qkv_attention_decode.cuh",
                "static_cast<float>(index_at(p.positions, b))",
                "static_cast<float>(a.seq_lens[b] - 1)",
            ),
            (
                "attention/qkv_attention_decode.cuh",
                "static_cast<const W*>(p.k_weight)",
                "static_cast<const W*>(p.q_weight)",
            ),
            (
                "attention/qkv_attention_decode.cuh",
                "key_offset(a, s, b, g, s.keys - 1)",
                "key_offset(a, s, b, g, range.begin)",
            ),
            (
                "attention/qkv_attention_decode.cuh",
                "if (has_newest) start_mainloop(keys);",
                "if (has_newest) keys.load_offsets(0), keys.copy_k(0), ptx::cp_async_commit();",
            ),
        ],
        "test_e4m3_cache.py::test_qkv_attention_decode[emulated-splits-bf16]": [
            (
                "attention/key_tiles.cuh",
                "smem.scale[iteration % smem.kOffsets][of_v][key]",
                "smem.scale[0][of_v][key]",
            ),
            (
                "attention/key_tiles.cuh",
                "scale(0, iteration, n, e % 2)",
                "scale(0, iteration, n, 0)",
            ),
            (
                "attention/key_tiles.cuh",
                "weight * scale(1, iteration",
                "weight * scale(0, iteration",
            ),
            (
                "attention/qkv_attention_decode.cuh",
                "value.store(makes_v, p.v_cache, p.v_scales",
                "value.store(makes_v, p.v_cache, p.k_scales",
            ),
        ],
        "test_traffic_attention.py::test_qkv_decode_work[256-rows-e4m3]": [
            ("common/tile.cuh", "row % 2 * 4 + row / 2 % 4", "row % 8"),
        ],
        "test_merges_of_merges[emulated-knots]": [
            (
                "attention/qkv_attention_decode.cuh",
                "    __syncthreads();  // what all threads stored goes before the arrival\n",
                "",
            ),
            ("attention/qkv_attention_decode.cuh", "is_all = parts <= kFan;", "is_all = true;"),
            (
                "attention/qkv_attention_decode.cuh",
                "a.splits.divisor + knot, b, head",
                "knot, b, head",
            ),
            ("attention/qkv_attention_decode.cuh", "counters += kFan) {", "counters += 0) {"),
        ],
        "test_a_length_that_the_memory_does_not_have_writes_nothing[21-emulated]": [
            ("attention/qkv_attention_decode.cuh", " && a.seq_lens[b] == s.keys;", ";"),
        ],
        "test_qkv_attention_decode[emulated-V from K-bfloat16]": [
            (
                "attention/qkv_attention_decode.cuh",
                "makes_v = is_v || (is_k && !p.v);",
                "makes_v = is_v;",
            ),
        ],
    },
}
