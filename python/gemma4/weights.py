"""Checkpoints: finding one, reading it tensor by tensor, and writing one.

A tensor is copied straight into the model's own memory, in the final dtype and on the final
device, and its file is closed before the next is opened, so the host never holds a second copy.
Every parameter must be filled exactly once; whatever is missing, unknown or of a wrong shape is an
error that names file and tensor.
"""

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import Gemma4TextConfig

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
OTHER_MODALITIES = re.compile(
    r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder"
    r"|multi_modal_projector)\."
)
# Names that quantised checkpoints add beside or in place of a weight.
QUANTISED = re.compile(
    r"(weight_(packed|scale|scale_2|global_scale|shape|zero_point)|(input|output)(_global)?_scale"
    r"|qweight|qzeros|scales|g_idx|biases|weight\.(absmax|quant_map|quant_state.*|nested_.*))$"
)
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
SHARED_KV = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(path_or_repo_id: str | Path) -> Path:
    """The folder of a checkpoint: a local one, or a hub repository's, downloaded if need be.

    Only the files that the text model needs are fetched; huggingface_hub's cache and offline mode
    apply. Raises FileNotFoundError, naming what was asked for.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no config.json")
        return path
    name = str(path_or_repo_id)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(f"{name} is neither a folder nor a hub id (owner/name)")
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:
        # The hub client raises a dozen unrelated classes for "not there" and "no network".
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"{name} is no local folder and could not be fetched from the hub: "
            f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}"
        ) from error


def load_pretrained(
    cls: type[nn.Module],
    path_or_repo_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    ple_device: torch.device | str | None = None,
    progress: bool = False,
) -> Any:
    """A model with the weights of a local folder or a hub repository.

    dtype: the checkpoint's own by default. device: "cpu" by default. ple_device="cpu" keeps the
    table of per-layer embeddings in host memory (pinned if the model is on a GPU). The multimodal
    layout is accepted; `model.skipped` lists the tensors that are not the text model's. The model
    comes back in eval mode.

    Raises FileNotFoundError (no such checkpoint or file) or ValueError (a quantised, truncated,
    incomplete or misshapen one), naming file and tensor.
    """
    folder = resolve(path_or_repo_id)
    config = Gemma4TextConfig.from_pretrained(folder)
    if isinstance(dtype, str) or dtype is None:
        name = (dtype or config.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
        dtype = DTYPES[name]
    with torch.device("meta"):
        model = cls(config)
    model = model.to(dtype)
    _materialise(model, torch.device(device or "cpu"), ple_device)
    model.skipped = _fill(model, config, folder, progress)
    if hasattr(model, "generation_config"):
        model.generation_config = model.generation_config.updated_from(folder)
    return model.eval()


def _materialise(
    model: nn.Module, device: torch.device, ple_device: torch.device | str | None
) -> None:
    """Gives the meta model uninitialised memory, the PLE table's where it is wanted."""
    tables = [m for n, m in model.named_modules() if n.endswith("embed_tokens_per_layer")]
    host = None
    if ple_device is not None and tables:
        shape, dtype = tables[0].weight.shape, tables[0].weight.dtype
        ple_device = torch.device(ple_device)
        host = torch.empty(
            shape,
            dtype=dtype,
            device=ple_device,
            pin_memory=ple_device.type == "cpu" and device.type == "cuda",
        )
        # to_empty would give the table room on the device for a moment; it may not fit there.
        tables[0].weight = nn.Parameter(torch.empty(0, dtype=dtype, device="meta"))
    model.to_empty(device=device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    if host is not None:
        tables[0].weight = nn.Parameter(host)


def _fill(model: nn.Module, config: Gemma4TextConfig, folder: Path, progress: bool) -> list[str]:
    """Copies every tensor of the checkpoint into `model`; returns the names that it skipped."""
    targets = _targets(model)
    names = [(file, name) for file in _files(folder) for name in _names(file)]
    quantised = [name for _, name in names if QUANTISED.search(name)]
    if quantised:
        raise ValueError(
            f"{folder} is a quantised checkpoint, which is not supported: it holds {quantised[0]}"
        )
    filled: dict[str, str] = {}
    skipped: list[str] = []
    for file, name in tqdm(names, desc="weights", unit=" tensors", disable=not progress):
        key = _key(name, targets)
        if key is None:
            if not _skippable(name, config):
                raise ValueError(f"{file}: tensor {name} is not part of this model")
            skipped.append(name)
            continue
        target, parts = targets[key]
        if twice := [part for part in parts if part in filled]:
            raise ValueError(
                f"{file}: tensor {name} gives {twice[0]} a second time, after {filled[twice[0]]}"
            )
        filled |= dict.fromkeys(parts, name)
        with _tensor(file, name, target.shape) as source:
            target.copy_(source)
    missing = [key for key, (_, parts) in targets.items() if not filled.keys() >= set(parts)]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} tensors are missing, the first of them {missing[0]}"
        )
    if config.tie_word_embeddings:
        _check_tied_head(model, names)
    return skipped


def _targets(model: nn.Module) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Where a checkpoint's tensors go, by name without prefix, and which parts each one fills.

    An expert tensor [E, ...] has the projections of the single experts as its parts, which
    checkpoints may also bring one by one. A tied head is no target: the embedding is.
    """
    targets = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        targets[name] = (tensor, (name,))
        stem, _, fused = name.rpartition(".")
        if not stem.endswith(".experts"):
            continue
        rows = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[fused]
        singles = {
            f"{stem}.{expert}.{row}.weight": part
            for expert, matrix in enumerate(tensor)
            for row, part in zip(rows, matrix.chunk(len(rows)), strict=True)
        }
        targets[name] = (tensor, tuple(singles))
        targets |= {single: (part, (single,)) for single, part in singles.items()}
    return targets


def _key(name: str, targets: dict[str, Any]) -> str | None:
    """The target of a checkpoint's tensor, or None."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            # Some exports put the experts and the router into a module of their own.
            key = name[len(prefix) :].replace(".moe.", ".")
            if key in targets:
                return key
    return None


def _skippable(name: str, config: Gemma4TextConfig) -> bool:
    """Tensors that a text model does without: other modalities, a head where none is wanted, and
    the K and V that original releases carry for layers that borrow them."""
    if OTHER_MODALITIES.match(name) or name.endswith("lm_head.weight"):
        return True
    layer = SHARED_KV.search(name)
    index = int(layer[1]) if layer else config.num_hidden_layers
    return index < config.num_hidden_layers and config.kv_owner(index) != index


def _check_tied_head(model: nn.Module, names: list[tuple[Path, str]]) -> None:
    """A head in the file of a tied model must repeat the embedding: the config is believed."""
    table = next(m for n, m in model.named_modules() if n.endswith("embed_tokens")).weight
    for file, name in names:
        if name.endswith("lm_head.weight"):
            with _tensor(file, name, table.shape) as source:
                if not torch.equal(source.to(table), table):
                    raise ValueError(
                        f"{file}: {name} differs from the token embedding, but the config says "
                        "tie_word_embeddings; set it to false to use both"
                    )


def _files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files; of a sharded one, those that the index names."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"{folder} holds no model.safetensors and no index of shards")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index} is not an index of shards (no weight_map)") from None
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks the shard {name} that its index names")
    return [folder / name for name in names]


def _names(file: Path) -> list[str]:
    header = _header(file)
    for name, entry in header.items():
        if entry["dtype"] not in PLAIN_DTYPES and not OTHER_MODALITIES.match(name):
            raise ValueError(
                f"{file}: tensor {name} is {entry['dtype']}; quantised checkpoints are not taken"
            )
    return list(header)


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """The table of tensors, checked against the file's size so that a cut one is named."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is no safetensors file, or its header is cut off") from None
    for name, end in ends.items():
        if end > size:
            raise ValueError(f"{file} is cut off at {size} bytes, inside tensor {name}")
    return header


@contextmanager
def _tensor(file: Path, name: str, shape: torch.Size) -> Iterator[Tensor]:
    """One tensor of a file that is open for it alone, so that its pages leave with it."""
    try:
        with safe_open(file, framework="pt") as reader:
            source = reader.get_tensor(name)
            if source.shape != shape:
                raise ValueError(
                    f"{file}: tensor {name} must have shape {list(shape)}, got {list(source.shape)}"
                )
            yield source
    except SafetensorError as error:
        raise ValueError(f"{file}: tensor {name} cannot be read: {error}") from None


def save_pretrained(model: nn.Module, path: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Writes config.json, generation_config.json and safetensors (sharded if large) to a folder.

    Names are transformers' own; a tied head is left out, as there.
    """
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(path)
    if hasattr(model, "generation_config"):
        model.generation_config.save_pretrained(path)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    plan = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        # Copies, one file's worth: projections that are multiplied as one share their memory.
        tensors = {name: state[name].clone(memory_format=torch.contiguous_format) for name in names}
        save_file(tensors, Path(path) / file, metadata={"format": "pt"})
    index = Path(path) / "model.safetensors.index.json"
    if plan.is_sharded:
        table = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        index.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        index.unlink(missing_ok=True)
    for stale in Path(path).glob("model*.safetensors"):
        if stale.name not in plan.filename_to_tensors:
            stale.unlink()
