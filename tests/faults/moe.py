OPEN, SMALL = "moe/moe_open.cuh", "moe/moe_experts_small.cuh"
FAULTS = {
    "moe_route": {
        "test_moe_route[emulated-one token-float32]": [
            ("moe/moe_route.cuh", "      if (candidate[i] == best) candidate[i] = 0;", "      {}"),
            ("moe/moe_route.cuh", "weight / sum", "weight"),
            ("moe/moe_route.cuh", "float_at(scale, expert)", "float_at(scale, lane)"),
            ("moe/moe_route.cuh", "e < num_experts ?", "e <= num_experts ?"),
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
        "test_moe_experts_small.py::test_moe_experts_small[emulated-nine tokens-bfloat16]": [
            ("moe/moe_stream.cuh", "  ptx::wait_for_previous_kernel();\n", ""),
        ],
        "test_traffic_moe.py::test_moe_experts_few_work[12-bf16]": [
            ("moe/moe_sort.cuh", "  __syncthreads();\n", ""),
        ],
        "test_traffic_moe.py::test_moe_experts_few_work[1-bf16]": [
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
                "gate_row + p.hidden_width, exist",
                "gate_row + p.hidden_width - 1, exist",
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
                "kStreamWarps * Rows::kColumns, p.width",
                "Rows::kColumns, p.width",
            ),
            ("moe/moe_stream.cuh", "tile.rows - 1)] / p.k", "tile.rows - 1)]"),
            ("moe/moe_stream.cuh", "for (int t = warp;;", "for (int t = warp + 1;;"),
            (
                "moe/moe_stream.cuh",
                "  __syncthreads();\n\n  for (int i = threadIdx.x; i < 2",
                "\n  for (int i = threadIdx.x; i < 2",
            ),
        ],
        "test_traffic_moe.py::test_moe_experts_few_work[60-bf16]": [
            (
                "moe/moe_sort.cuh",
                "p.offsets[expert + 1] = offset + total",
                "p.offsets[expert + 1] = offset",
            ),
        ],
        "test_moe_experts[emulated-several tiles of 128-bfloat16]": [
            ("common/tile.cuh", "from[i].exists && chunk * kOfChunk < columns", "from[i].exists"),
            ("moe/moe_sort.cuh", "? touched : touched + all / most_rows", "? touched : touched"),
        ],
        "test_moe_experts[emulated-one expert-bfloat16]": [
            (
                "moe/moe_stream.cuh",
                "i * 8 < rows && column < width,",
                "i * 8 < rows,",
            ),
        ],
        "test_fp32_weights[emulated-one expert-bf16]": [
            (
                "moe/moe_stream.cuh",
                "lane_row() + i * 8 < rows",
                "lane_row() < rows",
            ),
        ],
        "test_fp32_weights[emulated-one token-bf16]": [
            (
                "moe/moe_stream.cuh",
                "load_8_fresh_if(exists && column + 16 < width, row + column + 16",
                "load_8_fresh_if(exists && column + 16 < width, row + column + 4",
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
                "linear/tiles.cuh",
                "    if (ptx::has_wgmma()) ptx::fence_async_proxy();\n",
                "",
            ),
        ],
        "test_moe_experts[emulated-one token-bfloat16]": [
            ("common/stream.cuh", "b.x, b.y HERE", "b.y, b.x HERE"),
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
            (
                "moe/moe_tiles.cuh",
                "(row < kRows ? 0 : height);\n      return",
                "0;\n      return",
            ),
            (
                "moe/moe_tiles.cuh",
                "gated<T>(low, sum[i][n + 8]",
                "gated<T>(low, sum[i][n + 7]",
            ),
            (
                "moe/moe_tiles.cuh",
                "width - first);\n    weights",
                "kTileColumns);\n    weights",
            ),
        ],
        "test_traffic_moe.py::test_moe_experts_many_work[128-64]": [
            (
                "linear/tiles.cuh",
                "cp_async_wait<kTileStages - 2>",
                "cp_async_wait<kTileStages - 1>",
            ),
            (
                "linear/tiles.cuh",
                "    __syncthreads();\n    const auto& stage",
                "    const auto& stage",
            ),
            ("moe/moe_tiles.cuh", "  __syncthreads();\n\n  const T* x", "  const T* x"),
            ("linear/tiles.cuh", "cp_async_wait<0>();\n  __syncthreads();", "cp_async_wait<0>();"),
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
                "linear/tiles.cuh",
                "    if (ptx::has_wgmma()) ptx::fence_async_proxy();\n",
                "",
            ),
            ("linear/tiles.cuh", "ptx::wgmma_wait<0>(sum);", "ptx::wgmma_wait<1>(sum);"),
        ],
        "test_tiles_on_hopper[more tokens than a tile-bf16]": [
            ("common/tile.cuh", "+ columns % 64 / 8;", "+ columns % 64 / 16;"),
        ],
        "test_tiles_on_hopper[several tiles of 128-bf16]": [
            (
                "linear/tiles.cuh",
                "X::wgmma_step(i * 64, column)",
                "X::wgmma_step(0, column)",
            ),
            ("linear/tiles.cuh", "rows <= 64)", "rows <= 128)"),
        ],
    },
    "moe_experts_packed": {
        "test_moe_packed.py::test_moe_experts[emulated-as wide inside]": [
            ("moe/moe_stream.cuh", "      ask(i);\n    }", "    }"),
        ],
        "test_moe_packed.py::test_moe_experts[emulated-26B-A4B, a part]": [
            ("moe/moe_stream.cuh", "int64_t{row_tile} * (width", "int64_t{row_tile % 4} * (width"),
        ],
        "test_moe_packed.py::test_moe_experts[emulated-2 tokens]": [
            ("moe/moe_stream.cuh", "e < 2 ? low : high", "e % 2 ? low : high"),
            ("moe/moe_stream.cuh", "row_scales + int64_t{row_tile} * kPackedRows", "row_scales"),
        ],
        "test_moe_packed.py::test_moe_experts[emulated-uint8, float16, 70 tokens]": [
            ("moe/moe_tiles.cuh", "row_scales((n + 8) % 16 * 8", "row_scales(n * 8"),
            ("moe/moe_tiles.cuh", "ask(step + 1);", "ask(step);"),
        ],
    },
    "moe_open_packed": {
        "test_moe_packed.py::test_moe_open[emulated-int4-9 tokens]": [
            (OPEN, ".next_set = row_tiles", ".next_set = 1"),
            (OPEN, "rows + row, total[1]", "row, total[1]"),
        ],
    },
    "moe_experts_small_packed": {
        "test_moe_packed.py::test_moe_experts_small[emulated-int4-16 tokens]": [
            (SMALL, "scale_rows(p.dense, row, total", "scale_rows(p.dense, 0, total"),
            (SMALL, ".tiles = p.width / kPackedRows", ".tiles = p.width / kPackedColumns"),
        ],
    },
    "moe_open": {
        "test_moe_open[emulated-9 tokens-bfloat16]": [
            (OPEN, "scale, p.norm_weight, column", "scale, p.expert_weight, column"),
            (OPEN, "scale, p.expert_weight, column", "scale, p.norm_weight, column"),
            (OPEN, "y.set(j, y[j] * p.factor)", "y.set(j, y[j])"),
            (OPEN, "int64_t{token} * p.width + column", "column"),
            (OPEN, "rows % 16 != 0 ? 1 : 2", "rows % 16 > 16 ? 1 : 2"),
        ],
        "test_moe_open[emulated-more tiles than blocks-bfloat16]": [
            (OPEN, ": p.dense_blocks);", ": gridDim.x);"),
        ],
        "test_the_router_reads_what_moe_norm_makes[emulated]": [
            (
                OPEN,
                "y.set(j, y[j] * scale);\n        y.set(j, y[j] * s[j]);",
                "y.set(j, y[j] * scale * s[j]);",
            ),
        ],
    },
    "moe_experts_small": {
        "test_moe_experts_small[emulated-nine tokens-bfloat16]": [
            (SMALL, "\n  ptx::wait_for_previous_kernel();\n", "\n"),
            (SMALL, "    ptx::wait_for_previous_kernel();\n    return", "    return"),
            ("moe/moe_stream.cuh", "return load_fresh_if(exists", "return load_once_if(exists"),
            (SMALL, "expert == own && a < i", "expert == own && a <= i"),
            (SMALL, "lower += expert < i", "lower += expert <= i"),
            (SMALL, "  __syncthreads();\n  static_assert", "  static_assert"),
            (SMALL, "= i;\n  __syncthreads();", "= i;"),
            (SMALL, "choice.order + tile.begin", "choice.order"),
            (SMALL, "= choice.weights[i]", "= choice.weights[0]"),
            (SMALL, "if (i <= p.num_experts) p.off", "if (i < p.num_experts) p.off"),
        ],
        "test_moe_experts_small[emulated-as many assignments as there may be-bfloat16]": [
            (SMALL, "(tile * sets + set) * 8", "tile * sets * 8"),
        ],
        "test_strided[emulated]": [
            (SMALL, "t * p.dense_stride", "t * p.dense_width"),
            (SMALL, "token * p.logits_stride", "token * p.num_experts"),
        ],
    },
}
