KERNEL, LAUNCHER = "linear/linear_small.cuh", "linear/linear_small.cu"
PACKED, TILES = "linear/packed.cuh", "linear/linear_packed.cuh"
PACKED_SMALL = "linear/linear_small_packed.cuh"
OF = "test_linear_packed.py"
FAULTS = {
    "linear_small": {
        "test_linear_small[emulated-9 tokens-bfloat16]": [
            (KERNEL, "x_scale * w[j]) * layer_scale)", "x_scale * w[j]))"),
            (KERNEL, "y[j] * scale * w[j]", "y[j] * scale"),
            (KERNEL, "      store_shared(reinterpret", "      ptx::store_16(reinterpret"),
            (KERNEL, "token(8 + lane / 4, from)", "token(lane / 4, from)"),
            (KERNEL, "block_sum(columns.sum_of_squares(r)", "block_sum(columns.sum_of_squares(x)"),
            (KERNEL, "  __syncthreads();\n}", "}"),
            (KERNEL, "exists = t < p.tokens && from", "exists = from"),
            (KERNEL, "\n  ptx::wait_for_previous_kernel();\n", "\n"),
            (
                KERNEL,
                "columns.load_fresh(static_cast<const T*>(p.residual",
                "columns.load(static_cast<const T*>(p.residual",
            ),
        ],
        "test_linear_small[emulated-one token-bfloat16]": [
            (KERNEL, "{\n    ptx::wait_for_previous_kernel();\n", "{\n"),
            (
                KERNEL,
                "ptx::load_16_coherent(static_cast<const T*>(p.x)",
                "ptx::load_16(static_cast<const T*>(p.x)",
            ),
        ],
        "test_linear_small[emulated-two branches-bfloat16]": [
            (KERNEL, "(adds ? to[j] : 0.0f) + from", "from"),
            (KERNEL, "(adds ? to[j] : 0.0f) + from", "to[j] + from"),
            (KERNEL, "close(other, p.other_weight", "close(other, p.x_weight"),
            (
                KERNEL,
                "block_sum(columns.sum_of_squares(branch)",
                "block_sum(columns.sum_of_squares(x)",
            ),
        ],
        "test_strided[emulated]": [
            (KERNEL, "token * p.other_stride", "token * p.x_stride"),
        ],
        "test_linear_small[emulated-no whole line-bfloat16]": [
            (KERNEL, "exists = t < p.tokens && from < p.width", "exists = t < p.tokens"),
            (KERNEL, "ahead < w.tiles && from < w.width", "ahead < w.tiles"),
        ],
        "test_linear_small[emulated-several batches-bfloat16]": [
            (KERNEL, "    if (first < lines) return;\n", ""),
        ],
        "test_linear_small[emulated-several batches of several tiles-bfloat16]": [
            (KERNEL, "    first = 0;\n", ""),
        ],
        "test_linear_small[emulated-more tiles than blocks-bfloat16]": [
            (KERNEL, "int64_t{w.tile_rows} * w.step * w.width", "int64_t{w.tile_rows} * w.width"),
            (KERNEL, "smem.partial[turn % 2]", "smem.partial[0]"),
            (KERNEL, "    __syncthreads();\n    if (warp", "    if (warp"),
            (LAUNCHER, "p.rows % 16 == 0 && ", ""),
        ],
        "test_linear_small[emulated-gated-bfloat16]": [
            (KERNEL, "kGated ? p.rows : 8", "8"),
        ],
        "test_linear_small[emulated-gated, more tiles than blocks-bfloat16]": [
            (KERNEL, "gated<T>(gate.z, up.z)", "gated<T>(gate.z, up.x)"),
        ],
        "test_linear_small[emulated-factor-bfloat16]": [
            (KERNEL, "t * p.factor_stride + r]", "t * p.rows + r + 1]"),
        ],
        "test_fp16_saturates[emulated]": [
            ("common/math.cuh", "saturate<T>(gelu_tanh(gate) * other)", "gelu_tanh(gate) * other"),
        ],
        "test_traffic_linear.py::test_linear_small_work[31B q, k, v]": [
            (KERNEL, "round_up(width, 64) + 32", "round_up(width, 64)"),
        ],
        "test_traffic_linear.py::test_linear_small_work[12B down]": [
            (KERNEL, "half * 32 + lane % 4 * 8", "half * 8 + lane % 4 * 16"),
        ],
    },
    "linear_small_packed": {
        f"{OF}::test_linear_packed[emulated-(1, 704, torch.uint8, torch.bfloat16)]": [
            (PACKED, "0xc308 : 0xe408", "0xc300 : 0xe400"),
            (PACKED, "codes >> 4 * i, ", "codes >> 4 * (i ^ 1), "),
        ],
        f"{OF}::test_linear_packed[emulated-(1, 256, torch.uint8, torch.float8_e4m3fn)]": [
            (PACKED, "half ? 0x3232 : 0x1010", "0x1010"),
            (PACKED, "? 0x3414 : 0x2404", "? 0x2404 : 0x2404"),
        ],
        f"{OF}::test_a_tokens_bits_do_not_depend_on_the_others[emulated]": [
            (PACKED_SMALL, "min(8 + lane / 4, tokens - 1)", "min(lane / 4, tokens - 1)"),
        ],
        f"{OF}::test_linear_small[emulated-gated, more tiles than blocks]": [
            (PACKED_SMALL, "    if (eights == 2) __syncthreads();\n", ""),
            (PACKED_SMALL, "kGated ? row_tiles : 1", "1"),
            (PACKED_SMALL, "p.rows + row, total", "row, total"),
        ],
        f"{OF}::test_linear_small[emulated-more tiles than blocks]": [
            (PACKED_SMALL, "eights == 2 ? eight : turn % 2", "eights == 2 ? eight : 0"),
        ],
    },
    "linear_packed": {
        "test_linear_packed[emulated-(129, 2112, torch.float8_e4m3fn, torch.float32)]": [
            (TILES, "(first_token + token) * p.rows", "token * p.rows"),
            (TILES, "p.weight.row_scales[column + 1]", "p.weight.row_scales[column]"),
        ],
        "test_linear_packed[emulated-(129, 704, torch.float8_e4m3fn, torch.float16)]": [
            (TILES, "ask(step + 1)", "ask(step)"),
            (TILES, "row < p.rows && step < steps", "step < steps"),
            (
                PACKED,
                "half ? scales.after[1][high] : scales",
                "half ? scales.after[0][high] : scales",
            ),
        ],
        "test_linear_packed[emulated-(17, 2112, torch.float8_e4m3fn, None)]": [
            ("linear/linear_packed.cu", "2 * first * p.x_stride", "first * p.x_stride"),
        ],
        "test_traffic_linear.py::test_linear_packed_tiles_work": [
            (PACKED, "i ^ (lane / 4 & 1)", "i"),
        ],
    },
}
