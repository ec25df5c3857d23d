"""Files of a model folder: JSON read strictly, and a folder's files replaced all at once."""

import json
import os
import platform
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

# An object of JSON, of whatever values.
Json = dict[str, Any]
# Every JSON file of a released model is far smaller, the table of a file of tensors included.
MAX_JSON_BYTES = 32 * 2**20

COMMITTED, MANIFEST = ".gemma4-saved", "manifest.json"
# While it is written: the machine and the process that write, and mkdtemp's letters.
_STAGED = f".gemma4-saving-{platform.node()}"


def read_json(file: Path) -> Json:
    """The object in a JSON file; ValueError, naming the file, if it holds none."""
    with file.open("rb") as stream:
        data = stream.read(MAX_JSON_BYTES + 1)
    return parse_json(data, str(file))


def write_json(file: Path, data: Mapping[str, object]) -> None:
    """Writes an object as JSON; OSError names the file."""
    with naming(file):
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Gives an OSError of the block the file's name, which a failed write leaves out."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def parse_json(data: bytes, source: str) -> Json:
    """The object that `data` spells; ValueError, naming `source`, where it spells none, spells a
    key twice, or is larger or deeper than any such file."""
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{source} is not valid JSON: it is longer than {MAX_JSON_BYTES} bytes")
    check_no_pointer(source, data)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{source} is not valid JSON: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} must hold a JSON object, got {short(value)}")
    return value


def check_no_pointer(file: Path | str, begin: bytes) -> None:
    """Refuses what git leaves in a large file's place until git-lfs fetches it."""
    if begin.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a git-lfs pointer, not the file: `git lfs pull` fetches it")


def _object(pairs: list[tuple[str, object]]) -> Json:
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"it gives the key {short(twice)} twice")
    return made


def is_file_name(name: object) -> TypeGuard[str]:
    """Whether `name` names a file of the folder that it is read in, and none elsewhere."""
    return isinstance(name, str) and Path(name).name == name and bool(name.strip("."))


def short(value: object, most: int = 80) -> str:
    """`value` as an error shows it: however large it is, a few words of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep list
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


@contextmanager
def replacing(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Replaces files of `folder` (made if need be) all at once.

    Yields (an empty folder for the new files, a set for the names of files to delete). When the
    block ends the new files are flushed and then committed in one rename; only then do they take
    their places and the others go. If the block raises, or the process is killed before the
    commit, `folder` is as it was; after the commit, `finish` ends what a kill cut off. One process
    saves to a folder at a time. Raises OSError, naming file and cause.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish(folder)
    _sweep(folder)
    staging = Path(tempfile.mkdtemp(prefix=f"{_STAGED}-{os.getpid()}-", dir=folder))
    try:
        removed: set[str] = set()
        yield staging, removed
        moved = sorted(file.name for file in staging.iterdir())
        manifest = {"moved": moved, "removed": sorted(removed - set(moved))}
        write_json(staging / MANIFEST, manifest)
        for file in staging.iterdir():
            _flush(file)
        _flush(staging)
        staging.rename(folder / COMMITTED)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise _named(error, folder, staging) from error
        raise
    _flush(folder)
    finish(folder)


def finish(folder: Path) -> None:
    """Puts files that `replacing` committed into their places, should a kill have cut that off."""
    committed = folder / COMMITTED
    if committed.is_symlink() or not committed.is_dir():
        return
    if (committed / MANIFEST).is_file():
        manifest = read_json(committed / MANIFEST)
        # A folder may come from anywhere: what its manifest names must lie in it.
        if not all(map(is_file_name, manifest["moved"] + manifest["removed"])):
            raise ValueError(f"{committed / MANIFEST} names files outside of its folder")
        for name in manifest["moved"]:
            # What is not there any more was moved before the kill.
            with suppress(FileNotFoundError):
                os.replace(committed / name, folder / name)
        for name in manifest["removed"]:
            (folder / name).unlink(missing_ok=True)
        _flush(folder)
        (committed / MANIFEST).unlink(missing_ok=True)
    with suppress(OSError):
        committed.rmdir()


def _sweep(folder: Path) -> None:
    """Deletes what killed processes of this machine left unfinished."""
    if os.name != "posix":  # no way to ask whether a process lives
        return
    for left in folder.iterdir():
        owner = re.fullmatch(rf"{re.escape(_STAGED)}-(\d+)-\w+", left.name)
        if owner and not _alive(int(owner[1])):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    if os.name != "posix":  # only POSIX flushes folders, and files that are open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named(error: OSError, folder: Path, staging: Path) -> OSError:
    """The error with the place where the file was to go."""
    file = Path(error.filename or folder)
    if file.is_relative_to(staging):
        file = folder / file.relative_to(staging)
    return type(error)(error.errno, error.strerror or str(error), str(file))
