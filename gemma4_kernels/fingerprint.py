"""Tells the compiled library from any other file, in far less time than hashing it takes.

Without imports of the package's own, for setup.py runs it as well.
"""

import hashlib
from pathlib import Path

# Of the beginning, which the loader reads and a bad byte of which can kill it, all; of the rest,
# which is the GPUs' code for the most part, evenly spread blocks, which no longer hole escapes.
_HEAD, _STEP, _BLOCK = 1 << 18, 1 << 16, 1 << 12


def fingerprint(path: Path) -> tuple[int, str]:
    """The file's size in bytes, and a SHA-256 of its beginning, its end and blocks between."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        digest.update(file.read(_HEAD))
        for start in [*range(_HEAD, size, _STEP), max(0, size - _BLOCK)]:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return size, digest.hexdigest()
