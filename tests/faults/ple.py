BACKWARD = "linear/gelu_mul_backward.cuh"

FAULTS = {
    "ple_embed": {
        "test_ple_embed[emulated-ids of no row-float32]": [
            ("ple/ple_embed.cuh", "id < p.vocabulary", "id <= p.vocabulary"),
            ("ple/ple_embed.cuh", "id >= 0 &&", ""),
            ("ple/ple_embed.cuh", "  ptx::wait_for_previous_kernel();\n", ""),
        ],
        "test_ple_embed[emulated-one token-float32]": [
            (
                "ple/ple_embed.cuh",
                "y[j] * p.token_scale) * kInverseRoot2",
                "y[j]) * kInverseRoot2",
            ),
            (
                "ple/ple_embed.cuh",
                "y[j] * p.token_scale) * kInverseRoot2",
                "y[j] * p.token_scale)",
            ),
        ],
        "test_eps[emulated]": [
            ("ple/ple_embed.cuh", "p.width, p.eps)", "p.width, 0.0f)"),
        ],
        "test_ple_embed[emulated-repeated ids-float32]": [
            ("ple/ple_embed.cuh", "id * p.table_stride + offset", "id * p.table_stride"),
        ],
        "test_int32_ids_and_strided_rows[emulated]": [
            ("ple/ple_embed.cuh", "token * p.projected_stride", "token * p.table_stride"),
        ],
        "test_mixed_dtypes[emulated-E2B-autocast to bf16]": [
            (
                "ple/ple_embed.cu",
                "if (aligned && p.width <= 32 * kWidth)",
                "if (aligned && p.width <= 32 * kFullWidth<T>)",
            ),
        ],
        "test_ple_embed[emulated-E2B-float32]": [
            ("ple/ple_embed.cuh", "{p.width, lane, 32}", "{p.width, lane, 16}"),
        ],
    },
    "ple_gate": {
        "test_ple_gate[emulated-odd width-float32]": [
            ("linear/gelu_mul.cuh", "row * p.other_stride", "row * p.gate_stride"),
        ],
        "test_ple_gate[emulated-one token-float32]": [
            ("linear/gelu_mul.cuh", "gated<R>(gate[j], other[j])", "gate[j] * other[j]"),
            ("linear/gelu_mul.cuh", "load_fresh<kWidth>(gate_row", "load_once<kWidth>(gate_row"),
            ("common/elementwise.cuh", "if (column >= width) return;", ""),
        ],
        "test_strided[emulated]": [
            ("linear/gelu_mul.cuh", "row * p.width + column, y", "row * p.gate_stride + column, y"),
        ],
        "test_layers_that_start_anywhere[emulated]": [
            ("linear/gelu_mul.cu", "are_aligned<R>(p.other, p.other_stride, p.width) &&", ""),
        ],
    },
    "ple_gate_backward": {
        "test_ple_gate.py::test_gradient[emulated-odd width-float32]": [
            (BACKWARD, "row * p.other_stride", "row * p.gate_stride"),
        ],
        "test_ple_gate.py::test_gradient[emulated-one token-float32]": [
            (BACKWARD, "load_fresh<kWidth>(grad_row", "load_once<kWidth>(grad_row"),
            (BACKWARD, "d_gate.set(j, gradient.d_gate)", "d_gate.set(j, gradient.d_other)"),
        ],
        "test_ple_gate.py::test_gradient_of_one_input[emulated-ple]": [
            (BACKWARD, "if (p.d_gate) store(", "store("),
        ],
        "test_ple_gate.py::test_what_is_held_back_passes_nothing[emulated]": [
            ("common/math.cuh", "if (fabsf(product) > fabsf(held)) grad = 0.0f;", ""),
        ],
    },
}
