FAULTS = {
    "ple_embed": {
        "test_ple_embed[emulated-ids of no row-float32]": [
            (
                "ple/ple_embed.cuh",
                "(column(i) >= p.width) continue;\n        if (known)",
                "(column(i) >= p.width) continue;\n        if (known || id == p.vocabulary)",
            ),
            (
                "ple/ple_embed.cuh",
                "(column(i) >= p.width) continue;\n        if (known)",
                "(column(i) >= p.width) continue;\n        if (known || id < 0)",
            ),
        ],
        "test_ple_embed[emulated-one token-float32]": [
            (
                "ple/ple_embed.cuh",
                "row[i][j] * p.token_scale) * kInverseRoot2",
                "row[i][j]) * kInverseRoot2",
            ),
            (
                "ple/ple_embed.cuh",
                "row[i][j] * p.token_scale) * kInverseRoot2",
                "row[i][j] * p.token_scale)",
            ),
        ],
        "test_eps[emulated]": [
            (
                "ple/ple_embed.cuh",
                "(lane_sum(sum) / p.width + p.eps);\n#pragma",
                "(lane_sum(sum) / p.width);\n#pragma",
            ),
        ],
        "test_ple_embed[emulated-repeated ids-float32]": [
            (
                "ple/ple_embed.cuh",
                "table = static_cast<const R*>(p.table) + id * p.table_stride + offset;\n"
                "      const T* projected",
                "table = static_cast<const R*>(p.table) + id * p.table_stride;\n"
                "      const T* projected",
            ),
        ],
        "test_int32_ids_and_strided_rows[emulated]": [
            (
                "ple/ple_embed.cuh",
                "token * p.projected_stride + offset;\n      R* y = static_cast<R*>(p.y) "
                "+ (token * p.layers + layer) * p.width;\n      Vec",
                "token * p.table_stride + offset;\n      R* y = static_cast<R*>(p.y) "
                "+ (token * p.layers + layer) * p.width;\n      Vec",
            ),
        ],
        "test_mixed_dtypes[emulated-E2B-autocast to bf16]": [
            (
                "ple/ple_embed.cu",
                "if (in_pieces && p.width <= 32 * kWidth)",
                "if (in_pieces && p.width <= 32 * kFullWidth<T>)",
            ),
        ],
        "test_ple_embed[emulated-E2B-float32]": [
            ("ple/ple_embed.cuh", "(piece * 32 + lane) * kWidth", "(piece * 16 + lane) * kWidth"),
        ],
    },
    "ple_gate": {
        "test_ple_gate[emulated-odd width-float32]": [
            ("ple/ple_gate.cuh", "row * p.ple_stride", "row * p.gate_stride"),
        ],
        "test_ple_gate[emulated-one token-float32]": [
            ("ple/ple_gate.cuh", "gelu_tanh(gate[j]) * ple[j]", "gate[j] * ple[j]"),
            ("ple/ple_gate.cuh", "if (column >= p.width) return;", ""),
        ],
        "test_strided[emulated]": [
            ("ple/ple_gate.cuh", "row * p.width + column, y", "row * p.gate_stride + column, y"),
        ],
        "test_layers_that_start_anywhere[emulated]": [
            ("ple/ple_gate.cu", "in_pieces_of_16<R>(p.ple, p.ple_stride, p.width) &&", ""),
        ],
    },
}
