LOSS = "linear/softcap_cross_entropy.cuh"
LOSS_BACKWARD = "linear/softcap_cross_entropy_backward.cuh"

FAULTS = {
    "softcap": {
        "test_softcap[emulated-one value-float32]": [
            ("common/math.cuh", "cap * tanhf(x / cap)", "tanhf(x / cap)"),
            ("common/math.cuh", "cap * tanhf(x / cap)", "cap * tanhf(cap * tanhf(x / cap) / cap)"),
            ("common/elementwise.cuh", "if (column >= width) return;", ""),
            (
                "linear/softcap.cu",
                "aligned ? p.width / kWidth : p.width",
                "p.width / kWidth",
            ),
        ],
        "test_strided[emulated-columns]": [
            ("linear/softcap.cuh", "row * p.stride + column", "row * p.width + column"),
            ("linear/softcap.cuh", "  ptx::wait_for_previous_kernel();\n", ""),
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
            ("linear/softcap_argmax.cuh", "lane_max(best)", "lane_max<16>(best)"),
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
    "sample": {
        "test_sample[emulated-best of parts-float32]": [
            ("linear/sample.cuh", "  ptx::wait_for_previous_kernel();\n", ""),
            ("linear/sample.cuh", "ptx::load_16_coherent(kept", "ptx::load_16(kept"),
            ("common/ptx/barrier.h", "return a + b; }, 1, true", "return a + b; }, 1, false"),
            ("linear/sample.cuh", "      if (smem.last) counters[group] = 0;\n", ""),
            ("linear/sample.cuh", "== others - 1u", "== fan - 1u"),
            ("linear/sample.cuh", "    if (!smem.last) return;\n", ""),
        ],
        "test_sample[emulated-top_k of parts-float32]": [
            (
                "linear/sample.cuh",
                "    __syncthreads();\n    if (threadIdx.x == 0) {",
                "    if (threadIdx.x == 0) {",
            ),
            ("linear/sample.cuh", "if (all >= k) bound", "if (all > k) bound"),
            ("linear/sample.cuh", "if (w < warp) to +=", "if (w <= warp) to +="),
        ],
        "test_sample[emulated-top_k in three rounds-float32]": [
            ("linear/sample.cuh", "    kept += nodes * p.slots;\n", ""),
            ("linear/sample.cuh", "    counters += nodes;\n", ""),
            ("linear/sample.cuh", "kept + group * fan * p.slots", "kept"),
        ],
        "test_sample[emulated-all-float32]": [
            ("linear/sample.cuh", "(column + j) / 4, position)", "(column + j) / 4, 0)"),
            ("linear/sample.cuh", "column % 4 : j % 4", "0 : j % 4"),
        ],
        "test_sample[emulated-top_k-float32]": [
            ("linear/sample.cuh", "token / 4, position), token % 4", "token / 4, 0), token % 4"),
            ("linear/sample.cuh", "philox(p.seeds[row], token", "philox(p.seeds[0], token"),
            (
                "linear/sample.cuh",
                "  __syncthreads();\n  if (unsorted)",
                "  if (unsorted)",
            ),
        ],
        "test_sample[emulated-top_p-float32]": [
            ("linear/sample.cuh", "p.top_p < 1.0f && before", "p.top_p < 0.0f && before"),
        ],
        "test_sample[emulated-top_p of one-float32]": [
            (
                "linear/sample.cuh",
                "j < min(i, p.k); j++) before",
                "j < min(i, p.k) - 1; j++) before",
            ),
            ("linear/sample.cuh", "j < min(i, p.k)", "j <= min(i, p.k)"),
        ],
        "test_sample[emulated-min_p-float32]": [
            ("linear/sample.cuh", "mass < p.min_p", "mass < p.min_p * all"),
        ],
        "test_sample[emulated-all, capped-float32]": [
            ("linear/sample.cuh", "if (p.cap > 0.0f) value", "if (p.cap < 0.0f) value"),
        ],
        "test_equals_go_to_the_lower_index[emulated-float32]": [
            (
                "common/order.cuh",
                "<< 32 | ~static_cast<unsigned>(index)",
                "<< 32 | static_cast<unsigned>(index)",
            ),
            ("linear/sample.cuh", "int bit = 63; bit >= 0", "int bit = 63; bit >= 32"),
        ],
        "test_ends_of_rows[emulated-{}]": [
            ("linear/sample.cuh", "p.done[row] ? p.pad : index_of(winner)", "index_of(winner)"),
            ("linear/sample.cuh", "i < p.eos_count", "i < p.eos_count - 1"),
        ],
    },
    "softcap_cross_entropy": {
        "test_softcap_cross_entropy[emulated-several rounds-float32]": [
            (LOSS, "mine.sum * ptx::exp2_approx(mine.top - top)", "mine.sum"),
            (LOSS, "    sum *= ptx::exp2_approx(top - higher);\n", ""),
            (LOSS, "  __syncthreads();\n", ""),
            (LOSS, "lse - capped(to_float(logits[target]))", "lse - to_float(logits[target])"),
        ],
        "test_softcap_cross_entropy[emulated-all alike-float32]": [
            (LOSS, "if (first + i * kStep >= p.width) break;", ""),
        ],
        "test_minus_infinity_has_no_share[emulated]": [
            (LOSS, "float top = -FLT_MAX", "float top = -INFINITY"),
        ],
    },
    "softcap_cross_entropy_backward": {
        "test_softcap_cross_entropy.py::test_gradient[emulated-ragged-float32]": [
            (LOSS_BACKWARD, "of_target + p.grad_lse[row]", "of_target"),
            (LOSS_BACKWARD, "grad * y.slope", "grad"),
            (LOSS_BACKWARD, "if (target != kIgnoredTarget)", "if (target != -1)"),
        ],
        "test_softcap_cross_entropy.py::test_gradient[emulated-several rounds-float32]": [
            (LOSS_BACKWARD, "if (column + j == target) grad", "if (column == target) grad"),
        ],
        "test_softcap_cross_entropy.py::test_gradient_over_the_logits[emulated-several rounds]": [
            (LOSS_BACKWARD, "load_fresh<kWidth>", "load_once<kWidth>"),
        ],
        "test_softcap_cross_entropy.py::test_strided[emulated-columns]": [
            (LOSS_BACKWARD, "row * p.stride + column", "row * p.width + column"),
        ],
    },
}
