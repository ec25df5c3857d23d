FAULTS = {
    "qkv_norm_rope": {
        "test_cos_and_sin_to_the_last_bits[emulated-1.0]": [
            ("common/math.cuh", "-1.9515295891e-4f", "-1.3e-4f"),
            ("common/math.cuh", "2.443315711809948e-5f", "3.4e-5f"),
        ],
        "test_qkv_norm_rope[emulated-one token-float32]": [
            (
                "norm/heads.cuh",
                "x * by.cos[i][j] - y * by.sin[i][j]",
                "x * by.cos[i][j] + y * by.sin[i][j]",
            ),
            ("norm/heads.cuh", "kHalf = kHeadDim / 2;", "kHalf = kHeadDim / 4;"),
            ("norm/heads.cuh", "lane_sum<Lanes::kLanes>(sum)", "lane_sum(sum)"),
            ("norm/heads.cuh", "kHeadDim, eps)", "kHeadDim / 2, eps)"),
            (
                "norm/heads.cuh",
                "out_a.set(j, a.vectors[i][j] * scale);",
                "out_a.set(j, a.vectors[i][j]);",
            ),
            (
                "norm/heads.cuh",
                "b.vectors[i][j] * scale * weight_b[j]",
                "b.vectors[i][j] * scale * weight_a[j]",
            ),
            (
                "norm/qkv_norm_rope.cuh",
                "static_cast<const W*>(p.k_weight)",
                "static_cast<const W*>(p.q_weight)",
            ),
            (
                "common/math.cuh",
                "if ((quadrant + 1) & 2) cos = -cos;",
                "if (quadrant & 2) cos = -cos;",
            ),
        ],
        "test_traffic.py::test_traffic[qkv_norm_rope, sliding-bf16]": [
            ("norm/qkv_norm_rope.cuh", "if (is_v) h -= p.kv_heads;", ""),
            (
                "norm/qkv_norm_rope.cuh",
                "const bool has_head = first + group < num_heads(p);",
                "const bool has_head = first + group < num_heads(p) - 1;",
            ),
        ],
        "test_qkv_norm_rope[emulated-smallest head-float32]": [
            (
                "norm/qkv_norm_rope.cuh",
                "token * p.q_stride + h * p.q_head_stride",
                "token * p.q_head_stride * p.q_heads + h * p.q_head_stride",
            ),
            ("common/math.cuh", "  r = fmaf(-quarters, -4.37113900018624283e-8f, r);\n", ""),
        ],
    },
    "qkv_norm_rope_cache": {
        "test_qkv_norm_rope_cache[emulated-dropped tokens-float32]": [
            ("norm/qkv_norm_rope.cuh", "slot >= 0 && slot < p.num_slots", "slot < p.num_slots"),
        ],
        "test_qkv_norm_rope_cache[emulated-rows-float32]": [
            (
                "norm/qkv_norm_rope.cuh",
                "p.slots.data ? index_at(p.slots, token) : token;\n    const Rotation",
                "token;\n    const Rotation",
            ),
            ("norm/qkv_norm_rope.cuh", "row = slot * p.kv_heads + h, to", "row = slot, to"),
        ],
        "test_traffic.py::test_traffic[qkv_norm_rope_cache-bf16]": [
            ("common/indices.cuh", "indices.is_64 ?", "!indices.is_64 ?"),
        ],
        "test_e4m3_cache.py::test_of_two_codes_alike_near_the_even_one_is_taken[emulated]": [
            ("common/e4m3.cuh", "0x7ffff + (bits >> 20 & 1)", "0x80000"),
            ("common/e4m3.cuh", "size < 0x1p-6f ? small", "size < 0x1p-7f ? small"),
        ],
        "test_e4m3_cache.py::test_qkv_norm_rope_cache[emulated-sizes2-alike-bf16]": [
            ("norm/heads.cuh", "most = lane_max<Lanes::kLanes>(most);", ""),
            (
                "norm/heads.cuh",
                "if (lane == 0) scales[row] = scale;",
                "if (lane == 0) scales[0] = scale;",
            ),
        ],
        "test_a_slot_past_the_cache_writes_nothing[emulated]": [
            ("norm/qkv_norm_rope.cuh", "slot >= 0 && slot < p.num_slots", "slot >= 0"),
        ],
    },
}
