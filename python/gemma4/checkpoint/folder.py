"""Which folder a checkpoint is, and which of its files hold the weights; none of them is read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import list_repo_files, snapshot_download

from ..files import finish, is_file_name, read_json, short

R = TypeVar("R")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FILES = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    WEIGHTS,
    "model-*.safetensors",
    INDEX,
)
_ON_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<file>[\w.-]+(/[\w.-]+)*\.gguf))?")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def resolve(path_or_repo_id: str | Path, needed: str = "config.json") -> Path:
    """The folder of a checkpoint: a local one, or a hub repository's, downloaded if need be; or
    llama.cpp's file, which is a checkpoint by itself: a local one, owner/name:file.gguf of the hub,
    or the only one of a repository that holds nothing else.

    Only the files that the text model needs are fetched; huggingface_hub's cache and offline mode
    apply. Raises FileNotFoundError, naming what was asked for and what is there instead, if there
    is no such folder or no file `needed` in it.
    """
    try:
        path = Path(path_or_repo_id).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise FileNotFoundError(f"{path_or_repo_id} is not a folder: {error}") from None
    if path.is_dir():
        finish(path)
        if not (path / needed).is_file():
            raise FileNotFoundError(f"{path} holds no {needed}{_instead(path)}")
        return path
    name = str(path_or_repo_id)
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_file():
        raise FileNotFoundError(f"{name} is a file{_kind(path)}, not a checkpoint's folder")
    asked = _ON_HUB.fullmatch(name)
    if asked is None:
        raise FileNotFoundError(f"{name} is neither a folder nor a hub id (owner/name)")
    return _fetched(asked["repo"], asked["file"])


def _snapshot(repo: str, patterns: list[str]) -> Path:
    return Path(_of_hub(repo, lambda: snapshot_download(repo, allow_patterns=patterns)))


def _of_hub(repo: str, ask: Callable[[], R]) -> R:
    try:
        return ask()
    except Exception as error:
        # The hub client raises a dozen unrelated classes for "not there" and "no network".
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"{repo} is no local folder and could not be fetched from the hub: "
            f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}"
        ) from error


def _fetched(repo: str, file: str | None) -> Path:
    if file is None:
        folder = _snapshot(repo, list(FILES))
        if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
            return folder
        # Of shards the first stands for all; an image model's projector is no text model.
        shards = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf|(.*/)?mmproj[^/]*")
        there = _of_hub(repo, lambda: list_repo_files(repo))
        names = sorted(n for n in there if n.endswith(".gguf") and not shards.fullmatch(n))
        if not names:
            return folder
        if len(names) > 1:
            raise FileNotFoundError(
                f"{repo} holds several .gguf files: name one, as in {repo}:{names[0]} (there are "
                f"{', '.join(names)})"
            )
        file = names[0]
    shard = _SHARD.fullmatch(file)
    pattern = file if shard is None else f"{shard['stem']}-*-of-{shard['count']}.gguf"
    path = _snapshot(repo, [pattern]) / file
    if ".." in path.parts or not path.is_file():
        raise FileNotFoundError(f"{repo} holds no {file}")
    return path


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """A checkpoint's safetensors files, and the tensors that its index promises in each.

    Raises FileNotFoundError or ValueError, naming the file and what is wrong with it.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {WEIGHTS} and no index of shards{_instead(folder)}"
            )
        return {folder / WEIGHTS: []}
    files: dict[Path, list[str]] = {}
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(
            f"{index} is not an index of shards: weight_map must map tensors to files, "
            f"got {short(table)}"
        )
    for tensor, name in table.items():
        if not is_file_name(name):
            raise ValueError(
                f"{index}: weight_map[{short(tensor)}] must name a file of its folder, "
                f"got {short(name)}"
            )
        files.setdefault(folder / name, []).append(tensor)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks the shard {short(file.name)} of its index")
        if not _stays(file, folder):
            raise ValueError(
                f"{index}: the shard {file.name} is a link that leaves its folder, "
                f"to {file.resolve()}"
            )
    return dict(sorted(files.items()))


def owned_files(folder: Path) -> set[str]:
    """The names of the files that hold the folder's weights now, its index with them."""
    try:
        table = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
        shards = set(filter(is_file_name, table))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        shards = set()  # what no index names is not the old model's to delete
    return {name for name in {WEIGHTS, INDEX, *shards} if (folder / name).is_file()}


def _stays(file: Path, folder: Path) -> bool:
    """Whether a file lies in `folder`, or in the stores that the hub's cache links to."""
    real, home = file.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return True
    repository = home.parent.parent
    in_cache = home.parent.name == "snapshots" and repository.name.startswith("models--")
    # A repository's own blobs, or those that all repositories of the cache share.
    stores = (repository / "blobs", repository.parent / "blobs")
    return in_cache and any(real.is_relative_to(store.resolve()) for store in stores)


def _instead(folder: Path) -> str:
    """What lies in a folder that is no checkpoint of ours, as the end of a sentence."""
    if (folder / "adapter_config.json").is_file():
        return ": it is an adapter (adapter_config.json); merge it into its base model first"
    for pattern in ("*.gguf", "*.safetensors", *_PICKLED, "*.h5", "*.msgpack", "*.onnx", "*.npz"):
        if found := sorted(folder.glob(pattern)):
            return f": it holds {short(found[0].name)}{_kind(found[0])}"
    return ""


def _kind(file: Path) -> str:
    """What another format's file is, in brackets."""
    if file.suffix == ".gguf":
        return " (llama.cpp's format: give the file itself as the path)"
    if any(file.match(pattern) for pattern in _PICKLED):
        return " (pickled, which can run code and is never read; convert it to safetensors)"
    return ""
