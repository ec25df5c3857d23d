"""Writing a model's folder so that a reader finds the old model or the new one, never a mixture."""

import re
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from gemma4_kernels.packed_linear import NAMES

from ..files import naming, read_json, replacing, write_json
from . import compress
from .folder import INDEX, TOKENIZER_FILES, WEIGHTS, owned_files
from .tensorfile import write_tensors

if TYPE_CHECKING:
    from ..base import PreTrainedModel

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def save_pretrained(
    model: "PreTrainedModel",
    path: str | Path,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes config.json, generation_config.json and safetensors (sharded if large) to a folder.

    The tokenizer's files of the folder that the model came from go along. Names are transformers'
    own; a tied head is left out, as there, and one that is the table no longer is written, with
    tie_word_embeddings false. Packed weights are written as compressed-tensors stores them, so that
    they load again exactly; ValueError names one that it has no format for. All files change at
    once (`files.replacing`), and of those that the folder held only the old model's weights are
    deleted. The new files need room beside the old ones. Raises OSError, naming file and cause,
    with the folder as it was.
    """
    state = model.state_dict()
    packed = compress.packed_weights(model)
    config = replace(model.config, dtype=str(model.dtype).removeprefix("torch."))
    # A tied head is in no state dict.
    if config.tie_word_embeddings and any(name.startswith("lm_head.weight") for name in state):
        config.tie_word_embeddings = False
    # Before anything is written: what has no format is refused.
    quantization = compress.config(model) if packed else None
    most = _bytes(max_shard_size)
    folder = Path(path)
    with replacing(folder) as (staging, removed):
        removed |= owned_files(folder)
        config.write(staging)
        if quantization is not None:
            file = staging / "config.json"
            write_json(file, read_json(file) | {"quantization_config": quantization})
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            with naming(staging / "generation_config.json"):
                generation.save_pretrained(staging)
        _copy_tokenizer(getattr(model, "folder", None), folder, staging)
        held = {f"{name}.{part}" for name in packed for part in NAMES}
        dense = ((name, tensor) for name, tensor in state.items() if name not in held)
        write_shards(staging, chain(dense, compress.tensors(model)), most, bool(packed))


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], most: int, packed: bool = True
) -> int:
    """Writes tensors as they come, in files of at most `most` bytes or of one tensor, and their
    index; returns the bytes of all. packed: as in `write_tensors`."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = used = 0

    def write() -> None:
        write_tensors(folder / f"model-{len(shards) + 1:05}.safetensors", held, packed)
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and used + size_of(tensor) > most:
            write()
            used = 0
        held[name] = tensor
        used += size_of(tensor)
        total += size_of(tensor)
    write()
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [WEIGHTS]
    for i, file in enumerate(files, 1):  # how many there are, the last one tells
        (folder / f"model-{i:05}.safetensors").rename(folder / file)
    if count > 1:
        names = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        about = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        write_json(folder / INDEX, about)
    return total


def size_of(tensor: Tensor) -> int:
    """In bytes."""
    return tensor.numel() * tensor.element_size()


def _bytes(size: int | str) -> int:
    """A size in bytes, or as a number and a unit ("5GB")."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)?", str(size).upper())
    if not parts or not float(parts[1]):
        raise ValueError(f"max_shard_size must be bytes, or a size such as '5GB', got {size!r}")
    return int(float(parts[1]) * _UNITS[parts[2] or ""])


def _copy_tokenizer(source: Path | None, folder: Path, staging: Path) -> None:
    """The tokenizer's files of the folder that a model was loaded from."""
    if source is None or source.resolve() == folder.resolve():
        return
    if source.is_file():
        # The tokenizer is made of the file's keys, by a module that is above this one.
        from ..tokenizer import Gemma4Tokenizer

        Gemma4Tokenizer.from_pretrained(source).write(staging)
        return
    if not source.is_dir():
        warnings.warn(f"{source} is gone, and with it the tokenizer: it is not saved", stacklevel=4)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
