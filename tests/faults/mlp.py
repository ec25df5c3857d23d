FAULTS = {
    "geglu": {
        "test_fp16_saturates[emulated]": [
            ("common/platform.h", "x < -kMost ? -kMost : x;", "x;"),
        ],
        "test_geglu[emulated-one value-float32]": [
            (
                "linear/geglu.cuh",
                "load_once<kWidth>(gate_up + p.width)",
                "load_once<kWidth>(gate_up)",
            ),
            ("linear/geglu.cuh", "gelu_tanh(gate[j]) * up[j]", "gate[j] * gelu_tanh(up[j])"),
            ("linear/geglu.cuh", "if (column >= p.width) return;", ""),
            ("common/math.cuh", "0.044715f * x * x * x", "0.044715f * x * x"),
            ("common/math.cuh", "expf(-2.0f * u)", "expf(-u)"),
        ],
        "test_strided[emulated-columns]": [
            ("linear/geglu.cuh", "row * p.stride + column", "row * p.width * 2 + column"),
        ],
        "test_geglu[emulated-odd half-float32]": [
            ("linear/geglu.cuh", "row += gridDim.y * blockDim.y", "row += gridDim.y"),
        ],
    },
}
