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
                "block_sum(sum, smem, turn++) / p.width + p.eps);\n\n",
                "block_sum(sum, smem, turn) / p.width + p.eps);\n\n",
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
}
