"""The loop: prefill in chunks, then one token a step for the whole batch."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..cache import Cache, KVDtype
from ..decode import Decoder
from ..outputs import GenerateOutput
from .options import Configured, GenerationConfig, chosen
from .prompt import ArrayLike, Prompt, read_prompt
from .reader import Reader
from .sampling import Processors, Sampler, processors
from .stopping import Criteria, Decodes, Stopper

if TYPE_CHECKING:
    from ..model import Gemma4ForCausalLM

# Steps whose memory is reserved at once; that of longer answers doubles when it is used up.
RESERVED_STEPS = 8192


class Streamer(Protocol):
    """Receives the prompt's ids [B, S] first, then each step's [B], then the end."""

    def put(self, ids: Tensor) -> None: ...

    def end(self) -> None: ...


@torch.no_grad()
def generate(
    model: "Gemma4ForCausalLM",
    input_ids: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    per_layer_inputs: Tensor | None = None,
    past_key_values: Cache | None = None,
    cache: Cache | None = None,
    generation_config: GenerationConfig | Configured | None = None,
    logits_processor: Processors = None,
    stopping_criteria: Criteria = None,
    tokenizer: Decodes | None = None,
    seed: int | None = None,
    streamer: Streamer | None = None,
    prefill_chunk_size: int = 2048,
    compile: bool = False,
    kv_dtype: KVDtype | None = None,
    **options: object,
) -> Tensor | GenerateOutput:
    """Continues each row of a batch.

    input_ids [B, S] with left (or right) padding marked by attention_mask [B, S], or inputs_embeds
    [B, S, D] (with per_layer_inputs [B, S, L, P] on models with PLE). options: any field of
    `GenerationConfig`; one that is not given is generation_config's, or the model's.

    past_key_values (or cache): the cache of an earlier call, whose conversation goes on; it is
    written to. input_ids is the whole conversation: what the cache holds of each row's beginning is
    not run again, what it holds besides is taken back. A row whose rings have lost the window that
    it would go on from starts anew.

    logits_processor: functions of the ids so far [B, T] (padded on the left) and the scores [B, V]
    that return scores, called before temperature and cuts. stopping_criteria: functions of the same
    that say which rows end, bool [B]. seed: row r draws by seed + r and by how many tokens it
    holds, so that it samples as it would alone, and on a CPU as on a GPU; without it the seed comes
    from torch's global generator. On a GPU a streamer is up to two tokens behind, unless a function
    of the caller looks at each step. compile: on a CPU, decode by compiled C++ (see `Decoder`), for
    which the first call in a process waits. kv_dtype: of a new cache, see `Cache`; one that is
    given keeps its own.

    Returns [B, S + new], prompt and new ids ([B, new] for inputs_embeds), or a `GenerateOutput`;
    the num_return_sequences continuations of a prompt are rows side by side. Raises ValueError for
    an empty prompt and for an option out of range or not taken, TypeError for an unknown one,
    RuntimeError if the logits after the prompt are not finite.
    """
    config = chosen(model.generation_config, generation_config, options)
    given = cache if cache is not None else past_key_values
    _check(model, given, inputs_embeds, prefill_chunk_size)
    vocab_size, device = model.config.vocab_size, model.device
    prompt = read_prompt(
        input_ids, attention_mask, inputs_embeds, per_layer_inputs, vocab_size, device
    )
    config.check(vocab_size, prompt.width)
    limit, copies = config.new_tokens(prompt.width), config.num_return_sequences
    batch = prompt.repeated(copies)
    process = processors(config, batch.ids, batch.real, vocab_size, logits_processor)
    sampler = Sampler(config, process, seed, batch.batch_size, device)
    stopper = Stopper(config, tokenizer, stopping_criteria, batch, sampler.done)
    # Which tokens a cache holds matters where it outlives the call.
    known = input_ids is not None and (given is not None or config.return_dict_in_generate)
    rows = prompt.rows() if known else None
    held = _cache_for(model, prompt, given, rows, min(limit, RESERVED_STEPS), kv_dtype)
    answer = _Answer(config, streamer, batch, model.config.max_position_embeddings)
    # Functions of the caller see a step before the next one is begun.
    alone = sampler.is_one_op and not stopper.criteria
    reader = Reader(min(_lag(device), held.rollback) if alone else 0)
    with _recorded(held, rows, answer.new, reader):
        logits_BV = _prefill(model, prompt, held, prefill_chunk_size)
    if copies > 1:
        held, logits_BV = held.repeated(copies), logits_BV.repeat_interleave(copies, 0)
        rows = batch.rows() if known else None
    whole = dict(watched=not alone, compile=compile)
    steps = _Steps(model, held, sampler, logits_BV, limit, batch.ids, **whole)
    with _recorded(held, rows, answer.new, reader):
        for ids in _made(steps, reader, limit):
            answer.add(ids)
            if stopper(ids, steps.ids_BT, steps.scores):
                break
        held.trim(steps.made - len(answer.new))
    return answer.finished(held, steps)


def _lag(device: torch.device) -> int:
    """How many steps a GPU may be ahead of the tokens that the host has read."""
    return 2 if device.type == "cuda" else 0


def _made(steps: "_Steps", reader: Reader, limit: int) -> Iterator[list[int]]:
    """The ids of each step, of which the next ones may have been begun already."""
    for _ in range(limit):
        steps()
        reader.put(steps.sampler.ids)
        yield from reader.read()
    yield from reader.read(to_the_last=True)


class _Steps:
    """Takes every row one token further with each call, to sampler.ids, and waits for nothing.

    ids_BT are all tokens so far, if they are watched, or the prompt's. scores and logits are kept
    as the sampler's options say.
    """

    def __init__(
        self,
        model: "Gemma4ForCausalLM",
        cache: Cache,
        sampler: Sampler,
        logits_BV: Tensor,
        limit: int,
        ids_BT: Tensor,
        watched: bool,
        compile: bool,
    ):
        self.model, self.cache, self.sampler, self.limit = model, cache, sampler, limit
        self.ids_BT, self.watched, self.compile = ids_BT, watched, compile
        self.first: Tensor | None = logits_BV
        self.decoder: Decoder | None = None
        self.made = 0
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self) -> None:
        if self.first is not None:
            logits_BV, self.first = self.first, None
            self._choose(logits_BV, torch.tensor(self.cache.lengths, device=self.cache.device))
        else:
            decoder = self._next_decoder()
            logits_BV = decoder(self.sampler.ids)
            if decoder.sampler is None:
                self._choose(logits_BV, decoder.plan.positions)
        self.made += 1
        if self.watched:
            self.ids_BT = torch.cat([self.ids_BT, self.sampler.ids[:, None]], 1)

    def _choose(self, logits_BV: Tensor, positions_B: Tensor) -> None:
        scores_BV = self.sampler(self.ids_BT, logits_BV, positions_B)
        if scores_BV is not None:
            self.scores.append(scores_BV)
        if self.sampler.options.output_logits:
            self.logits.append(logits_BV.to(torch.float32, copy=True))

    def _next_decoder(self) -> Decoder:
        if self.decoder is None or self.cache.room == 0:
            # A graph holds on to its addresses: a cache that grows needs another decoder, and the
            # old one's graph is freed before memory for the next is asked for.
            self.decoder = None
            sampler = self.sampler if self.sampler.is_one_op else None
            steps = min(self.limit - self.made, RESERVED_STEPS)
            self.decoder = Decoder(self.model, self.cache, steps, sampler, self.compile)
        return self.decoder


class _Answer:
    """The new tokens, step by step; a streamer sees them first."""

    def __init__(
        self,
        config: GenerationConfig,
        streamer: Streamer | None,
        batch: Prompt,
        max_positions: int,
    ):
        self.config, self.streamer, self.given = config, streamer, batch.given
        self.longest, self.max_positions = max(batch.lengths), max_positions
        self.new: list[list[int]] = []
        if streamer is not None:
            streamer.put(batch.given.cpu())
        if self.longest > max_positions:
            self._warn_beyond_positions()

    def add(self, ids: list[int]) -> None:
        self.new.append(ids)
        if self.longest + len(self.new) == self.max_positions + 1:
            self._warn_beyond_positions()
        if self.streamer is not None:
            self.streamer.put(torch.tensor(ids))

    def finished(self, cache: Cache, steps: _Steps) -> Tensor | GenerateOutput:
        """What `generate` returns."""
        if self.streamer is not None:
            self.streamer.end()
        new = torch.tensor(self.new).T.to(self.given.device)
        sequences = torch.cat([self.given, new], 1)
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateOutput(
            sequences,
            tuple(steps.scores) if self.config.output_scores else None,
            tuple(steps.logits) if self.config.output_logits else None,
            cache,
        )

    def _warn_beyond_positions(self) -> None:
        """Once: for a prompt that is too long, or at the token with which an answer becomes so."""
        warnings.warn(
            f"the model was made for {self.max_positions} positions (max_position_embeddings), and "
            "a row is longer now: what follows may make no sense",
            stacklevel=5,  # generate's caller: no_grad's wrapper lies between
        )


def _check(
    model: "Gemma4ForCausalLM", cache: object, inputs_embeds: Tensor | None, chunk: object
) -> None:
    if "prepare_inputs_for_generation" in vars(model):
        raise ValueError(
            "generate does not call prepare_inputs_for_generation, but this model was given one of "
            "its own (prompt tuning, whose prompts would be left out)"
        )
    if model.config.bidirectional:
        raise ValueError("use_bidirectional_attention 'all' models do not generate")
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"prefill_chunk_size must be a whole number of at least 1, got {chunk!r}")
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a gemma4.Cache, got {type(cache).__name__}")
    if inputs_embeds is not None:
        raise ValueError("past_key_values go with input_ids: they say what is held already")


def _cache_for(
    model: "Gemma4ForCausalLM",
    prompt: Prompt,
    given: Cache | None,
    rows: list[list[int]] | None,
    steps: int,
    kv_dtype: KVDtype | None,
) -> Cache:
    """The cache, new or given, with room for the prompt and `steps` more; of a given one what fits
    `rows` is kept."""
    room = max(prompt.lengths) + steps
    if given is None or rows is None:
        sizes = prompt.batch_size, model.compute_dtype, model.device, room
        return Cache(model.config, *sizes, kv_dtype=kv_dtype)
    given.check(model.config, prompt.batch_size, model.compute_dtype, model.device)
    if kv_dtype not in (None, given.kv_dtype):
        raise ValueError(f"the cache has kv_dtype {given.kv_dtype!r}, got {kv_dtype!r}")
    given.resume(rows)
    given.reserve(room)
    return given


@contextmanager
def _recorded(
    cache: Cache, rows: list[list[int]] | None, new: list[list[int]], reader: Reader
) -> Iterator[None]:
    """Notes which tokens the cache holds, `rows` and then `new`, however the block ends; if it
    does early, those too that were still on their way."""
    ended = False
    try:
        yield
        ended = True
    finally:
        if rows is not None:
            made = new if ended else [*new, *reader.read(to_the_last=True)]
            columns = map(list, zip(*made, strict=True)) if made else [[]] * len(rows)
            whole = [row + more for row, more in zip(rows, columns, strict=True)]
            cache.record(whole, cut_short=not ended)


def _prefill(model: "Gemma4ForCausalLM", prompt: Prompt, cache: Cache, chunk: int) -> Tensor:
    """Runs what the cache lacks, chunk by chunk; the logits [B, V] after the last token."""
    inputs, mask = prompt.rest(cache)
    past, width = cache.columns, next(iter(inputs.values())).shape[1]
    for begin in range(0, width, chunk):
        end = min(begin + chunk, width)
        part = {name: x[:, begin:end] for name, x in inputs.items()}
        seen = None if mask is None else mask[:, : past + end]
        if end < width:
            # Only the keys are wanted: one column is the least that later layers can be given.
            model.model(attention_mask=seen, cache=cache, logits_to_keep=1, **part)
        else:
            output = model(attention_mask=seen, cache=cache, logits_to_keep=1, **part)
    logits_BV = output.logits[:, -1]
    _check_finite(logits_BV, model, prompt, chunk)
    return logits_BV


def _check_finite(
    logits_BV: Tensor, model: "Gemma4ForCausalLM", prompt: Prompt, chunk: int
) -> None:
    """RuntimeError, naming the first layer that is to blame, where logits are NaN or infinite."""
    bad_B = ~logits_BV.isfinite().all(-1)
    if not bool(bad_B.any()):
        return
    row = int(bad_B.int().argmax())
    where = _first_not_finite(model, prompt.row(row), chunk)
    raise RuntimeError(f"the logits of row {row} are not finite ({model.dtype}): {where}")


def _first_not_finite(model: "Gemma4ForCausalLM", prompt: Prompt, chunk: int) -> str:
    cache = Cache(model.config, 1, model.compute_dtype, model.device)
    inputs, _ = prompt.rest(cache)
    first, width = model.config.num_hidden_layers + 1, prompt.lengths[0]
    for begin in range(0, width, chunk):
        part = {name: x[:, begin : begin + chunk] for name, x in inputs.items()}
        output = model(cache=cache, output_hidden_states=True, logits_to_keep=1, **part)
        finite = [bool(state.isfinite().all()) for state in output.hidden_states]
        first = min(first, finite.index(False) if False in finite else first)
    if first > model.config.num_hidden_layers:
        return "the head's product overflows"
    return "the embeddings are not" if first == 0 else f"layer {first - 1} is the first that is not"
