BACKWARD = "moe/moe_experts_backward.cuh"
TILES = "linear/tiles.cuh"
FAULTS = {
    "moe_experts_backward": {
        "test_gradients[emulated-ragged-bf16]": [
            (BACKWARD, "to_float(up[e]), weight * d)", "to_float(up[e]), d)"),
            (BACKWARD, "d_weight += __shfl_xor_sync(0xffffffffu, d_weight, 2);", ""),
            (BACKWARD, "lane % 4 == 0 && row < tile.rows", "lane % 4 == 0"),
            (BACKWARD, "  __syncthreads();\n  const auto store", "  const auto store"),
            (BACKWARD, "2 * p.hidden_width, p.hidden_width);", "2 * p.hidden_width, 0);"),
            (BACKWARD, "weight * of[0].product", "of[0].product"),
            ("moe/moe_experts_backward.cu", "    dx.down = p.gate_up;\n", ""),
            (TILES, "first.at(column, row)", "first.at(column, row % 64)"),
            (TILES, "_address<kTileRows>(tile, 0, row)", "_address<kTileRows>(tile, 0, 0)"),
            ("moe/moe_tiles.cuh", "row = step * kTileColumns + i;", "row = i;"),
            (BACKWARD, "* of.stride + first, i < count}", "* of.stride + first, true}"),
            (BACKWARD, "begin + min(i, count - 1)", "min(i, count - 1)"),
            (BACKWARD, "if (i >= p.offsets[p.num_experts]) return;", "if (i >= all) return;"),
            (BACKWARD, "p.d_weights[p.order[i]] = sum", "p.d_weights[i] = sum"),
            (BACKWARD, "tile < p.hidden_tiles", "tile < 1"),
            ("moe/moe_experts_backward.cu", "if (p.d_weights) clear(", "if (false) clear("),
        ],
        "test_gradients[emulated-every stage-bf16]": [
            (BACKWARD, "kSourceStages = 4", "kSourceStages = 3"),
            (BACKWARD, "    keep_token(step + kTileStages - 1, ahead);\n", ""),
            (BACKWARD, "(kTileStages - 1);\n  __syncthreads();", "(kTileStages - 1);"),
        ],
        "test_what_fp16_holds_back_has_no_gradient[emulated]": [
            ("common/math.cuh", "if (fabsf(product) > fabsf(held)) grad = 0.0f;", ""),
        ],
        "test_fp32_weights[99 KB]": [
            (BACKWARD, "if (row < rows && column < p.width)", "if (column < p.width)"),
        ],
        "test_gradients_on_hopper[ragged]": [
            (TILES, "wgmma_step<kTileRows>(column, row)", "wgmma_step<kTileRows>(column, 0)"),
        ],
    },
}
