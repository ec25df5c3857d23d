"""Estimates of the kernels' times on an H100: arithmetic, nothing measured.

    seconds = start + the longest bound, in waves of blocks + what nothing hides

Bounds are bytes from DRAM, bytes from L2, bytes through shared memory, tensor work and issued
instructions, each as if it were alone, at a rate that kernels are known to reach. A launch has a
start. Blocks take their turns, the last ones on a card that is not full any more. What nothing
hides where a block has its multiprocessor for itself: its own begin and end, and in each iteration
the way of the copies for all of which the loop waits there. A floor (limits.py) has none of this.
"""

import heapq
import re
from collections.abc import Iterable

import limits
from limits import BYTES, MODELS
from tile_work import (
    flop_of_one,
    instructions_for_one,
    moe_shared_bytes,
    shared_bytes,
    tile_warps,
    tiles_walked,
    uses_wgmma,
)

from gemma4.config import FULL, SLIDING

MULTIPROCESSORS, CLOCK = 132, 1.755e9
# Of what its tensor cores' 4,096 FLOP a cycle make, torch's GEMM reaches 84 %. Of shared memory's
# 128 bytes and of four issues a cycle no measured rate was found: they are taken to reach as much.
REACHED = limits.GEMM / (MULTIPROCESSORS * 4096 * CLOCK)
SHARED = MULTIPROCESSORS * 128 * CLOCK * REACHED  # bytes a second
ISSUE = MULTIPROCESSORS * 4 * CLOCK * REACHED  # warp instructions a second
# What explains flash-attention's 642 to 756 TFLOP/s at 128 FLOP a byte (head_dim 256), its 302 to
# 336 at 64 (head_dim 512, pegainfer#1051) and FlashMLA's 660 at 121.
L2 = 5.5e12
MMA_SYNC = 0.62  # of wgmma's rate (arXiv 2402.13499)
# The part of the copy rate that streamed weights and keys reach: 84 to 89 % for large matrices
# (tile-ai/TileOPs#243), 83 % over a whole step (gpt-fast's README).
STREAMED = 0.88
# From one kernel of a graph to the next: a node alone takes 0.58 µs (ahrefs/ocannl#488), chains
# 2 µs and more (kekzl/imp#1956).
LAUNCH = 1.3e-6
# Until a read of DRAM is there under load, which agrees with the 18 KB that a multiprocessor must
# have on its way for 3 TB/s; of L2 half of it, as on an idle card.
READ, L2_READ = 0.8e-6, 0.4e-6
# An iteration of decode attention, of which no two overlap in a block: a read, then 0.5 µs of
# products and barriers.
ITERATION = READ + 0.5e-6
# A block's begin and end: lengths, queries and the first keys, results, one after the other, and
# about 1,000 instructions before the first copy.
BLOCK = 3 * READ + 1000 / CLOCK

# What would move a kernel, by what bounds it: of an op, or of any.
MOVED_BY = {
    "start": "a launch less: fusion with its neighbours",
    "dram": "a pass less: fusion with its neighbours",
    "l2": "copies that a cluster's blocks share",
    "shared": "larger tiles",
    "tensor": "tiles that fit the work's edges",
    "issue": "fewer instructions a product",
    "linear_small dram": "fewer bits a weight",
    "linear_packed dram": "fewer launches: its bytes are few already",
    "attention_prefill l2": "copies that a cluster's blocks share, and that stay in flight",
    "attention_decode start": "one launch for norms, keys and merge: qkv_attention_decode",
    "attention_decode dram": "fewer bits a key",
    "attention_decode iterations": "more copies in flight in a block",
    "attention_prefill_backward shared": "wgmma, which reads a tile once for four warps",
    "moe_experts dram": "fewer bits a weight",
    "moe_experts l2": "wider tiles, or copies that a cluster's blocks share",
}


def assumptions() -> str:
    return (
        f"Taken as given, for an H100 SXM: copies of {limits.DRAM / 1e12} TB/s and bf16 GEMMs of "
        f"{limits.GEMM / 1e12:.0f} TFLOP/s, as measured; {L2 / 1e12} TB/s from L2, which published "
        f"attention kernels agree with; {CLOCK / 1e9} GHz; of shared memory and of issue "
        f"{REACHED:.0%}, as GEMMs reach of the tensor cores; mma.sync at {MMA_SYNC:.0%} of wgmma's "
        f"rate; {LAUNCH * 1e6:.1f} µs a launch, {READ * 1e6:.1f} µs a read of DRAM and "
        f"{L2_READ * 1e6:.1f} of L2, {BLOCK * 1e6:.1f} µs to begin and end a block, "
        f"{ITERATION * 1e6:.1f} µs an iteration of decode. Sources: `bench/estimates.py`."
    )


def moved_by(case: str, bound: str) -> str:
    op = re.match(r"\w+", case)[0]
    return MOVED_BY.get(f"{op} {bound}") or MOVED_BY[bound]


Row = tuple[str, float, dict[str, float], float]  # what `row` takes


def row(case: str, floor: float, bounds: dict[str, float], seconds: float) -> dict:
    """Of the static report. What is not the longest bound is start, waits and unfilled waves."""
    limit = max(bounds, key=bounds.get)
    return {
        "case": case,
        "floor_us": round(floor * 1e6, 1),
        "estimate_us": round(seconds * 1e6, 1),
        "bound_by": limit,
        "moved_by": moved_by(case, limit),
        **{f"{name}_us": round(of * 1e6, 1) for name, of in bounds.items()},
    }


def streamed(case: str, dram: float, launches: int = 1, part: float = 1.0, flop: float = 0) -> dict:
    """What reads each byte once, at `part` of the copy rate."""
    start, seconds = launches * LAUNCH + READ, dram / (part * limits.DRAM)
    bounds = {"start": start, "dram": seconds}
    return row(case, limits.floor(dram, flop), bounds, start + seconds)


def makespan(blocks: Iterable[float], slots: int) -> float:
    """When the last block ends; each starts, in this order, where one has ended."""
    ends = [0.0] * slots
    for seconds in blocks:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def in_waves(bound: float, iterations: list[int], resident: int, drained: bool) -> float:
    """Seconds of a launch of blocks of so many iterations each, in their order, which take `bound`
    if the card is always full; `drained`: whether an iteration waits for all copies in flight."""
    slots, alone = MULTIPROCESSORS * resident, resident == 1
    one = bound / sum(iterations) * slots + L2_READ * (alone and drained)
    begin_and_end = BLOCK * alone
    rest = 0 if alone else BLOCK  # of the others they are hidden
    return makespan((n * one + begin_and_end for n in iterations), slots) + rest


def tensor_bounds(kernel: dict, work: float, turn: int = 0) -> dict[str, float]:
    """`work`: FLOP done by the kernel of this row of the static report, whose main loop has so many
    tensor instructions a turn (0: as many as stand in it)."""
    return {
        "tensor": work / limits.GEMM / (1 if uses_wgmma(kernel) else MMA_SYNC),
        "issue": work / flop_of_one(kernel) * instructions_for_one(kernel, turn) / ISSUE,
    }


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
        ("rms_norm_backward", "E4B", 8192),
        ("add_rms_norm_backward", "31B", 8192),
        ("qkv_norm_rope_backward", "31B", 8192),
        ("geglu_backward", "31B", 8192),
        ("ple_gate_backward", "E4B", 8192),
        ("softcap_cross_entropy", "E4B", 2048),
        ("softcap_cross_entropy_backward", "E4B", 2048),
    ]
    rows = [
        streamed(f"{op}, {model}, {tokens} tokens", limits.row_bytes(model, op, tokens))
        for op, model, tokens in cases
    ]
    linears = [("E4B", part) for part in limits.linear_shapes("E4B")] + [("31B", "down")]
    kinds = (("linear_small", limits.linear_bytes), ("linear_packed", limits.packed_bytes))
    return rows + [
        streamed(f"{op}, {model} {part}, 1 token", bytes_of(model, part, 1), part=STREAMED)
        for op, bytes_of in kinds
        for model, part in linears
    ]


def prefill_estimate(
    model: str, kind: str, tokens: int, keys: int, kernel: dict, tile: dict
) -> dict:
    """A tile's rows are tokens times the heads of one KV head; the last ones start first."""
    c, rows, size = MODELS[model], tile["rows"], MODELS[model].head_size(kind)
    kv_heads, window = c.kv_heads(kind), c.window(kind)[0]
    own = rows * kv_heads // c.num_attention_heads
    walked = tiles_walked(tokens, keys, own, tile["keys"], window)[::-1] * kv_heads
    seen = sum(walked)
    copied, of_products = 2 * tile["keys"] * size * BYTES, 4 * rows * tile["keys"] * size
    turn = round(of_products / tile_warps(tile) / flop_of_one(kernel))
    bounds = {
        "dram": limits.attention_bytes(model, kind, tokens, keys) / limits.DRAM,
        "l2": seen * copied / L2,
        "shared": seen * shared_bytes(tile, size, uses_wgmma(kernel)) / SHARED,
        **tensor_bounds(kernel, seen * of_products, turn),
    }
    seconds = LAUNCH + in_waves(max(bounds.values()), walked, kernel["blocks"], True)
    over = f" over {keys} keys" if keys > tokens else ""
    return row(
        f"attention_prefill {size}, {model} {kind.split('_')[0]}, {tokens} tokens{over}",
        limits.floor(
            limits.attention_bytes(model, kind, tokens, keys),
            limits.attention_flop(model, kind, tokens, keys),
        ),
        bounds,
        seconds,
    )


# Whole prompts, as training has them, and the last of the chunks that `generate` makes of one.
PREFILLS = ((8192, 8192), (2048, 8192))


def attention_estimates(kernels: dict[int, tuple[dict, dict]]) -> list[dict]:
    """`kernels`: by head_dim the row of the kernel, and its tile."""
    return [
        prefill_estimate(model, kind, tokens, keys, *kernels[MODELS[model].head_size(kind)])
        for tokens, keys in PREFILLS
        for kind in (SLIDING, FULL)
        for model in ("E4B", "26B-A4B", "31B")
    ]


DECODES = (
    ("E4B", SLIDING, 32768),
    ("E4B", FULL, 32768),
    ("26B-A4B", SLIDING, 131072),
    ("26B-A4B", FULL, 131072),
    ("31B", FULL, 131072),
)


def decode_estimate(model: str, kind: str, keys: int, iterations: int, coded: bool = False) -> dict:
    """`iterations`: of the longest block, and one to merge, since others share the keys; a tile of
    coded ones has as many."""
    size = MODELS[model].head_size(kind)
    dram = limits.attention_bytes(model, kind, 1, keys, coded=coded)
    # Lengths, then where keys lie, are read before the first of them.
    bounds = {
        "start": 2 * LAUNCH + 2 * READ,
        "dram": dram / (STREAMED * limits.DRAM),
        "iterations": iterations * ITERATION,
    }
    seconds = bounds["start"] + max(bounds["dram"] + ITERATION, bounds["iterations"])
    in_codes = " in e4m3" if coded else ""
    case = f"attention_decode {size}, {model} {kind.split('_')[0]}, {keys} keys{in_codes}"
    return row(case, limits.floor(dram), bounds, seconds)


def backward_form(model: str, kind: str, n: int, form: str, kernel: dict) -> Row:
    """Of n queries, or of as many keys, each of which walks over the rows of the heads of a group;
    the blocks with the most of them start first."""
    c, size = MODELS[model], MODELS[model].head_size(kind)
    kv_heads, window = c.kv_heads(kind), c.window(kind)[0]
    group = c.num_attention_heads // kv_heads
    numbers = map(int, re.search(r"AttentionTile<(.*?)>", kernel["kernel"])[1].split(","))
    _, rows, keys, column_warps = numbers
    tile = {"rows": rows, "keys": keys, "column_warps": column_warps}
    of_queries = form == "queries"
    # Keys see later queries as queries see earlier keys.
    own, other = (rows // group, keys) if of_queries else (rows, keys // group)
    walked = tiles_walked(n, n, max(own, 1), max(other, 1), window)[::-1] * kv_heads
    products, useful = (3, 2) if of_queries else (4, 3)
    seen, of_product = sum(walked), 2 * rows * keys * size
    turn = round(of_product * products / tile_warps(tile) / flop_of_one(kernel))
    bounds = {
        "dram": limits.attention_bytes(model, kind, n, n) / limits.DRAM,
        "l2": seen * 2 * keys * size * BYTES / L2,
        "shared": seen * shared_bytes(tile, size, False, 2, products, 2) / SHARED,
        **tensor_bounds(kernel, seen * of_product * products, turn),
    }
    floor = limits.floor(
        limits.attention_bytes(model, kind, n, n),
        useful / 5 * limits.attention_backward_flop(model, kind, n),
    )
    seconds = LAUNCH + in_waves(max(bounds.values()), walked, kernel["blocks"], True)
    return (
        f"attention_prefill_backward of {form} {size}, {model}, {n} tokens",
        floor,
        bounds,
        seconds,
    )


def backward_estimates(kernels: dict[int, list[dict]]) -> list[dict]:
    """`kernels`: by head_dim the rows of the two forms, of queries and of keys. Each is estimated
    beside its part of the five useful products, of seven; then the op, with what it clears and
    with the delta, which reads out and grad_out."""
    found, n = [], 8192
    for model, kind in (("E4B", SLIDING), ("26B-A4B", FULL), ("31B", FULL)):
        size = MODELS[model].head_size(kind)
        forms = [
            backward_form(model, kind, n, form, kernel)
            for form, kernel in zip(("queries", "keys"), kernels[size], strict=True)
        ]
        dram = limits.attention_backward_bytes(model, kind, n)
        bounds = {name: sum(form[2][name] for form in forms) for name in forms[0][2]}
        beside = 4 * LAUNCH + READ + dram / 2 / limits.DRAM
        found += [row(*form) for form in forms]
        found.append(
            row(
                f"attention_prefill_backward {size}, {model}, {n} tokens",
                limits.floor(dram, limits.attention_backward_flop(model, kind, n)),
                bounds,
                sum(form[3] for form in forms) + beside,
            )
        )
    return found


def moe_tiles_estimate(tokens: int, kernel: dict) -> dict:
    """In tiles of 128 assignments, of which each expert's last is half full on average.

    From L2 every block copies its own rows and weights. Blocks of one tile follow each other, which
    spares DRAM the rows, and the expert's next tile its weights; but they are on other
    multiprocessors, and no copy serves two."""
    model = "26B-A4B"
    c = MODELS[model]
    assignments, rows = tokens * c.top_k_experts, 128
    tiles = assignments // rows + c.num_experts // 2
    width, hidden = c.hidden_size, c.moe_intermediate_size
    # (column tiles, stages) of gate and up, and of down.
    launches = [(hidden // 64, width // 64), (width // 128, hidden // 64)]
    stages = tiles * sum(columns * steps for columns, steps in launches)
    copied = sum(
        columns * steps * 64 * BYTES * (assignments + tiles * 128) for columns, steps in launches
    )
    # The last tile's products are of 64 rows where that is enough, and of 16 without wgmma.
    padded = (64 if uses_wgmma(kernel) else 16) / 2 * c.num_experts
    work = limits.moe_flop(model, tokens) * (1 + padded / assignments)
    # x gathered, hidden and expert outputs written and read beside what every kernel moves.
    between = 2 * assignments * (width + hidden) * BYTES
    bounds = {
        "dram": (limits.moe_bytes(model, tokens) + between) / limits.DRAM,
        "l2": copied / L2,
        "shared": work / (2 * 128 * 128 * 64) * moe_shared_bytes(uses_wgmma(kernel)) / SHARED,
        **tensor_bounds(kernel, work),
    }
    seconds = 4 * LAUNCH + READ  # the sort and the sum too
    for columns, steps in launches:
        part = max(bounds.values()) * tiles * columns * steps / stages
        seconds += in_waves(part, [steps] * tiles * columns, kernel["blocks"], False)
    floor = limits.floor(limits.moe_bytes(model, tokens), limits.moe_flop(model, tokens))
    return row(f"moe_experts, {tokens} tokens", floor, bounds, seconds)


def moe_estimates(kernel: dict) -> list[dict]:
    """`kernel`: the row of the tiles; few tokens stream their experts in three launches."""
    model = "26B-A4B"
    few = [
        streamed(
            f"moe_experts{' in 4 bits' if packed else ''}, {tokens} tokens",
            limits.moe_bytes(model, tokens, packed),
            *(3, STREAMED, limits.moe_flop(model, tokens)),
        )
        for packed in (False, True)
        for tokens in (1, 8, 64)
    ]
    return few + [moe_tiles_estimate(tokens, kernel) for tokens in (2048, 8192)]
