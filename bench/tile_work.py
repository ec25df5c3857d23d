"""What kernels do for a tile: iterations, tensor instructions, bytes through shared memory."""

import math
import re

from limits import BYTES


def tiles_walked(tokens: int, seen: int, own: int, tile: int, window: int) -> list[int]:
    """The iterations of each tile of `own` tokens, the tokens being the tail of `seen` keys: in
    whole tiles of keys, all that any of its tokens sees."""
    found = []
    for i in range(seen - tokens, seen, own):
        begin = max(0, i - window + 1) if window else 0
        found.append(math.ceil((min(seen, i + own) - begin) / tile))
    return found


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


def tile_warps(tile: dict) -> int:
    return tile["rows"] // 16 * tile["column_warps"]


def moe_shared_bytes(wgmma: bool) -> int:
    """As shared_bytes, for 128 rows, 128 weight rows and 64 columns of the experts' tiles, where
    warps have 32 rows each; every copied row of 128 bytes has its address read."""
    copied = (128 + 128) * 64 * BYTES + 128 * 128 // 4
    return copied + 128 * 64 * BYTES + (2 if wgmma else 4) * 128 * 64 * BYTES
