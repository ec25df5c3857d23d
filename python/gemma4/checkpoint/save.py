"""Writing a model's folder so that a reader finds the old model or the new one, never a mixture."""

import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..files import naming, replacing, write_json
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
    tie_word_embeddings false. All files change at once (`files.replacing`), and of those that the
    folder held only the old model's weights are deleted. The new files need room beside the old
    ones. Raises OSError, naming file and cause, with the folder as it was.
    """
    state = model.state_dict()
    config = replace(model.config, dtype=str(model.dtype).removeprefix("torch."))
    # A tied head is in no state dict.
    if config.tie_word_embeddings and "lm_head.weight" in state:
        config.tie_word_embeddings = False
    shards = _shards(state, max_shard_size)
    folder = Path(path)
    with replacing(folder) as (staging, removed):
        removed |= owned_files(folder)
        config.write(staging)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            with naming(staging / "generation_config.json"):
                generation.save_pretrained(staging)
        _copy_tokenizer(getattr(model, "folder", None), folder, staging)
        for file, tensors in shards.items():
            write_tensors(staging / file, tensors)
        if len(shards) > 1:
            write_index(staging, shards, sum(map(size_of, state.values())))


def _shards(state: dict[str, Tensor], most: int | str) -> dict[str, dict[str, Tensor]]:
    """The tensors in order, as files of at most that size, or of one tensor."""
    most = _bytes(most)
    groups: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in state.items():
        if groups[-1] and used + size_of(tensor) > most:
            groups.append({})
            used = 0
        groups[-1][name] = tensor
        used += size_of(tensor)
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return dict(zip(shard_names(len(groups)), groups, strict=True))


def shard_names(count: int) -> list[str]:
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """Which of the files `shards` holds which tensors."""
    names = {name: file for file, tensors in shards.items() for name in tensors}
    table = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(names.items()))}
    write_json(folder / INDEX, table)


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
