"""The released text models: what sets each apart from the defaults of `Gemma4TextConfig`."""

from .config_file import FULL, SLIDING
from .files import Json


def _pattern(sliding: int, repeats: int) -> list[str]:
    return ([SLIDING] * sliding + [FULL]) * repeats


_E = dict(final_logit_softcapping=30.0, num_attention_heads=8)
_LARGE = dict(
    final_logit_softcapping=30.0,
    attention_k_eq_v=True,
    hidden_size_per_layer_input=0,
    sliding_window=1024,
    max_position_embeddings=262_144,
    use_bidirectional_attention="vision",
)
RELEASED: dict[str, Json] = {
    "E2B": dict(
        **_E,
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        num_key_value_heads=1,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        layer_types=_pattern(4, 7),
    ),
    "E4B": dict(
        **_E,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=42,
        num_key_value_heads=2,
        num_kv_shared_layers=18,
        layer_types=_pattern(5, 7),
    ),
    "12B": dict(
        **_LARGE,
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=1,
        layer_types=_pattern(5, 8),
    ),
    "26B-A4B": dict(
        **_LARGE,
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        layer_types=_pattern(5, 5),
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "31B": dict(
        **_LARGE,
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
        layer_types=_pattern(5, 10),
    ),
}
