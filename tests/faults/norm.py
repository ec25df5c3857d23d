FAULTS = {
    "rms_norm": {
        "test_rms_norm[emulated-eps decides-weight-float32]": [
            ("common/row.cuh", "/ width + eps)", "/ width)"),
        ],
        "test_rms_norm[emulated-one row-weight-float32]": [
            ("norm/rms_norm.cuh", "* scale * (p.weight", "* scale * (!p.weight"),
            ("norm/rms_norm.cuh", "  ptx::wait_for_previous_kernel();\n", ""),
            ("norm/rms_norm.cuh", "load_fresh(", "load_once("),
            ("common/reduce.cuh", "step = kLanes / 2; step > 0", "step = kLanes / 2; step > 1"),
            ("common/reduce.cuh", "lane < warps ? partial[i][lane] : 0.0f", "partial[i][lane]"),
        ],
        "test_strided[emulated-columns]": [
            ("norm/rms_norm.cuh", "row * p.x_stride", "row * p.width"),
        ],
        "test_traffic.py::test_traffic[rms_norm, E2B-bf16]": [
            ("norm/rms_norm.cuh", "row < p.rows;", "row + 1 < p.rows;"),
            ("common/reduce.cuh", "  parity ^= 1;\n", ""),
            ("common/reduce.cuh", "  __syncthreads();\n", ""),
            (
                "norm/row_plan.h",
                "round_up(ceil_div(vectors_in_row, kVectors), kWarpSize)",
                "vectors_in_row / kVectors / kWarpSize * kWarpSize + kWarpSize / 2",
            ),
        ],
        "test_traffic.py::test_traffic[rms_norm, 12B-bf16]": [
            ("common/row.cuh", "if (column < width) f(i, column);", "f(i, column);"),
        ],
        "test_rms_norm[emulated-one channel-weight-float32]": [
            ("common/row.cuh", "column < width; column += threads", "false;"),
        ],
        "test_rows_that_start_anywhere[emulated-dtype0]": [
            ("common/launch.h", "row_stride % kWidth == 0 &&", "true &&"),
        ],
        "test_weight_of_another_dtype[emulated-31B width-torch.bfloat16-torch.float32]": [
            ("common/vec.cuh", "load<kHalf, kHow>(p + kHalf HERE)", "load<kHalf, kHow>(p HERE)"),
        ],
    },
    "add_rms_norm": {
        "test_add_rms_norm[emulated-one row-float32]": [
            ("norm/add_rms_norm.cuh", "w[j]) * layer_scale", "w[j])"),
            ("norm/add_rms_norm.cuh", "  ptx::wait_for_previous_kernel();\n", ""),
            (
                "norm/add_rms_norm.cuh",
                "columns.load_fresh(static_cast<const R",
                "columns.load(static_cast<const R",
            ),
            (
                "norm/add_rms_norm.cuh",
                "(r[j] + branch[j] * x_scale",
                "(r[j] * layer_scale + branch[j] * x_scale",
            ),
            (
                "norm/add_rms_norm.cuh",
                "sum_of_squares(new_residual)",
                "sum_of_squares(x)",
            ),
            (
                "norm/add_rms_norm.cuh",
                "inv_rms(sum, p.width, p.eps)",
                "inv_rms(sum + x_sum, p.width, p.eps)",
            ),
            ("norm/add_rms_norm.cuh", "w = next_weight.at", "w = post_weight.at"),
        ],
        "test_traffic.py::test_traffic[add_rms_norm, fp32 residual-bf16]": [
            (
                "norm/add_rms_norm.cu",
                '"add_rms_norm", p, aligned,',
                '"add_rms_norm", p, aligned && sizeof(T) == sizeof(R),',
            ),
        ],
        "test_mixed_dtypes[emulated-12B width-autocast to bf16]": [
            ("norm/add_rms_norm.cu", "launch_rows<T, R>", "launch_rows<T>"),
        ],
        "test_mixed_dtypes[emulated-odd width-autocast to bf16]": [
            ("common/row.cuh", "    data = row;\n", ""),
        ],
        "test_mixed_rows_that_start_anywhere[emulated]": [
            ("norm/add_rms_norm.cu", "are_aligned<T>(p.x, p.x_stride, p.width) &&", ""),
            ("norm/add_rms_norm.cu", "are_aligned<R>(p.residual,", "are_aligned<R>(p.x,"),
        ],
        "test_x_and_residual_have_strides_of_their_own[emulated-64]": [
            ("norm/add_rms_norm.cuh", "row * p.residual_stride", "row * p.x_stride"),
        ],
        "test_traffic.py::test_traffic[add_rms_norm, E4B-bf16]": [
            ("common/reduce.cuh", "  parity ^= 1;\n", ""),
        ],
        "test_x_and_residual_have_strides_of_their_own[emulated-37]": [
            ("norm/add_rms_norm.cuh", "    if (!p.y) continue;\n", ""),
        ],
    },
    "moe_norm": {
        "test_moe_norm[emulated-one row-float32]": [
            ("norm/moe_norm.cuh", "n * w[j]", "n * s[j]"),
            ("norm/moe_norm.cuh", "router_x[j] * p.factor", "router_x[j] / p.factor"),
        ],
        "test_router_x_is_rounded_after_each_product[emulated-bf16-512]": [
            ("norm/moe_norm.cuh", "to_float(from_float<T>(n)) * s[j]", "n * s[j]"),
        ],
        "test_router_x_is_rounded_after_each_product[emulated-bf16-511]": [
            ("norm/moe_norm.cuh", "from_float<T>(n)", "from_float<float>(n)"),
        ],
        "test_moe_norm[emulated-large eps-float32]": [
            ("norm/moe_norm.cuh", "inv_rms(sum, p.width, p.eps)", "inv_rms(sum, p.width, 0.0f)"),
        ],
        "test_strided[emulated-columns-dtype0]": [
            ("norm/moe_norm.cuh", "row * p.x_stride", "row * p.width"),
        ],
        "test_traffic.py::test_traffic[moe_norm, 26B-bf16]": [
            ("common/reduce.cuh", "  parity ^= 1;\n", ""),
        ],
        "test_memory_that_16_byte_loads_cannot_read[emulated-scale]": [
            ("norm/moe_norm.cu", "are_aligned<W>(p.scale, p.width, p.width) &&", ""),
        ],
        "test_mixed_dtypes[emulated-26B-A4B width-fp32 weights]": [
            ("common/vec.cuh", "ptx::store_8(p, bits HERE);", "ptx::store_8(p + 1, bits HERE);"),
        ],
        "test_router_x_is_rounded_after_each_product[emulated-mixed-511]": [
            (
                "norm/moe_norm.cuh",
                "router_x.set(j, router_x[j] * p.factor)",
                "router_x.set(j, to_float(from_float<T>(router_x[j])) * p.factor)",
            ),
        ],
    },
}
