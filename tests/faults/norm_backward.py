FAULTS = {
    "rms_norm_backward": {
        "test_gradients[emulated-more rows than blocks-float32]": [
            (
                "norm/rows_backward.cuh",
                "mean(products / width * r * r)",
                "mean(products / width * r)",
            ),
            ("norm/rms_norm_backward.cuh", "grad[j] * (x[j] * dx.r)", "grad[j] * x[j]"),
            (
                "norm/rms_norm_backward.cuh",
                "next = load_row(row + gridDim.x);",
                "next = load_row(row + 1);",
            ),
        ],
        "test_one_gradient[emulated-('weight',)]": [
            ("norm/weight_gradients.cu", "row = warp; row <", "row = warp + 1; row <"),
            ("norm/weight_gradients.cu", "  __syncthreads();\n", ""),
        ],
        "test_strided[emulated-columns]": [
            ("norm/rms_norm_backward.cuh", "row * p.x_stride", "row * p.grad_stride"),
        ],
        "test_weight_of_another_dtype[emulated-torch.bfloat16-torch.float16]": [
            (
                "norm/rows_backward.cuh",
                "x.dtype == DType::kBFloat16 ? load_as(bf16()) : load_as(fp16())",
                "load_as(bf16())",
            ),
        ],
        "test_without_a_weight[emulated]": [
            ("norm/rows_backward.cuh", "data[j] = 1.0f", "data[j] = 0.0f"),
        ],
    },
    "add_rms_norm_backward": {
        "test_gradients[emulated-more rows than blocks-float32]": [
            ("norm/add_rms_norm_backward.cuh", "        sum *= scale;\n", ""),
            (
                "norm/add_rms_norm_backward.cuh",
                "through_y(sums[1], sums[2]",
                "through_y(sums[0], sums[2]",
            ),
            (
                "norm/add_rms_norm_backward.cuh",
                "dx(sum * post_weight.vectors[i][j], x[j])",
                "dx(sum, x[j])",
            ),
            (
                "norm/add_rms_norm_backward.cuh",
                "p.weights.partial[1], next_sum",
                "p.weights.partial[0], next_sum",
            ),
        ],
        "test_one_result_is_not_used[emulated-residual]": [
            (
                "norm/add_rms_norm_backward.cuh",
                "p.grad_residual_stride, p.grad_residual),",
                "p.grad_residual_stride, true),",
            ),
        ],
    },
    "moe_norm_backward": {
        "test_gradients[emulated-(40, 104)-float32]": [
            (
                "norm/moe_norm_backward.cuh",
                "for (float& s : scale.vectors[i].data) s *= p.factor;",
                "for (float& s : scale.vectors[i].data) s *= 1.0f;",
            ),
            ("norm/moe_norm_backward.cuh", "vectors[i][j] * n * p.factor;", "vectors[i][j] * n;"),
            ("norm/moe_norm_backward.cuh", "sums[1] += grad_n(i, j) * x[j];", "sums[1] += x[j];"),
            ("norm/moe_norm_backward.cuh", "partial[1], scale_sum", "partial[0], scale_sum"),
        ],
        "test_one_result_is_not_used[emulated-router_x]": [
            ("norm/moe_norm_backward.cuh", "exists && p.grad_router_x)", "exists)"),
        ],
    },
    "qkv_norm_rope_backward": {
        "test_gradients[emulated-more tokens than blocks-float32]": [
            ("norm/qkv_norm_rope_backward.cuh", "b * cos - a * sin", "b * cos + a * sin"),
            ("norm/qkv_norm_rope_backward.cuh", "add_to(k_sum);", "add_to(q_sum);"),
            (
                "norm/qkv_norm_rope_backward.cuh",
                "  __syncthreads();  // the sums that were there before have been read\n",
                "",
            ),
            (
                "norm/qkv_norm_rope_backward.cuh",
                "back.y * weight_b[j]",
                "back.y * weight_a[j]",
            ),
        ],
        "test_gradients[emulated-full, V from K-float32]": [
            ("norm/qkv_norm_rope_backward.cuh", "f.v ? nullptr : of(p.grad_v)", "nullptr"),
        ],
        "test_gradients[emulated-more heads than groups-float32]": [
            ("norm/qkv_norm_rope_backward.cuh", "first += groups", "first += 2 * groups"),
        ],
    },
}
