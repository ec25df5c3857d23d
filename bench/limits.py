"""What Gemma 4's shapes cannot do without: bytes, FLOP, and the seconds of both, which are floors.

A floor is what no kernel can beat: bytes read and written once at the rate of copies, useful
products at the rate of GEMMs. What kernels add to it is in estimates.py.
"""

import dataclasses

from gemma4 import Gemma4TextConfig
from gemma4.config import FULL
from gemma4.presets import RELEASED

# An H100 SXM's copies and torch's bf16 GEMMs, as others measured them: 90 % of the nominal
# bandwidth and 84 % of what its tensor cores do at the clock in estimates.py.
DRAM, GEMM = 3.0e12, 798e12
MODELS = {n: Gemma4TextConfig.preset(n) for n in RELEASED}
FEW_EXPERTS = "26B-A4B of 16 experts"  # as many as a CPU can do
MODELS[FEW_EXPERTS] = dataclasses.replace(MODELS["26B-A4B"], num_experts=16)
BYTES = 2  # of a value: bf16
PACKED_BYTES = 0.5 + 2 / 32  # of a number in four bits, with 16 for the scale of 32


def visible_pairs(tokens: int, keys: int, window: int) -> int:
    """(query, key) pairs that a causal mask leaves; the queries are the tail of the keys."""
    if not window or window >= keys:
        return tokens * (keys - tokens) + tokens * (tokens + 1) // 2
    full = min(tokens, max(0, keys - window + 1))  # queries that see a whole window
    first = keys - tokens
    return full * window + sum(range(first + 1, first + tokens - full + 1))


def floor(dram: float, flop: float = 0.0) -> float:
    """Seconds."""
    return max(dram / DRAM, flop / GEMM)


def row_bytes(model: str, op: str, tokens: int) -> int:
    """Activations of a row kernel, read and written once."""
    c = MODELS[model]
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    return BYTES * tokens * {
        "rms_norm": 2 * c.hidden_size,
        "rms_norm_backward": 3 * c.hidden_size,
        "add_rms_norm": 4 * c.hidden_size,
        "add_rms_norm_backward": 6 * c.hidden_size,
        "moe_norm": 3 * c.hidden_size,
        "moe_norm_backward": 4 * c.hidden_size,
        "qkv_norm_rope": 2 * heads * c.head_dim,
        "qkv_norm_rope_backward": 3 * heads * c.head_dim,
        "qkv_norm_rope_cache": 2 * heads * c.head_dim,
        "geglu": 3 * c.intermediate_size,
        "geglu_backward": 5 * c.intermediate_size,
        "ple_embed": 3 * c.num_hidden_layers * c.hidden_size_per_layer_input,
        "ple_gate": 3 * c.hidden_size_per_layer_input,
        "ple_gate_backward": 5 * c.hidden_size_per_layer_input,
        "softcap": 2 * c.vocab_size,
        "softcap_argmax": c.vocab_size,
        "softcap_cross_entropy": c.vocab_size,
        "softcap_cross_entropy_backward": 2 * c.vocab_size,
        "sample": c.vocab_size,
    }[op]  # fmt: skip


def linear_shapes(model: str) -> dict[str, tuple[int, int]]:
    """Rows and columns of the weights of a decoding step's products, of its widest layers."""
    c, width = MODELS[model], MODELS[model].hidden_size
    size, heads = c.head_size(FULL), c.num_attention_heads
    kv_heads = c.kv_heads(FULL) * (1 if c.attention_k_eq_v else 2)
    hidden, ple = max(map(c.mlp_width, range(c.num_hidden_layers))), c.hidden_size_per_layer_input
    shapes = {
        "q, k, v": ((heads + kv_heads) * size, width),
        "o": (width, heads * size),
        "gate and up": (2 * hidden, width),
        "down": (width, hidden),
    }
    return shapes | ({"PLE gate": (ple, width), "PLE projection": (width, ple)} if ple else {})


def linear_bytes(model: str, part: str, tokens: int) -> int:
    """The weights, and x and y once each."""
    rows, width = linear_shapes(model)[part]
    return BYTES * (rows * width + tokens * (rows + width))


def packed_bytes(model: str, part: str, tokens: int) -> float:
    """The same of a packed weight."""
    rows, width = linear_shapes(model)[part]
    return rows * width * PACKED_BYTES + BYTES * tokens * (rows + width)


def attention_bytes(
    model: str, kind: str, tokens: int, keys: int, batch: int = 1, coded: bool = False
) -> int:
    """Queries read and outputs written, and the visible keys and values read, once each; coded keys
    have a byte a number and a scale of fp32."""
    c, size = MODELS[model], MODELS[model].head_size(kind)
    window = c.window(kind)[0]
    seen = min(keys, window + tokens - 1) if window else keys
    of_key = size + 4 if coded else BYTES * size
    queries = BYTES * tokens * c.num_attention_heads * size
    return 2 * batch * (queries + seen * c.kv_heads(kind) * of_key)


def attention_flop(model: str, kind: str, tokens: int, keys: int, batch: int = 1) -> int:
    """Of the pairs that the mask leaves."""
    c = MODELS[model]
    pairs = visible_pairs(tokens, keys, c.window(kind)[0])
    return 4 * batch * pairs * c.num_attention_heads * c.head_size(kind)


def attention_backward_bytes(model: str, kind: str, tokens: int) -> int:
    """q, out, grad_out, k and v read, and the gradients of q, k and v written, once each."""
    return 2 * attention_bytes(model, kind, tokens, tokens)


def attention_backward_flop(model: str, kind: str, tokens: int) -> float:
    """Five products where the forward has two."""
    return 2.5 * attention_flop(model, kind, tokens, tokens)


def expert_bytes(model: str) -> int:
    c = MODELS[model]
    return BYTES * 3 * c.hidden_size * c.moe_intermediate_size


def touched_experts(model: str, tokens: int) -> float:
    """Of a uniform routing, on average."""
    c = MODELS[model]
    return c.num_experts * (1 - (1 - c.top_k_experts / c.num_experts) ** tokens)


def moe_flop(model: str, tokens: int) -> int:
    c = MODELS[model]
    return 2 * tokens * c.top_k_experts * 3 * c.hidden_size * c.moe_intermediate_size


def moe_bytes(model: str, tokens: int, packed: bool = False) -> float:
    c = MODELS[model]
    of_expert = expert_bytes(model) * (PACKED_BYTES / BYTES if packed else 1)
    return touched_experts(model, tokens) * of_expert + 2 * BYTES * tokens * c.hidden_size


def moe_backward_bytes(model: str, tokens: int) -> float:
    """As the forward's, with a gradient of every expert, and dx beside y's gradient and x."""
    c = MODELS[model]
    written = c.num_experts * expert_bytes(model) + BYTES * tokens * c.hidden_size
    return moe_bytes(model, tokens) + written


def moe_open_bytes(model: str, tokens: int) -> int:
    """The weights, and x, the residual, hidden, the experts' input and the residual once each."""
    c = MODELS[model]
    rows = 2 * c.intermediate_size + c.num_experts
    made = c.intermediate_size + c.num_experts + 4 * c.hidden_size
    return BYTES * (rows * c.hidden_size + tokens * made)
