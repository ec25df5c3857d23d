"""The safetensors format: eight bytes of length, a JSON table of the tensors, their bytes.

The table is checked as strictly as the format's own library does, but by name, and before any
memory is asked for. Tensors are read in bounded pieces or mapped, and written in bounded pieces;
the library would hold a file's worth of bytes.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..files import MAX_JSON_BYTES, check_no_pointer, naming, parse_json, short

# Small enough that a piece stays in the caches between the file and its place.
PIECE_BYTES = 8 * 2**20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What quantised weights are made of besides.
_PACKED = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,
    "U8": torch.uint8,  # behind the one above, which is read as these
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
# Tensors of other modalities, and of quantised checkpoints, may have any of these.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_MOST_DIMENSIONS, _MOST_LETTERS = 8, 256


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `start` and `size` are in bytes, `start` from the file's beginning."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def read_table(file: Path) -> list[Entry]:
    """The tensors of a file; ValueError, naming file and tensor, for any that is not wholly there.

    Names are unique, and the tensors' bytes fill the file without gap or overlap.
    """
    total = file.stat().st_size
    with file.open("rb") as stream:
        begin = stream.read(64)
        check_no_pointer(file, begin)
        length = struct.unpack("<Q", begin[:8])[0] if total >= 8 else total
        stream.seek(8)
        data = b"" if length > min(total - 8, MAX_JSON_BYTES) else stream.read(length)
    if not data:
        raise ValueError(f"{file} is no safetensors file, or its header is cut off")
    table = parse_json(data, f"{file}'s header")
    table.pop("__metadata__", None)
    entries = [_entry(file, name, entry, 8 + length) for name, entry in table.items()]
    end = 8 + length
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.size)):
        if entry.start != end:
            raise ValueError(
                f"{file}: tensor {short(entry.name)} must begin where the one before it ends, "
                f"at byte {end}, got {entry.start}"
            )
        end += entry.size
        if end > total:
            raise ValueError(
                f"{file} is cut off at {total} bytes, inside tensor {short(entry.name)[1:-1]}"
            )
    if end != total:
        raise ValueError(f"{file} must end with its last tensor, at byte {end}, got {total} bytes")
    return entries


def _entry(file: Path, name: str, entry: object, begin: int) -> Entry:
    where = f"{file}: tensor {short(name)}"
    if not name.isprintable() or len(name) > _MOST_LETTERS:
        raise ValueError(f"{where} must have a name of at most {_MOST_LETTERS} printable letters")
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be described by an object, got {short(entry)}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where} must have a dtype of the format, got {short(dtype)}")
    if not _is_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{where} must have a shape of sizes, got {short(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} must have data_offsets [begin, end], got {short(offsets)}")
    size = offsets[1] - offsets[0]
    if math.prod(shape) * _BITS[dtype] != size * 8:
        raise ValueError(
            f"{where} must have as many bytes as {dtype} {short(shape)} takes, got {size}"
        )
    return Entry(file, name, dtype, tuple(shape), begin + offsets[0], size)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in value
    )


def mapped(entry: Entry, memory: dict[Path, torch.UntypedStorage]) -> Tensor | None:
    """The tensor as a view of the mapped file; None where its bytes are not aligned.

    The mapping is private: what is written to the tensor never reaches the file. It keeps the file
    it was made of, whatever later takes that file's name. `memory` holds the files mapped so far.
    """
    if entry.start % entry.torch_dtype.itemsize:
        return None
    if entry.file not in memory:
        size = entry.file.stat().st_size
        whole = torch.UntypedStorage.from_file(str(entry.file), False, size)
        assert isinstance(whole, torch.UntypedStorage)
        memory[entry.file] = whole
    # A storage of its own: whatever goes by storages (saving, sharing) sees this tensor alone.
    storage = memory[entry.file][entry.start : entry.start + entry.size]
    empty = torch.empty(0, dtype=entry.torch_dtype)
    # torch's stubs want the strides, which are the contiguous ones if they are not given.
    return empty.set_(storage, 0, entry.shape)  # type: ignore[call-overload]


def make_buffer(pinned: bool = False) -> Tensor:
    """Memory for the pieces of one tensor after another."""
    return torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned)


def pieces(entry: Entry, buffer: Tensor) -> Iterator[Tensor]:
    """The tensor's elements in order, as many at a time as `buffer` holds."""
    with naming(entry.file), entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        left = entry.size
        while left:
            piece = buffer[:left]
            view, done = piece.numpy().data, 0
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise ValueError(f"{entry.file} is cut off inside tensor {entry.name}")
                done += count
            left -= done
            yield piece.view(entry.torch_dtype)


def fill(target: Tensor, entry: Entry, buffer: Tensor) -> None:
    """Copies a tensor of a file into `target`, of the same shape and any dtype and device."""
    flat, at = target.view(-1), 0
    for piece in pieces(entry, buffer):
        flat[at : at + len(piece)].copy_(piece)
        at += len(piece)


def read_rows(entry: Entry, begin: int = 0, end: int | None = None) -> Tensor:
    """The tensor, or the rows [begin, end) of its first dimension, in memory of their own."""
    dtype = DTYPES.get(entry.dtype) or _PACKED[entry.dtype]
    rows = math.prod(entry.shape[:1])
    end = rows if end is None else end
    row_bytes = entry.size // max(rows, 1)
    data = bytearray((end - begin) * row_bytes)
    with naming(entry.file), entry.file.open("rb") as stream:
        stream.seek(entry.start + begin * row_bytes)
        if stream.readinto(data) != len(data):
            raise ValueError(f"{entry.file} is cut off inside tensor {entry.name}")
    shape = (end - begin, *entry.shape[1:]) if entry.shape else ()
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def equal(one: Entry, other: Entry) -> bool:
    """Whether two tensors of files are the same numbers."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    both = zip(pieces(one, make_buffer()), pieces(other, make_buffer()), strict=True)
    return all(torch.equal(x, y) for x, y in both)


def write_tensors(file: Path, tensors: dict[str, Tensor], packed: bool = False) -> None:
    """Writes tensors, of any layout and device, as one file; OSError names it. packed: what
    quantised weights are made of may be among them."""
    names = _NAMES | ({dtype: name for name, dtype in _PACKED.items()} if packed else {})
    # The widest elements first, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        tensor = tensors[name]
        whole = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
        if not whole or tensor.dtype not in names:
            what = tensor.dtype if whole else f"a {type(tensor).__name__} on {tensor.device}"
            raise ValueError(
                f"{name} must be a plain floating-point tensor to be saved, got {what}"
            )
        end = at + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), names[tensor.dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with naming(file), file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            flat = tensors[name].detach().reshape(-1)
            for piece in flat.split(PIECE_BYTES // flat.element_size()):
                stream.write(memoryview(piece.cpu().view(torch.uint8).numpy()))
