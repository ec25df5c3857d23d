"""Writing a checkpoint with its linear layers in 4 or 8 bits, as vLLM and transformers read them.

Layer by layer, so that no more than a shard and one dense tensor are in memory. Embeddings, head,
norms, router and what belongs to other modalities stay as they are.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from gemma4_kernels.packed import halves

from .checkpoint.folder import TOKENIZER_FILES, owned_files, resolve
from .checkpoint.load import LAYER, OTHER_MODALITIES, read_sources
from .checkpoint.packed import Packed
from .checkpoint.save import write_shards
from .checkpoint.tensorfile import Entry, read_rows
from .files import Json, read_json, replacing, write_json

LINEAR = re.compile(
    r"(?P<module>.*(self_attn\.[qkvo]_proj|(mlp|experts\.\d+)\.(gate|up|down)_proj"
    r"|per_layer_(input_gate|projection|model_projection)))\.weight"
)
EXPERTS = re.compile(r"(?P<stem>.*\.experts)\.(?P<which>gate_up_proj|down_proj)(\.weight)?")
LEFT_DENSE = [
    *("lm_head", "re:.*router.*", "re:.*vision_tower.*", "re:.*audio_tower.*"),
    *("re:.*embed_vision.*", "re:.*embed_audio.*", "re:.*multi_modal_projector.*"),
]
GROUP = 32
SHARD_BYTES = 2 * 10**9
# Rows that are rounded at once.
PIECE_ROWS = 1024


@dataclass
class Report:
    """What became of the weights: relative squared errors by layer, and how many were on a grid."""

    squares: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    tensors: int = 0
    on_grid: int = 0  # whose codes and steps were recovered and not rounded anew
    before_bytes: int = 0
    after_bytes: int = 0

    def add(self, name: str, w: Tensor, error: Tensor) -> None:
        layer = LAYER.search(name)
        key = f"layer {int(layer[1])}" if layer else name
        self.squares[key] = self.squares.get(key, 0.0) + float(w.double().square().sum())
        self.errors[key] = self.errors.get(key, 0.0) + float(error.double().square().sum())

    def relative(self, key: str) -> float:
        """The root of the mean squared error over that of the weights."""
        return math.sqrt(self.errors[key] / self.squares[key]) if self.squares[key] else 0.0


# Codes [N, D] of a weight's rows, and their scales.
Rounded = tuple[Tensor, Tensor]


def on_grid(w: Tensor) -> Tensor | None:
    """The steps [N, n] of weights [N, n, 32] that are all step · level, level -8..7, as bf16 holds
    it; None where one group is not.

    Such are Google's weights of quantisation-aware training. The largest level of a group is not
    known: the least that fits all of its weights is taken.
    """
    largest = w.abs().amax(-1, keepdim=True)
    step = torch.zeros_like(largest)
    for most in range(8, 0, -1):
        trial = largest / most
        level = torch.where(trial > 0, w / trial, 0.0)
        near = level.round()
        # The weight and the largest one were each rounded to bf16, by 2^-8 of themselves at most.
        close = (level - near).abs() <= near.abs() * 2.1 * 2.0**-8
        fits = (close & (near >= -8) & (near <= 7)).all(-1, keepdim=True)
        step = torch.where(fits, trial, step)
    if bool(((step == 0) & (largest > 0)).any()):
        return None
    level = torch.where(step > 0, w / step, 0.0).round()
    square = level.square().sum(-1)
    fitted = torch.where(square > 0, (w * level).sum(-1) / square, 1.0).bfloat16()
    # Of the neighbours in bf16, the one that gives the most weights back bit by bit.
    bits = fitted.view(torch.int16)
    best, most_equal = fitted, torch.full(square.shape, -1)
    for change in (0, -1, 1):
        trial = (bits + change).view(torch.bfloat16)
        equal = ((trial.float()[..., None] * level).bfloat16() == w.bfloat16()).sum(-1)
        best = torch.where(equal > most_equal, trial, best)
        most_equal = torch.maximum(equal, most_equal)
    return best.float()


def round_4_bits(w: Tensor, step: Tensor | None) -> Rounded:
    """Codes -8..7 with a bf16 scale for 32 columns: the grid's steps, or those of least error."""
    w = w.unflatten(1, (-1, GROUP))
    if step is None:
        step = _best_step(w)
    return _codes(w, step, -8, 7).flatten(1), step


def _best_step(w: Tensor) -> Tensor:
    largest = w.abs().amax(-1)
    step, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for most in (7.0, 7.25, 7.5, 7.75, 8.0, 8.5, 9.0):
        trial = torch.where(largest > 0, largest / most, 1.0).bfloat16().float()
        error = (_codes(w, trial, -8, 7) * trial[..., None] - w).square().sum(-1)
        step = torch.where(error < least, trial, step)
        least = torch.minimum(error, least)
    return step


def _codes(w: Tensor, step: Tensor, least: int, most: int) -> Tensor:
    return (w / step[..., None]).round().clamp(least, most)


def round_8_bits(w: Tensor, step: Tensor | None) -> Rounded:
    """Codes -127..127 with a bf16 scale for each row."""
    scale = _row_scale(w, 127)
    return (w / scale).round().clamp(-127, 127), scale


def round_fp8(w: Tensor, step: Tensor | None) -> Rounded:
    """e4m3 with a bf16 scale for each row."""
    scale = _row_scale(w, 448)
    return (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def _row_scale(w: Tensor, most: int) -> Tensor:
    largest = w.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, largest / most, 1.0).bfloat16().float()


@dataclass(frozen=True)
class Format:
    """How weights are rounded, and what a config says of it."""

    rounded: Callable[[Tensor, Tensor | None], Rounded]
    bits: int
    config: Json
    name: str

    def fits(self, columns: int) -> bool:
        return self.bits == 8 or columns % GROUP == 0

    def tensors(self, code: Tensor, scale: Tensor) -> dict[str, Tensor]:
        if code.dtype == torch.float8_e4m3fn:
            return {"weight": code, "weight_scale": scale}
        shape = torch.tensor(code.shape)
        each = 32 // self.bits
        rows, columns = code.shape
        padded = torch.zeros(rows, -(-columns // each) * each, dtype=torch.uint8)
        # All bits of eight, or the low four of them.
        padded[:, :columns] = code.view(torch.uint8) + 2 ** (self.bits - 1)
        if self.bits == 4:
            padded = halves(padded)
        words = padded.view(torch.int32)
        return {"weight_packed": words, "weight_scale": scale, "weight_shape": shape}


def _weights(bits: int, kind: str, **more: object) -> Json:
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **more}


FORMATS = {
    "w4a16": Format(
        round_4_bits,
        4,
        {"weights": _weights(4, "int", strategy="group", group_size=GROUP)},
        "pack-quantized",
    ),
    "w8a16": Format(
        round_8_bits, 8, {"weights": _weights(8, "int", strategy="channel")}, "pack-quantized"
    ),
    "fp8": Format(
        round_fp8,
        8,
        {
            "weights": _weights(8, "float", strategy="channel"),
            "input_activations": _weights(8, "float", strategy="token") | {"dynamic": True},
        },
        "float-quantized",
    ),
}


def quantize(
    source: str | Path,
    target: str | Path,
    format: str = "w4a16",
    progress: Callable[[str], object] = lambda name: None,
    head: str | None = None,
) -> Report:
    """Writes the checkpoint `source` (folder or hub id) to the folder `target`, compressed-tensors.

    format: "w4a16" (int4, a scale for 32 columns), "w8a16" (int8, a scale for each row) or "fp8"
    (e4m3, a scale for each row). Weights that lie on the grid of quantisation-aware training keep
    its codes and steps; others are rounded to the nearest. Linear layers whose columns do not fit
    stay dense. head="8bit" writes a head of its own in eight bits, which every token reads whole,
    beside the embedding that it was tied to. progress is told of each tensor. Raises ValueError for
    another format, a source that is quantised already, and weights that are not finite.
    """
    if head not in (None, "8bit"):
        raise ValueError(f"head must be '8bit' or None, got {head!r}")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    how, folder = FORMATS[format], resolve(source)
    if folder.is_file():
        raise ValueError(f"a folder of dense weights is quantised, not a .gguf file: {folder}")
    if Path(target).resolve() == folder.resolve():
        raise ValueError(f"a checkpoint is not quantised in place: {target} is the source")
    sources, _ = read_sources(folder)
    if packed := next((entry for entry in sources if isinstance(entry, Packed)), None):
        raise ValueError(f"{packed.file} is quantised already: it holds {packed.name} packed")
    entries = [entry for entry in sources if isinstance(entry, Entry)]
    report, left = Report(before_bytes=sum(entry.size for entry in entries)), list(LEFT_DENSE)
    with replacing(Path(target)) as (staging, removed):
        removed |= owned_files(Path(target))
        made = _converted(entries, how, report, left, progress)
        wide = how if how.bits == 8 else FORMATS["w8a16"]
        if head:
            left.remove("lm_head")
            made = chain(made, _head(entries, wide, report))
        report.after_bytes = write_shards(staging, made, SHARD_BYTES)
        for name in ("generation_config.json", *TOKENIZER_FILES):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staging / name)
        config = read_json(folder / "config.json")
        groups = {"group_0": {"targets": ["Linear"], "input_activations": None, **how.config}}
        if head:
            own = {"targets": ["re:.*lm_head"], "input_activations": None, **wide.config}
            groups |= {} if wide is how else {"group_1": own}
            for part in (config, config.get("text_config")):
                if isinstance(part, dict):
                    part["tie_word_embeddings"] = False
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": how.name,
            "quantization_status": "compressed",
            "ignore": left,
            "config_groups": groups,
            "kv_cache_scheme": None,
        }
        write_json(staging / "config.json", config)
    return report


def _converted(
    entries: Iterable[Entry],
    how: Format,
    report: Report,
    left: list[str],
    progress: Callable[[str], object],
) -> Iterator[tuple[str, Tensor]]:
    """The new file's tensors; modules that stay dense, though they are linear, join `left`."""
    for entry in sorted(entries, key=lambda entry: entry.name):
        progress(entry.name)
        linear, experts = LINEAR.fullmatch(entry.name), EXPERTS.fullmatch(entry.name)
        if entry.name == "lm_head.weight" and "lm_head" not in left:
            continue
        if OTHER_MODALITIES.match(entry.name) or not (linear or experts):
            yield entry.name, read_rows(entry)
        elif not how.fits(entry.shape[-1]):
            left.append(linear["module"] if linear else f"re:.*experts.*{experts['which']}")  # type: ignore[index]
            yield entry.name, read_rows(entry)
        elif linear:
            yield from _rounded(linear["module"], read_rows(entry), how, report)
        else:
            assert experts is not None
            for e in range(entry.shape[0]):
                matrix = read_rows(entry, e, e + 1)[0]
                rows = ("gate_proj", "up_proj")
                names = rows if experts["which"] == "gate_up_proj" else ("down_proj",)
                for name, part in zip(names, matrix.chunk(len(names)), strict=True):
                    yield from _rounded(f"{experts['stem']}.{e}.{name}", part, how, report)


def _head(entries: list[Entry], how: Format, report: Report) -> Iterator[tuple[str, Tensor]]:
    """The head's tensors, of its own weight or of the embedding that is the head."""
    found = {entry.name: entry for entry in entries if not OTHER_MODALITIES.match(entry.name)}
    table = next(entry for name, entry in found.items() if name.endswith("embed_tokens.weight"))
    yield from _rounded("lm_head", read_rows(found.get("lm_head.weight", table)), how, report)


def _rounded(
    module: str, weight: Tensor, how: Format, report: Report
) -> Iterator[tuple[str, Tensor]]:
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{module}.weight must hold finite numbers to be quantised")
    pieces = weight.split(PIECE_ROWS)
    steps = _steps(pieces) if how.bits == 4 else None
    codes, scales = [], []
    for i, rows in enumerate(pieces):
        w = rows.float()
        code, scale = how.rounded(w, None if steps is None else steps[i])
        each = w.shape[1] // scale.shape[1]
        report.add(module, w, code.float() * scale.repeat_interleave(each, 1) - w)
        codes.append(code if code.dtype == torch.float8_e4m3fn else code.to(torch.int8))
        scales.append(scale.bfloat16())
    report.tensors += 1
    report.on_grid += steps is not None
    for role, tensor in how.tensors(torch.cat(codes), torch.cat(scales)).items():
        yield f"{module}.{role}", tensor


def _steps(pieces: Iterable[Tensor]) -> list[Tensor] | None:
    """Of all pieces of a matrix, or of none: all of it is on the grid or it is not."""
    steps = []
    for rows in pieces:
        step = on_grid(rows.float().unflatten(1, (-1, GROUP)))
        if step is None:
            return None
        steps.append(step)
    return steps
