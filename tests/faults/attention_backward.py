BACKWARD = "attention/attention_prefill_backward.cuh"
FAULTS = {
    "attention_prefill_backward": {
        "test_traffic_attention.py::test_prefill_backward_work[(64, 99)]": [
            (
                BACKWARD,
                "ptx::cp_async_wait<1>();\n    __syncthreads();\n",
                "ptx::cp_async_wait<1>();\n",
            ),
            (
                BACKWARD,
                "ptx::cp_async_wait<1>();\n    __syncthreads();\n",
                "ptx::cp_async_wait<2>();\n    __syncthreads();\n",
            ),
            (
                BACKWARD,
                "ptx::cp_async_wait<0>();\n    __syncthreads();\n",
                "ptx::cp_async_wait<0>();\n",
            ),
            (
                BACKWARD,
                "ptx::cp_async_wait<0>();\n    __syncthreads();\n",
                "ptx::cp_async_wait<1>();\n    __syncthreads();\n",
            ),
            (BACKWARD, "p_pairs, smem.w);\n      __syncthreads();\n", "p_pairs, smem.w);\n"),
            (BACKWARD, "ds_pairs, smem.u);\n    __syncthreads();\n", "ds_pairs, smem.u);\n"),
            ("attention/epilogue.cuh", "__syncwarp();\n", ""),
            (
                BACKWARD,
                "(end - s.first()) * queries.group",
                "(end - s.first() - 1) * queries.group",
            ),
        ],
        "test_traffic_attention.py::test_prefill_backward_work[(256, 99)]": [
            (BACKWARD, "if constexpr (Tile::kColumnWarps > 1) __syncthreads();", ""),
        ],
        "test_gradient[emulated-one token-out-torch.bfloat16]": [
            (BACKWARD, "ds -= kOfKeys", "ds -= true ? 0.0f : kOfKeys"),
            ("attention/sequence.cuh", "g * group.divisor + row % group", "row % group"),
        ],
        "test_gradient[emulated-one token-out and lse-torch.bfloat16]": [
            (BACKWARD, "sum - p.grad_lse[at]", "sum"),
            (BACKWARD, "key - query > right", "key - query >= right"),
        ],
        "test_gradient[emulated-softcap-out-torch.bfloat16]": [
            (BACKWARD, "ds *= 1.0f - (x", "ds *= 1.0f + (x"),
        ],
        "test_gradient[emulated-scale-out-torch.bfloat16]": [
            (BACKWARD, "by_u, f.scale,", "by_u, 1.0f,"),
        ],
        "test_gradient[emulated-window-out-torch.bfloat16]": [
            (BACKWARD, "query - key >= left", "query - key > left"),
            (BACKWARD, "min(last + min(window.left", "min(first + min(window.left"),
        ],
        "test_gradient[emulated-left only, no or one key out-out-torch.bfloat16]": [
            (BACKWARD, "q_high - k_low >= left", "q_high - k_low > left"),
        ],
        "test_gradient[emulated-more queries than keys-out-torch.bfloat16]": [
            (BACKWARD, "lse == -INFINITY ? INFINITY :", "false ? INFINITY :"),
        ],
        "test_gradient[emulated-full heads-out-torch.bfloat16]": [
            (BACKWARD, "k_high - q_low > right", "k_high - q_low - 1 > right"),
        ],
        "test_scores_far_below_zero[emulated]": [
            (BACKWARD, "|| k_high >= keys;", ";"),
            (BACKWARD, "first_row + i < range.end ? log2_sum", "true ? log2_sum"),
        ],
        "test_gradient[emulated-below a tile-out-torch.bfloat16]": [
            (
                BACKWARD,
                "max(first - window.right, s.first())",
                "max(last - window.right, s.first())",
            ),
            (BACKWARD, ": own.delta[i]", ": own.delta[0]"),
        ],
        "test_gradient[emulated-sliding heads-out-torch.bfloat16]": [
            (
                "attention/products.cuh",
                "[first_warp + w * Tile::kRowWarps]",
                "[w * Tile::kRowWarps]",
            ),
        ],
        "test_strided[emulated-0]": [
            (
                BACKWARD,
                "smem.rows[iteration % 2].u, first_row",
                "smem.rows[iteration % 2].w, first_row",
            ),
        ],
        "test_gradient[emulated-exact tile-out-torch.bfloat16]": [
            (
                BACKWARD,
                "tiles.load_rows(iteration + 1, row + kKeys);",
                "tiles.load_rows(iteration + 1, row);",
            ),
        ],
        "test_tokens_outside_of_all_sequences[emulated]": [
            (
                "attention/attention_prefill_backward.cu",
                "clear(device, name, p.grad_k,",
                "(void)sizeof(p.grad_k,",
            ),
        ],
    },
}
