"""Floors of Gemma 4's shapes, and estimates of times on an H100: arithmetic, nothing measured.

An estimate is the largest of five bounds, each as if it were alone and fully used: bytes from DRAM,
bytes from L2, bytes through shared memory, tensor work, instructions issued. A kernel may well take
twice as long. A floor is
what no kernel can beat: bytes read and written once, useful products at the GEMM rate.
"""

import dataclasses
import math
import re

from gemma4 import Gemma4TextConfig
from gemma4.config import FULL, SLIDING
from gemma4.presets import RELEASED

# An H100 SXM: copy bandwidth and torch's bf16 GEMM rate as others measured them; the bandwidth of
# L2, which agrees with published attention kernels; the clock; mma.sync at 62 % of wgmma's rate.
DRAM, GEMM = 3.0e12, 798e12
L2, CLOCK, MMA_SYNC = 5.5e12, 1.755e9, 0.62
SHARED = 132 * 128 * CLOCK  # bytes a second
ISSUE = 132 * 4 * CLOCK  # warp instructions a second
ASSUMPTIONS = (
    f"Taken as given, for an H100 SXM: copies of {DRAM / 1e12} TB/s, bf16 GEMMs of "
    f"{GEMM / 1e12:.0f} TFLOP/s,\n{L2 / 1e12} TB/s from L2, {CLOCK / 1e9} GHz, mma.sync at "
    f"{MMA_SYNC:.0%} of wgmma's rate"
)
MODELS = {n: Gemma4TextConfig.preset(n) for n in RELEASED}
FEW_EXPERTS = "26B-A4B of 16 experts"  # as many as a CPU can do
MODELS[FEW_EXPERTS] = dataclasses.replace(MODELS["26B-A4B"], num_experts=16)
BYTES = 2  # of a value: bf16


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


def estimate(
    case: str,
    dram: float,
    useful: float = 0.0,
    l2: float = 0.0,
    shared: float = 0.0,
    work: float = 0.0,
    kernel: dict | None = None,
    turn: int = 0,
) -> dict:
    """`useful` and `work`: FLOP needed and done, by the kernel of this row of the static report,
    whose main loop has so many tensor instructions a turn (0: as many as stand in it)."""
    bounds = {"dram": dram / DRAM, "l2": l2 / L2, "shared": shared / SHARED}
    if kernel:
        bounds["tensor"] = work / GEMM / (1 if uses_wgmma(kernel) else MMA_SYNC)
        bounds["issue"] = work / flop_of_one(kernel) * instructions_for_one(kernel, turn) / ISSUE
    limit = max(bounds, key=bounds.get)
    return {
        "case": case,
        "floor_us": round(floor(dram, useful) * 1e6, 1),
        "estimate_us": round(bounds[limit] * 1e6, 1),
        "bound_by": limit,
        **{f"{name}_us": round(seconds * 1e6, 1) for name, seconds in bounds.items()},
    }


def instructions_for_one(kernel: dict, turn: int = 0) -> float:
    """Instructions of the main loop for each tensor instruction. What an inner loop repeats counts
    as often as it runs; ways that a call does not take count too, so that fewer may be issued."""
    (tensor, instructions), (inner, inner_instructions) = kernel["loop"], kernel["inner_loop"]
    again = max(0, turn - tensor) / inner if inner else 0
    return (instructions + again * inner_instructions) / (tensor + again * inner)


def flop_of(instruction: str) -> int:
    """What one warp does in one of these: HMMA.16816, or its quarter of an HGMMA.64xNx16."""
    if match := re.fullmatch(r"HGMMA\.64x(\d+)x16", instruction):
        return 2 * 16 * int(match[1]) * 16
    return {"HMMA.16816": 2 * 16 * 8 * 16}[instruction]


def flop_of_one(kernel: dict) -> float:
    """What one warp does in a tensor instruction of the main loop, on average."""
    counts = kernel["tensor"]
    return sum(flop_of(name) * n for name, n in counts.items()) / sum(counts.values())


def uses_wgmma(kernel: dict) -> bool:
    return any(name.startswith("HGMMA") for name in kernel["tensor"])


def shared_bytes(
    tile: dict, size: int, wgmma: bool, own: int = 1, others: int = 2, exchanges: int = 1
) -> int:
    """What a block of attention moves through shared memory for one tile of keys.

    Two tiles copied in, with a read of an address, two wavefronts, for 512 bytes; `own` times its
    rows and `others` times the keys as operands of each warp, or of four with wgmma; partial
    scores, `exchanges` times.
    """
    rows, keys, parts = (tile[name] for name in ("rows", "keys", "column_warps"))
    copied = 2 * keys * size * BYTES * (512 + 256) // 512
    together = 64 if wgmma else 16
    operands = rows // together * (own * together + others * keys) * size * BYTES
    exchanged = exchanges * rows * parts * keys * 4 * (1 + parts) if parts > 1 else 0
    return copied + operands + exchanged


def row_bytes(model: str, op: str, tokens: int) -> int:
    """Activations of a row kernel, read and written once."""
    c = MODELS[model]
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    return BYTES * tokens * {
        "rms_norm": 2 * c.hidden_size,
        "add_rms_norm": 4 * c.hidden_size,
        "moe_norm": 3 * c.hidden_size,
        "qkv_norm_rope": 2 * heads * c.head_dim,
        "qkv_norm_rope_cache": 2 * heads * c.head_dim,
        "geglu": 3 * c.intermediate_size,
        "ple_embed": 3 * c.num_hidden_layers * c.hidden_size_per_layer_input,
        "ple_gate": 3 * c.hidden_size_per_layer_input,
        "softcap": 2 * c.vocab_size,
        "softcap_argmax": c.vocab_size,
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
    """The same of four bits a number and 16 for the scale of 32."""
    rows, width = linear_shapes(model)[part]
    return rows * width * (0.5 + 2 / 32) + BYTES * tokens * (rows + width)


def attention_bytes(model: str, kind: str, tokens: int, keys: int, batch: int = 1) -> int:
    """Queries read and outputs written, and the visible keys and values read, once each."""
    c = MODELS[model]
    window = c.window(kind)[0]
    seen = min(keys, window + tokens - 1) if window else keys
    rows = 2 * tokens * c.num_attention_heads + 2 * seen * c.kv_heads(kind)
    return BYTES * batch * rows * c.head_size(kind)


def attention_flop(model: str, kind: str, tokens: int, keys: int, batch: int = 1) -> int:
    """Of the pairs that the mask leaves."""
    c = MODELS[model]
    pairs = visible_pairs(tokens, keys, c.window(kind)[0])
    return 4 * batch * pairs * c.num_attention_heads * c.head_size(kind)


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


def moe_bytes(model: str, tokens: int) -> float:
    c = MODELS[model]
    return touched_experts(model, tokens) * expert_bytes(model) + 2 * BYTES * tokens * c.hidden_size


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


def row_estimates() -> list[dict]:
    cases = [
        ("rms_norm", "E4B", 8192),
        ("add_rms_norm", "26B-A4B", 8192),
        ("add_rms_norm", "31B", 8192),
        ("moe_norm", "26B-A4B", 8192),
        ("qkv_norm_rope", "E4B", 8192),
        ("qkv_norm_rope", "31B", 8192),
        ("geglu", "E4B", 8192),
        ("geglu", "31B", 8192),
        ("ple_embed", "E4B", 8192),
        ("ple_gate", "E4B", 8192),
        ("softcap_argmax", "31B", 64),
        ("sample", "31B", 1),
    ]
    rows = [
        estimate(f"{op}, {model}, {tokens} tokens", row_bytes(model, op, tokens))
        for op, model, tokens in cases
    ]
    linears = [("E4B", part) for part in linear_shapes("E4B")] + [("31B", "down")]
    return rows + [
        estimate(f"{op}, {model} {part}, 1 token", bytes_of(model, part, 1))
        for op, bytes_of in (("linear_small", linear_bytes), ("linear_packed", packed_bytes))
        for model, part in linears
    ]


def keys_walked(n: int, tokens: int, keys: int, window: int) -> int:
    """By tiles of so many tokens, in whole tiles of so many keys: all that any of a tile's tokens
    sees of n keys."""
    walked = 0
    for i in range(0, n, tokens):
        begin = max(0, i - window + 1) if window else 0
        walked += math.ceil((min(n, i + tokens) - begin) / keys) * keys
    return walked


def prefill_estimate(model: str, kind: str, n: int, kernel: dict, tile: dict) -> dict:
    """n tokens. A tile's rows are tokens times the heads of one KV head."""
    c, rows = MODELS[model], tile["rows"]
    kv_heads, window = c.kv_heads(kind), c.window(kind)[0]
    seen = keys_walked(n, rows * kv_heads // c.num_attention_heads, tile["keys"], window)
    size = c.head_size(kind)
    return estimate(
        f"attention_prefill {size}, {model} {kind.split('_')[0]}, {n} tokens",
        attention_bytes(model, kind, n, n),
        attention_flop(model, kind, n, n),
        l2=seen * kv_heads * 2 * size * BYTES,
        shared=seen * kv_heads / tile["keys"] * shared_bytes(tile, size, uses_wgmma(kernel)),
        work=seen * rows * kv_heads * size * 4,
        kernel=kernel,
        turn=round(4 * 16 * tile["keys"] * size / tile["column_warps"] / flop_of_one(kernel)),
    )


def attention_estimates(kernels: dict[int, tuple[dict, dict]]) -> list[dict]:
    """`kernels`: by head_dim the row of the kernel, and its tile."""
    found = []
    for model, kind in (
        ("E4B", SLIDING),
        ("26B-A4B", SLIDING),
        ("31B", SLIDING),
        ("E4B", FULL),
        ("26B-A4B", FULL),
        ("31B", FULL),
    ):
        kernel = kernels[MODELS[model].head_size(kind)]
        found.append(prefill_estimate(model, kind, 8192, *kernel))
    for model, kind, keys in (
        ("E4B", SLIDING, 32768),
        ("E4B", FULL, 32768),
        ("26B-A4B", FULL, 131072),
        ("31B", FULL, 131072),
    ):
        name = f"attention_decode {MODELS[model].head_size(kind)}, {model}, {keys} keys"
        found.append(estimate(name, attention_bytes(model, kind, 1, keys)))
    return found


def backward_estimates(kernels: dict[int, list[dict]]) -> list[dict]:
    """`kernels`: by head_dim the rows of the two forms, of queries and of keys; each is estimated
    alone, beside its part of the floor of both: five useful products, of seven."""
    found = []
    for model, kind in (("E4B", SLIDING), ("26B-A4B", FULL), ("31B", FULL)):
        c, n = MODELS[model], 8192
        size, kv_heads, window = c.head_size(kind), c.kv_heads(kind), c.window(kind)[0]
        group = c.num_attention_heads // kv_heads
        for form, kernel in zip(("queries", "keys"), kernels[size], strict=True):
            numbers = map(int, re.search(r"AttentionTile<(.*?)>", kernel["kernel"])[1].split(","))
            _, rows, keys, column_warps = numbers
            tile = {"rows": rows, "keys": keys, "column_warps": column_warps}
            own, walk = (rows // group, keys) if form == "queries" else (rows, keys // group)
            seen = keys_walked(n, max(own, 1), max(walk, 1), window)
            seen *= 1 if form == "queries" else group  # rows of q, by one block
            products, useful = (3, 2) if form == "queries" else (4, 3)
            flop = 2 * products * 16 * keys * size // column_warps  # of a warp on a tile
            found.append(
                estimate(
                    f"attention_prefill_backward of {form} {size}, {model}, {n} tokens",
                    attention_bytes(model, kind, n, n),
                    useful * attention_flop(model, kind, n, n) / 2,
                    l2=seen * kv_heads * 2 * size * BYTES,
                    shared=seen * kv_heads / keys * shared_bytes(tile, size, False, 2, products, 2),
                    work=seen * rows * kv_heads * size * 2 * products,
                    kernel=kernel,
                    turn=round(flop / flop_of_one(kernel)),
                )
            )
    return found


def moe_shared_bytes(wgmma: bool) -> int:
    """The same for 128 rows, 128 weight rows and 64 columns of the experts' tiles, where warps have
    32 rows each; every copied row of 128 bytes has its address read."""
    copied = (128 + 128) * 64 * BYTES + 128 * 128 // 4
    return copied + 128 * 64 * BYTES + (2 if wgmma else 4) * 128 * 64 * BYTES


def moe_estimates(kernel: dict) -> list[dict]:
    """`kernel`: the row of the tiles, whose rows are padded to 64 with wgmma and 16 without."""
    model = "26B-A4B"
    found = [
        estimate(f"moe_experts, {tokens} tokens", moe_bytes(model, tokens), moe_flop(model, tokens))
        for tokens in (1, 8, 64)
    ]
    c = MODELS[model]
    for tokens in (2048, 8192):
        assignments = tokens * c.top_k_experts
        padded = (64 if uses_wgmma(kernel) else 16) / 2 * c.num_experts
        # x gathered, hidden and expert outputs written and read beside what every kernel moves.
        between = 2 * assignments * (c.hidden_size + c.moe_intermediate_size) * BYTES
        work = moe_flop(model, tokens) * (1 + padded / assignments)
        found.append(
            estimate(
                f"moe_experts, {tokens} tokens",
                moe_bytes(model, tokens) + between,
                moe_flop(model, tokens),
                shared=work / (2 * 128 * 128 * 64) * moe_shared_bytes(uses_wgmma(kernel)),
                work=work,
                kernel=kernel,
            )
        )
    return found
