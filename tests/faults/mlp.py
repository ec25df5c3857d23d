BACKWARD = "linear/gelu_mul_backward.cuh"

FAULTS = {
    "geglu": {
        "test_fp16_saturates[emulated]": [
            ("common/platform.h", "x < -kMost ? -kMost : x;", "x;"),
        ],
        "test_geglu[emulated-one value-float32]": [
            ("linear/gelu_mul.cuh", "load_fresh<kWidth>(other_row", "load_fresh<kWidth>(gate_row"),
            ("linear/gelu_mul.cuh", "  ptx::wait_for_previous_kernel();\n", ""),
            (
                "linear/gelu_mul.cuh",
                "gated<R>(gate[j], other[j])",
                "gated<R>(other[j], gate[j])",
            ),
            ("common/elementwise.cuh", "if (column >= width) return;", ""),
            ("common/math.cuh", "0.044715f * x * x * x", "0.044715f * x * x"),
            ("common/math.cuh", "expf(-2.0f * u)", "expf(-u)"),
        ],
        "test_strided[emulated-columns]": [
            ("linear/gelu_mul.cuh", "row * p.gate_stride", "row * p.width * 2"),
        ],
        "test_geglu[emulated-odd half-float32]": [
            ("common/elementwise.cuh", "row += gridDim.y * blockDim.y", "row += gridDim.y"),
        ],
    },
    "geglu_backward": {
        "test_geglu.py::test_gradient[emulated-batch-float32]": [
            (BACKWARD, "row * p.d_stride + column", "row * p.width + column"),
            (BACKWARD, "if (p.d_other) store(", "if (false) store("),
            (BACKWARD, "load_fresh<kWidth>(other_row", "load_fresh<kWidth>(gate_row"),
            (BACKWARD, "  ptx::wait_for_previous_kernel();\n", ""),
            ("common/math.cuh", "u_slope * share * (1.0f - share)", "u_slope * share"),
        ],
        "test_geglu.py::test_gradient[emulated-odd half-float32]": [
            (
                "linear/gelu_mul_backward.cu",
                "aligned ? p.width / kWidth : p.width",
                "p.width / kWidth",
            ),
        ],
        "test_geglu.py::test_gradient_of_strided[emulated-columns]": [
            (BACKWARD, "row * p.grad_stride", "row * p.width"),
        ],
    },
}
