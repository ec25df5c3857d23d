"""The container: a magic and version, counts, keys with their values, tensors' names, the bytes.

Everything is checked against the file's own size before it is believed; nothing is allocated from a
count that the file cannot hold. The `gguf` package reads the same, but makes arrays of every string
of a vocabulary one by one, and of a damaged file whatever numpy makes of it.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...files import check_no_pointer, naming, short
from ..tensorfile import Entry
from .blocks import BLOCKS

MAGIC = b"GGUF"
MOST_HEADER_BYTES = 256 * 2**20
_SCALARS = dict(zip([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12], "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

V = TypeVar("V")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor; `kind` names its blocks, or is empty where `entry` is a plain tensor."""

    name: str
    kind: str
    shape: tuple[int, ...]
    entry: Entry


@dataclass(frozen=True)
class GgufFile:
    """A file, or the first of several with the tensors of all."""

    path: Path
    keys: dict[str, object]
    tensors: list[GgufTensor]

    def key(self, name: str, kind: type[V], default: V | None = None) -> V:
        """The value; ValueError where it is of another kind, or is not there and has no default."""
        value = self.keys.get(name, default)
        if value is None:
            raise ValueError(f"{self.path} lacks the key {name}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(
                f"{self.path}: {name} must be of kind {kind.__name__}, got {short(value)}"
            )
        return value


def read_shards(path: Path) -> GgufFile:
    """A file with the tensors of its shards, if it is the first of several."""
    first = read_file(path)
    count = first.key("split.count", int, 0)
    name = SHARD.fullmatch(path.name)
    if not count and not name:
        return first
    if name is None or int(name["count"]) != count or int(name["number"]) != 1:
        raise ValueError(
            f"{path} must be the first shard of {count}, named ...-00001-of-{count:05}.gguf"
        )
    tensors = list(first.tensors)
    for number in range(2, int(name["count"]) + 1):
        shard = path.with_name(f"{name['stem']}-{number:05}-of-{name['count']}.gguf")
        if not shard.is_file():
            raise FileNotFoundError(f"{path.parent} lacks the shard {shard.name} of {path.name}")
        tensors += read_file(shard).tensors
    return GgufFile(path, first.keys, tensors)


def read_file(path: Path) -> GgufFile:
    """ValueError, naming the file, for one that is not wholly there or says what cannot be."""
    size = path.stat().st_size
    with naming(path), path.open("rb") as stream:
        begin = stream.read(64)
        check_no_pointer(path, begin)
        if begin[:4] != MAGIC or size < 24:
            raise ValueError(f"{path} is no GGUF file, or is cut off")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, size).file()


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size, self.at = path, data, size, 4
        self.end = min(size, MOST_HEADER_BYTES)

    def fail(self, what: str) -> ValueError:
        return ValueError(f"{self.path} {what}")

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise self.fail("is cut off inside its header, or its header is too long")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def text(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"holds a text that is not UTF-8: {error}") from None

    def value(self, kind: int) -> object:
        if kind in _SCALARS:
            code = f"<{_SCALARS[kind]}"
            value: object = struct.unpack(code, self.take(struct.calcsize(code)))[0]
            return value
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.fail(f"holds a value of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            if count > (self.end - self.at) // 8:
                raise self.fail(f"is too short for the {count} texts that it promises")
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.fail(f"holds a list of the unknown type {kind}")
        data = self.take(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", data))

    def file(self) -> GgufFile:
        version = self.number("I")
        if version not in (2, 3):
            raise self.fail(f"must be of GGUF version 2 or 3, got {version}")
        tensors, keys = self.number("Q"), self.number("Q")
        # The least that one of them takes.
        if tensors > self.size // 24 or keys > self.size // 12:
            raise self.fail(f"is too short for {tensors} tensors and {keys} keys")
        found: dict[str, object] = {}
        for _ in range(keys):
            name = self.text()
            if name in found:
                raise self.fail(f"gives the key {short(name)} twice")
            found[name] = self.value(self.number("I"))
        table = [self.tensor() for _ in range(tensors)]
        alignment = found.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"must be aligned to a power of two, got {short(alignment)}")
        begin = -(-self.at // alignment) * alignment
        made = [self.placed(begin, *row) for row in table]
        names = [tensor.name for tensor in made]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise self.fail(f"gives the tensor {short(twice)} twice")
        return GgufFile(self.path, found, made)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.text(), self.number("I")
        if not name.isprintable() or len(name) > 256 or dimensions > 8:
            raise self.fail(f"holds a tensor {short(name)} of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def placed(
        self, begin: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> GgufTensor:
        count = math.prod(shape)
        start = begin + offset
        where = f"tensor {short(name)}"
        if kind in _PLAIN:
            label, dtype = "", _PLAIN[kind]
            size = count * {"F64": 8, "F32": 4}.get(dtype, 2)
            stored = shape
        elif kind in BLOCKS:
            label, values, block_bytes, _ = BLOCKS[kind]
            dtype = "U8"
            if not shape or shape[-1] % values:
                raise self.fail(
                    f"{where} must have rows of a multiple of {values} values to be {label}, got "
                    f"{list(shape)}"
                )
            size = count // values * block_bytes
            stored = (math.prod(shape[:-1]), shape[-1] // values * block_bytes)
        else:
            raise self.fail(f"{where} is of the type {kind}, which is not read")
        if start + size > self.size:
            raise self.fail(f"is cut off inside {where}, which ends at byte {start + size}")
        return GgufTensor(name, label, shape, Entry(self.path, name, dtype, stored, start, size))
