"""Generation: prefill in chunks, then one token a step for the whole batch."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache import Cache
from .config import read_json
from .decode import Decoder
from .layout import make_layout


class Streamer(Protocol):
    """Receives the prompt's ids [B, S] first, then each step's [B], then the end."""

    def put(self, ids: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class GenerationConfig:
    """How to choose tokens where the caller does not say; read from generation_config.json."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature} (do_sample=False is greedy)"
            )
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be positive, or 0 for none, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    @property
    def eos_ids(self) -> list[int]:
        eos = self.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def updated_from(self, folder: Path) -> "GenerationConfig":
        """With what the folder's generation_config.json says, if there is one."""
        file = folder / "generation_config.json"
        if not file.is_file():
            return self
        names = {field.name for field in fields(self)}
        known = {k: v for k, v in read_json(file).items() if k in names and v is not None}
        return replace(self, **known)

    def save_pretrained(self, path: str | Path) -> None:
        data = {name: value for name, value in asdict(self).items() if value is not None}
        text = json.dumps(data, indent=2) + "\n"
        (Path(path) / "generation_config.json").write_text(text, encoding="utf-8")


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    per_layer_inputs: Tensor | None = None,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    streamer: Streamer | None = None,
    prefill_chunk_size: int = 2048,
) -> Tensor:
    """Continues each row of a batch.

    input_ids [B, S] with left (or right) padding marked by attention_mask [B, S], or inputs_embeds
    [B, S, D] (with per_layer_inputs [B, S, L, P] on models with PLE). An option that is not given
    is model.generation_config's. eos_token_id: one id or several, each of which ends a row, which
    is then filled with pad_token_id. seed: row r samples from its own generator, seeded seed + r,
    so that it samples as it would alone; without it torch's global generator is used.

    Returns [B, S + new], prompt and new ids ([B, new] for inputs_embeds). Raises ValueError for an
    empty prompt or an option out of range.
    """
    given = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    options = replace(model.generation_config, **{k: v for k, v in given.items() if v is not None})
    if prefill_chunk_size < 1:
        raise ValueError(f"prefill_chunk_size must be at least 1, got {prefill_chunk_size}")
    if model.config.bidirectional:
        raise ValueError("use_bidirectional_attention 'all' models do not generate")
    prompt = input_ids if input_ids is not None else inputs_embeds
    dimensions = 2 if input_ids is not None else 3
    if prompt is not None and prompt.ndim != dimensions:
        raise ValueError(
            f"the prompt must be input_ids [B, S] or inputs_embeds [B, S, D], "
            f"got {list(prompt.shape)}"
        )
    if prompt is None or prompt.shape[1] == 0:
        raise ValueError("the prompt is empty: it must hold at least one token per row")
    batch, width = prompt.shape[:2]
    device = model.device
    inputs = {
        "input_ids": input_ids,
        "inputs_embeds": inputs_embeds,
        "per_layer_inputs": per_layer_inputs,
    }
    inputs, mask = _left_padded(inputs, attention_mask, (batch, width))
    if streamer is not None:
        streamer.put(
            input_ids if input_ids is not None else torch.empty(batch, 0, dtype=torch.int64)
        )
    generators = _generators(seed, batch, device)
    length = width + options.max_new_tokens
    cache = Cache(model.config, batch, model.compute_dtype, device, length)
    logits = _prefill(model, inputs, mask, cache, prefill_chunk_size)
    decoder = Decoder(model, cache, options.max_new_tokens - 1)
    eos = torch.tensor(options.eos_ids, dtype=torch.int64, device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    new: list[Tensor] = []
    while True:
        ids = _choose(logits, options, generators)
        ids = torch.where(done, options.pad_token_id or 0, ids)
        new.append(ids)
        if streamer is not None:
            streamer.put(ids.cpu())
        done = done | torch.isin(ids, eos)
        if len(new) == options.max_new_tokens or bool(done.all()):
            break
        logits = decoder(ids)
    if streamer is not None:
        streamer.end()
    ids = torch.stack(new, 1)
    return ids if input_ids is None else torch.cat([input_ids.to(device), ids], 1)


def _left_padded(
    inputs: dict[str, Tensor | None], mask: Tensor | None, shape: tuple[int, int]
) -> tuple[dict[str, Tensor | None], Tensor | None]:
    """The same batch with each row's tokens at its end, so that all rows go on from one column."""
    if mask is None:
        return inputs, None
    layout = make_layout(shape, torch.device("cpu"), mask)
    if 0 in layout.lengths:
        raise ValueError(f"the prompt of row {layout.lengths.index(0)} is empty: all its mask is 0")
    if all(c + n == shape[1] for c, n in zip(layout.columns, layout.lengths, strict=True)):
        return inputs, mask
    shifts = torch.tensor(
        [shape[1] - c - n for c, n in zip(layout.columns, layout.lengths, strict=True)]
    )
    source = (torch.arange(shape[1]) - shifts[:, None]) % shape[1]
    rows = torch.arange(shape[0])[:, None]
    moved = {
        name: None if x is None else x[rows.to(x.device), source.to(x.device)]
        for name, x in inputs.items()
    }
    return moved, mask[rows.to(mask.device), source.to(mask.device)]


def _prefill(
    model: Any, inputs: dict[str, Tensor | None], mask: Tensor | None, cache: Cache, chunk: int
) -> Tensor:
    """Fills the cache chunk by chunk; the logits [B, V] after the last token."""
    width = next(x for x in inputs.values() if x is not None).shape[1]
    for begin in range(0, width, chunk):
        end = min(begin + chunk, width)
        part = {name: None if x is None else x[:, begin:end] for name, x in inputs.items()}
        seen = None if mask is None else mask[:, :end]
        if end < width:
            # Only the keys are wanted: one column is the least that later layers can be given.
            model.model(attention_mask=seen, cache=cache, logits_to_keep=1, **part)
        else:
            output = model(attention_mask=seen, cache=cache, logits_to_keep=1, **part)
    return output.logits[:, -1]


def _generators(seed: int | None, batch: int, device: torch.device) -> list[Any]:
    if seed is None:
        return [None] * batch
    return [torch.Generator(device).manual_seed(seed + row) for row in range(batch)]


def _choose(logits_BV: Tensor, options: GenerationConfig, generators: list[Any]) -> Tensor:
    """The next token of each row [B]: the best, or one drawn from the filtered distribution."""
    if not options.do_sample:
        return logits_BV.argmax(-1)
    scores = logits_BV.float() / options.temperature
    count = min(options.top_k or scores.shape[-1], scores.shape[-1])
    if count == scores.shape[-1] and options.top_p in (None, 1.0):
        ids, probabilities = None, scores.softmax(-1)
    else:
        scores, ids = scores.topk(count, -1)
        probabilities = scores.softmax(-1)
        if options.top_p is not None:
            # Keep the best tokens whose predecessors' mass is below top_p; the first always stays.
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= options.top_p, 0.0)
    # argmax of p / e with e exponential draws from p; one generator a row keeps rows independent.
    noise = torch.empty_like(probabilities)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    drawn = (probabilities / noise).argmax(-1, keepdim=True)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)
