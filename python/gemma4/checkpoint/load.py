"""Reading a checkpoint into a model.

Files' tables are compared with the model's sizes before any memory is asked for. On a CPU, in the
file's own dtype, a parameter is the mapped file itself: it is read where and when it is touched.
Else tensors are read in bounded pieces straight into the model's memory. Every parameter is
filled exactly once; whatever is missing, unknown or of a wrong shape is an error that names file
and tensor.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gemma4_kernels.packed import PackedWeight
from gemma4_kernels.packed_cpu import torch_multiplies

from ..config import DTYPES, Gemma4TextConfig
from ..files import read_json
from . import gguf, keep, tensorfile
from .folder import resolve, weight_files
from .packed import Packed, gathered, options_of
from .tensorfile import Entry

if TYPE_CHECKING:
    from ..base import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")

PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
OTHER_MODALITIES = re.compile(
    r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder"
    r"|multi_modal_projector)\."
)
SHARED_KV = re.compile(r"layers\.(\d{1,9})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
LAYER = re.compile(r"\blayers\.(\d{1,9})\.")
SINGLE_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,9})\.(gate_proj|up_proj|down_proj)\.weight")
FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
PLE_TABLE = "embed_tokens_per_layer.weight"

# What fills a tensor of the model, or a part of it.
Source: TypeAlias = Entry | Packed
# What of an expert tensor a file's tensor fills: (expert, projection), or all of it.
Part = tuple[int, str]
WHOLE: Part = (-1, "")


def load(
    cls: type[Model],
    path_or_repo_id: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    ple_device: torch.device | str | None = None,
    progress: bool = False,
    quantized: str = "keep",
) -> Model:
    """As `PreTrainedModel.from_pretrained`, for a model of class `cls`."""
    if quantized not in ("keep", "dequantize"):
        raise ValueError(f"quantized must be 'keep' or 'dequantize', got {quantized!r}")
    folder = resolve(path_or_repo_id)
    if folder.is_file():
        file = gguf.read_shards(folder)
        config, passed_over = gguf.config_of(file), list[str]()
        sources: list[Source] = [*gguf.sources_of(file)]
    else:
        config = Gemma4TextConfig.from_pretrained(folder)
        sources, passed_over = read_sources(folder)
    dtype = _dtype(config.dtype if dtype is None else dtype)
    check_sizes(folder, config, sources)
    with torch.device("meta"), _Unfilled():
        model = cls(config)
    found, skipped = _matched(model, folder, sources)
    skipped += passed_over
    device = torch.device(device or "cpu")
    reader = _Reader(model, dtype, device, ple_device, quantized == "keep")
    for name, parts in tqdm(found.items(), desc="weights", unit=" tensors", disable=not progress):
        reader.read(name, parts)
    for name, weight in reader.kept.items():
        keep.install(model, name, weight, dtype)
    model.load_state_dict(reader.dense, strict=False, assign=True)
    model.loaded(folder)
    # What is in no checkpoint is still on meta. Rotary tables are made anew by the move itself;
    # NaN, and not whatever memory holds, shows what is not.
    model._apply(
        lambda x: torch.full(x.shape, math.nan, dtype=x.dtype, device=device) if x.is_meta else x
    )
    model.skipped, model.folder = skipped, folder
    model.quantized = _told(folder, reader, found)
    return model.eval()


class _Unfilled(TorchFunctionMode):
    """Leaves out initial values: drawing them on meta makes nothing, and imports for a second."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _dtype(name: torch.dtype | str) -> torch.dtype:
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, name)


def read_sources(folder: Path) -> tuple[list[Source], list[str]]:
    """Every weight that a checkpoint's files hold, from their tables alone; and the names of what
    quantised files say of activations."""
    entries = []
    for file, promised in weight_files(folder).items():
        table = tensorfile.read_table(file)
        if absent := set(promised) - {entry.name for entry in table}:
            raise ValueError(f"{file} lacks the tensor {min(absent)} that the index promises in it")
        entries += table
    config_file = folder / "config.json"
    options = options_of(read_json(config_file), str(config_file))
    others = [entry for entry in entries if OTHER_MODALITIES.match(entry.name)]
    text = [entry for entry in entries if not OTHER_MODALITIES.match(entry.name)]
    sources, passed_over = gathered(text, options)
    for source in sources:
        if isinstance(source, Entry) and source.dtype not in tensorfile.DTYPES:
            raise ValueError(
                f"{source.file}: tensor {source.name} is {source.dtype}, quantised in a form that "
                "nothing beside it tells"
            )
    return [*sources, *others], [entry.name for entry in passed_over]


def check_sizes(folder: Path, config: Gemma4TextConfig, entries: list[Source]) -> None:
    """Refuses a config whose sizes are not the files', before even a module tree is made of it."""
    config_file = folder if folder.is_file() else folder / "config.json"
    layers: set[int] = set()
    for entry in entries:
        if OTHER_MODALITIES.match(entry.name):
            continue
        if layer := LAYER.search(entry.name):
            layers.add(int(layer[1]))
        for name, field in (
            ("embed_tokens.weight", "vocab_size"),
            ("embed_tokens_per_layer.weight", "vocab_size_per_layer_input"),
        ):
            rows = getattr(config, field)
            if entry.name.endswith(name) and entry.shape[:1] != (rows,):
                raise ValueError(
                    f"{config_file}: {field} is {rows}, "
                    f"but {entry.file}: tensor {entry.name} has shape {list(entry.shape)}"
                )
    if layers and max(layers) + 1 != config.num_hidden_layers:
        raise ValueError(
            f"{config_file}: num_hidden_layers is {config.num_hidden_layers}, "
            f"but the last layer of the weight files is layer {max(layers)}"
        )


def _matched(
    model: "PreTrainedModel", folder: Path, entries: list[Source]
) -> tuple[dict[str, dict[Part, Source]], list[str]]:
    """What fills each part of each tensor of the model, and the names that fill none."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:  # the embedding is the head
        tensors.pop("lm_head.weight", None)
    names = {name.removeprefix("model."): name for name in tensors}
    found: dict[str, dict[Part, Source]] = {name: {} for name in tensors}
    skipped = []
    for entry in entries:
        key, part = _place(entry.name, names)
        if key is None or not _has(tensors[key], part):
            if not _skippable(entry.name, model.config):
                raise ValueError(f"{entry.file}: tensor {entry.name} is not part of this model")
            skipped.append(entry.name)
            continue
        parts = found[key]
        rival = next((parts[p] for p in parts if part in (p, WHOLE) or p == WHOLE), None)
        if rival:
            raise ValueError(
                f"{entry.file}: tensor {entry.name} gives {key} a second time, after {rival.name}"
            )
        shape = _view(tensors[key], part).shape
        fits = entry.fits(shape) if isinstance(entry, Packed) else entry.shape == shape
        if not fits:
            raise ValueError(
                f"{entry.file}: tensor {entry.name} must have shape {list(shape)}, "
                f"got {list(entry.shape)}"
            )
        parts[part] = entry
    missing = [
        name
        for name, parts in found.items()
        if WHOLE not in parts and len(parts) != _singles(name, tensors[name])
    ]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} tensors are missing, the first of them {missing[0]}"
        )
    if model.config.tie_word_embeddings:
        _check_tied_head(entries)
    return found, skipped


def _place(name: str, names: dict[str, str]) -> tuple[str | None, Part]:
    """The model's tensor, and the part of it, that a checkpoint's tensor fills; None for none."""
    for prefix in PREFIXES:
        if not name.startswith(prefix):
            continue
        # Some exports put the experts and the router into a module of their own.
        key, part = name[len(prefix) :].replace(".moe.", "."), WHOLE
        if single := SINGLE_EXPERT.fullmatch(key):
            stem, expert, row = single.groups()
            key, part = f"{stem}.{FUSED[row]}", (int(expert), row)
        if key in names:
            return names[key], part
    return None, WHOLE


def _has(tensor: Tensor, part: Part) -> bool:
    return part == WHOLE or part[0] < len(tensor)


def _view(tensor: Tensor, part: Part) -> Tensor:
    """The part of an expert tensor [E, ...] that one expert's projection fills, or all of it."""
    if part == WHOLE:
        return tensor
    expert, row = part
    matrix = tensor[expert]
    return matrix if row == "down_proj" else matrix.chunk(2)[row == "up_proj"]


def _singles(name: str, tensor: Tensor) -> int:
    """How many tensors fill this one where the experts come one by one."""
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return 1
    return len(tensor) * (2 if name.endswith("gate_up_proj") else 1)


def _skippable(name: str, config: Gemma4TextConfig) -> bool:
    """Tensors that a text model does without: other modalities, a head where none is wanted, and
    the K and V that original releases carry for layers that borrow them."""
    if OTHER_MODALITIES.match(name) or name.endswith("lm_head.weight"):
        return True
    layer = SHARED_KV.search(name)
    index = int(layer[1]) if layer else config.num_hidden_layers
    return index < config.num_hidden_layers and config.kv_owner(index) != index


def _check_tied_head(entries: list[Source]) -> None:
    """A head in the file of a tied model must repeat the embedding: the config is believed."""
    table = next(entry for entry in entries if entry.name.endswith("embed_tokens.weight"))
    for head in entries:
        if head.name.endswith("lm_head.weight") and not _equal(head, table):
            raise ValueError(
                f"{head.file}: {head.name} differs from the token embedding, but the config says "
                "tie_word_embeddings; set it to false to use both"
            )


def _equal(one: Source, other: Source) -> bool:
    """Whether two weights are the same tensors of the same numbers."""
    if isinstance(one, Packed) or isinstance(other, Packed):
        return (
            isinstance(one, Packed)
            and isinstance(other, Packed)
            and one.parts.keys() == other.parts.keys()
            and all(tensorfile.equal(one.parts[role], other.parts[role]) for role in one.parts)
        )
    return tensorfile.equal(one, other)


class _Reader:
    """Makes the model's tensors: mapped from their files where that serves, kept packed where that
    is wanted and there is a form for it, else filled from their files."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        ple_device: torch.device | str | None,
        keeps: bool,
    ):
        self.model, self.dtype, self.keeps = model, dtype, keeps
        self.device, self.ple_device = device, torch.device(ple_device or device)
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.memory: dict[Path, torch.UntypedStorage] = {}
        self.buffer = tensorfile.make_buffer(pinned=device.type == "cuda")
        self.dense: dict[str, Tensor] = {}
        self.kept: dict[str, PackedWeight] = {}

    def read(self, name: str, parts: dict[Part, Source]) -> None:
        where = self.ple_device if name.endswith(PLE_TABLE) else self.device
        pinned = where.type == "cpu" and self.device.type == "cuda"
        packed = {part: source for part, source in parts.items() if isinstance(source, Packed)}
        if self.keeps and len(packed) == len(parts) and keep.can_be_kept(self.model, name):
            shape = self.shapes[name]
            placed = [(source, _first_row(shape, part)) for part, source in packed.items()]
            weight = keep.read(placed, shape, where, pinned)
            if weight is not None:
                self.kept[name] = weight
                return
        self.dense[name] = self._dense(name, parts, where, pinned)

    def count_slow(self) -> int:
        """Kept weights that a CPU has no product for."""
        if self.device.type != "cpu":
            return 0
        multiplied = {name: w for name, w in self.kept.items() if not name.endswith(PLE_TABLE)}
        return sum(
            ".experts." in name or self.dtype != torch.bfloat16 or not torch_multiplies(weight)
            for name, weight in multiplied.items()
        )

    def _dense(
        self, name: str, parts: dict[Part, Source], where: torch.device, pinned: bool
    ) -> Tensor:
        whole = parts.get(WHOLE)
        if isinstance(whole, Entry) and where.type == "cpu" and not pinned:
            same = whole.torch_dtype == self.dtype
            tensor = tensorfile.mapped(whole, self.memory) if same else None
            if tensor is not None:
                return tensor
        tensor = torch.empty(self.shapes[name], dtype=self.dtype, device=where, pin_memory=pinned)
        for part, source in parts.items():
            view = _view(tensor, part)
            if isinstance(source, Packed):
                source.fill(view)
            else:
                tensorfile.fill(view, source, self.buffer)
        return tensor


def _first_row(shape: tuple[int, ...], part: Part) -> int:
    """Of what `part` fills in a tensor of this shape, counted over all experts."""
    expert, row = part
    if part == WHOLE:
        return 0
    return expert * shape[-2] + (shape[-2] // 2 if row == "up_proj" else 0)


def _told(folder: Path, reader: _Reader, found: dict[str, dict[Part, Source]]) -> str | None:
    """One line of what became of quantised weights, None where there are none; and a warning where
    weights take more memory than in their file, which is why they were quantised, or more time."""
    packed = {
        name: [source for source in parts.values() if isinstance(source, Packed)]
        for name, parts in found.items()
    }
    packed = {name: sources for name, sources in packed.items() if sources}
    if not packed:
        return None
    told, worse = [], False
    if reader.kept:
        forms = Counter(map(keep.form_of, reader.kept.values()))
        size = sum(weight.nbytes for weight in reader.kept.values()) / 1e9
        counts = ", ".join(f"{count} {form}" for form, count in forms.items())
        told.append(f"{len(reader.kept)} of its weights stay packed in {size:.3g} GB ({counts})")
    if slow := reader.count_slow():
        worse = True
        told.append(
            f"{slow} of them are unpacked again at each product, for on a CPU none is made of "
            f"their form in {reader.dtype} (quantized='dequantize' does it once)"
        )
    if unpacked := [name for name in packed if name in reader.dense]:
        worse = True
        size = sum(reader.dense[name].nbytes for name in unpacked) / 1e9
        before = sum(source.size for name in unpacked for source in packed[name]) / 1e9
        which = ", ".join(unpacked[:3]) + (", ..." if len(unpacked) > 3 else "")
        told.append(
            f"{len(unpacked)} are unpacked to {reader.dtype} and take {size:.3g} GB, not "
            f"{before:.3g} ({which})"
        )
    method = next(iter(packed.values()))[0].options.method
    line = f"{folder} is quantised ({method}): {'; '.join(told)}"
    if worse:
        warnings.warn(line, stacklevel=4)
    return line
