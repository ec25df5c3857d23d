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
            ("linear/softcap_argmax.cuh", "step = 16; step > 0", "step = 8; step > 0"),
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
}
