"""What each command does; `arguments` has read and checked its words."""

import argparse
import json
import platform
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import gemma4_kernels
from gemma4_kernels.check import record, runner

from .. import Cache, Gemma4ForCausalLM, Gemma4TextConfig, Gemma4Tokenizer, measure
from ..checkpoint.gguf import read_shards
from ..checkpoint.packed import options_of
from ..config import FULL
from ..files import read_json
from ..presets import RELEASED
from . import error_line
from .answer import Answer, Clock
from .arguments import SAMPLING, decoded
from .models import append_line, check_devices, folder_of, load, name_of
from .weights import quantize as quantize
from .weights import score as score

# Weights of fewer bytes than this may stay in a processor's caches, and memory is no limit.
CACHED_BYTES = 1 << 28
SUFFIXES = (".json", ".jinja", ".safetensors", ".gguf")


def generate(args: argparse.Namespace) -> int:
    """Continues a prompt, or answers it with --chat."""
    check_devices(args)
    folder = folder_of(args.model)  # the prompt is checked before the weights, which take long
    config = Gemma4TextConfig.from_pretrained(folder)
    tokenizer = Gemma4Tokenizer.from_pretrained(folder)
    if args.chat:
        turns = [*_system(args), {"role": "user", "content": args.prompt}]
        ids = tokenizer.apply_chat_template(turns, enable_thinking=args.think)
    else:
        ids = tokenizer.encode(args.prompt, add_bos=True)
    _room(config, ids)
    return 130 if _reply(args, load(args, folder), tokenizer, ids).interrupted else 0


def chat(args: argparse.Namespace) -> None:
    """A conversation; what the cache holds of it is not run again."""
    check_devices(args)
    history = _system(args)
    folder = folder_of(args.model)
    tokenizer = Gemma4Tokenizer.from_pretrained(folder)
    tokenizer.apply_chat_template([*history, {"role": "user", "content": "."}])  # fails early
    model = load(args, folder)
    # Rings of twice the window: an answer is taken back where its text does not become the tokens
    # that it was made of, and where its thoughts do not stay.
    rollback = model.config.sliding_window
    sizes = model.config, 1, model.compute_dtype, model.device
    cache = Cache(*sizes, rollback=rollback, kv_dtype=args.kv_dtype)
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        print(f"{name_of(args.model)}: /reset starts over, /exit or ctrl-d leaves", file=sys.stderr)
    for line in _lines(on_terminal):
        if line == "/exit":
            break
        if line == "/reset":
            history = _system(args)
            print("a new conversation", file=sys.stderr)
        if line in ("", "/reset"):
            continue
        history.append({"role": "user", "content": line})
        try:
            ids = tokenizer.apply_chat_template(history, enable_thinking=args.think)
            answer = _reply(args, model, tokenizer, ids, cache)
        except ValueError as error:
            if not on_terminal:
                raise
            print(error_line(error), file=sys.stderr)
            history.pop()
            continue
        # Turns must alternate: an answer cut short stays, one that never began takes its question.
        if answer.interrupted and not answer.text:
            history.pop()
        else:
            history.append({"role": "assistant", "content": answer.text})


def info(args: argparse.Namespace) -> None:
    """What is installed, what runs, and with --model the model's sizes."""
    build = gemma4_kernels.build_info()
    archs, reason, device = build.pop("archs"), build.pop("reason"), build.pop("device")
    if build.pop("cuda") and not device:
        reason = "torch sees no CUDA device"
    others = ("build_info", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
    ops = [name for name in gemma4_kernels.__all__ if name not in others]
    rows = {
        "gemma4-kernels": build.pop("version"),
        "torch": build.pop("torch"),
        "python": platform.python_version(),
        "device": device or "cpu (torch sees no CUDA device)",
        "compiled for": ", ".join(map(str, archs)) or "no CUDA architecture",
        "kernels for": ", ".join(build.pop("kernels")) or "no op",
        "in use": f"eager torch: {reason}" if reason else "CUDA kernels",
        **{key: value for key, value in build.items() if value is not None},
        "ops": ", ".join(ops),
    }
    if args.model is not None:
        rows |= _facts(folder_of(args.model))
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:{width}}  {value}")


def check(args: argparse.Namespace) -> int:
    """Every kernel against its eager twin and float64, on each kind of card; what fails is not used
    from then on. Returns 1 if one fails, 2 if there is nothing to check."""
    try:
        cards = runner.cards()
    except RuntimeError as nothing:
        print(f"gemma4: {nothing}", file=sys.stderr)
        return 2
    results = [_check_card(card, device, args.json) for card, device in cards.items()]
    if args.json:
        print(json.dumps(results))
    return 1 if any(reason for result in results for reason in result["kernels"].values()) else 0


def _check_card(card: record.Card, device: torch.device, quiet: bool) -> dict[str, Any]:
    """Checks one card and keeps the result; a line a kernel unless `quiet`."""
    ops, on_terminal = gemma4_kernels.build_info()["kernels"], sys.stderr.isatty()
    if not quiet:
        print(f"{card.name}, driver {card.driver}: {len(ops)} kernels", flush=True)
    kernels: dict[str, str | None] = {}
    width = max(map(len, ops))
    limit = runner.case_seconds(device)
    with runner.Runner(device, case_seconds=limit) as checking:
        for op in ops:
            if on_terminal:
                print(f"{op:{width}}  ...", end="\r", file=sys.stderr, flush=True)
            kernels[op] = checking.check(op)
            if not quiet:
                print(f"{op:{width}}  {kernels[op] or 'right'}", flush=True)
    failed = {op: reason for op, reason in kernels.items() if reason}
    try:
        record.write(card, failed)
    except (OSError, RuntimeError) as error:
        print(f"gemma4: the result is not kept: {error}", file=sys.stderr)
    else:
        if failed and not quiet:
            print(f"not used on this card from now on: {', '.join(failed)}")
    return asdict(card) | {"kernels": kernels}


def bench(args: argparse.Namespace) -> None:
    """Tokens per second of prompt and decode, and what memory and matrix products reach in the
    same process."""
    check_devices(args)
    folder = folder_of(args.model)
    config = Gemma4TextConfig.from_pretrained(folder)
    positions, wanted = config.max_position_embeddings, args.prompt_tokens + args.new_tokens
    if wanted > positions:
        raise ValueError(f"{wanted} tokens do not fit the model's {positions} positions")
    model = load(args, folder)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (1, args.prompt_tokens), generator=draw)
    options = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": []}
    options |= {"compile": args.compile, "kv_dtype": args.kv_dtype}
    clocks = [Clock() for _ in range(args.repeat + 1)]  # the first run is the warm-up
    for clock in clocks:
        model.generate(ids.to(model.device), streamer=clock, **options)
    prompt, decode, first = zip(*(clock.rates() for clock in clocks[1:]), strict=True)
    size, dtype = _count(model.num_parameters()), str(model.dtype).removeprefix("torch.")
    print(f"{name_of(args.model)}: {size} parameters, {dtype}, {model.device}, {args.repeat} runs")
    print(f"{'':12}{'tokens':>8}{'median':>12}{'least':>12}{'most':>12}")
    _row("prompt", args.prompt_tokens, prompt, "tok/s")
    _row("decode", args.new_tokens, decode, "tok/s")
    _row("first token", 1, [seconds * 1e3 for seconds in first], "ms")
    copy, gemm = measure.copy_bandwidth(model.device), measure.gemm_rate(model.device, model.dtype)
    weights, middle = measure.decode_bytes(model), args.prompt_tokens + args.new_tokens // 2
    read = weights + measure.key_bytes(config, middle, model.compute_dtype, args.kv_dtype)
    launches = measure.launches_per_token(model)
    limit, reached = copy / read, statistics.median(decode)
    print(f"copies move {copy / 1e9:.1f} GB/s, matrix products make {gemm / 1e12:.3f} TFLOP/s")
    started = "" if launches is None else f", in {launches:.0f} launches"
    print(f"a token reads {read / 1e6:.1f} MB, {weights / read:.0%} of it weights{started}")
    if weights >= CACHED_BYTES:
        print(f"its bytes alone allow {limit:.1f} decode tok/s: {reached / limit:.0%} reached")
    if args.json:
        row = measure.machine(model.device) | {
            "kind": "model",
            "model": name_of(args.model),
            "dtype": dtype,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "prompt_tok_s": prompt,
            "decode_tok_s": decode,
            "compile": args.compile,
            "kv_dtype": args.kv_dtype,
            "launches_per_token": launches,
            "bytes_per_token": read,
            "decode_limit_tok_s": limit if weights >= CACHED_BYTES else None,
            "copy_gb_s": copy / 1e9,
            "gemm_tflop_s": gemm / 1e12,
        }
        append_line(args.json, row)


def _row(name: str, tokens: int, values: Sequence[float], unit: str) -> None:
    numbers = statistics.median(values), min(values), max(values)
    print(f"{name:12}{tokens:8}" + "".join(f"{x:12.1f}" for x in numbers) + f"  {unit}")


def _reply(
    args: argparse.Namespace,
    model: Gemma4ForCausalLM,
    tokenizer: Gemma4Tokenizer,
    ids: list[int],
    cache: Cache | None = None,
) -> Answer:
    """Streams the continuation of `ids`; ctrl-c ends it and no more than it."""
    room = _room(model.config, ids)
    wanted = args.max_new_tokens or model.generation_config.new_tokens(len(ids))
    if wanted > room:
        print(f"only {room} more tokens fit the model's positions", file=sys.stderr)
    stop = list(model.generation_config.eos_ids)
    turn_end = tokenizer.turn_end_id
    if args.chat and turn_end is not None and turn_end not in stop:
        stop.append(turn_end)
    options = {"max_new_tokens": min(wanted, room), "eos_token_id": stop, **_options(args)}
    options |= {"compile": args.compile, "kv_dtype": args.kv_dtype}
    if args.stop:
        options |= {"stop_strings": args.stop, "tokenizer": tokenizer}
    answer = Answer(tokenizer)
    prompt = torch.tensor([ids], device=model.device)
    try:
        model.generate(prompt, streamer=answer, past_key_values=cache, **options)
    except KeyboardInterrupt:
        answer.interrupted = True
        answer.end()
    answer.reused = cache.reused[0] if cache else 0
    print(answer.summary(), file=sys.stderr)
    return answer


def _room(config: Gemma4TextConfig, ids: list[int]) -> int:
    """How many tokens can follow `ids`; ValueError if none can."""
    room = config.max_position_embeddings - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and the model's {config.max_position_embeddings} "
            "positions must hold it and its answer"
        )
    return room


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """`generate`'s options; any sampling option turns sampling on, and temperature 0 is greedy."""

    def given(*names: str) -> dict[str, Any]:
        values = {name: getattr(args, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    always, sampling = given("min_new_tokens", "repetition_penalty"), given(*SAMPLING)
    if args.greedy or args.temperature == 0:
        return {**always, "do_sample": False}
    return {**always, **sampling, "do_sample": True if sampling else None, "seed": args.seed}


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _lines(on_terminal: bool) -> Iterator[str]:
    """The user's lines; at a terminal ctrl-c gives up the line, and ctrl-d ends."""
    if not on_terminal:
        yield from (decoded(line).strip() for line in sys.stdin.buffer)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() line editing)
    while True:
        try:
            line = input("> ").strip()
            # Bytes that are not UTF-8 may also arrive as lone surrogates.
            line.encode("utf-8")
            yield line
        except UnicodeError:
            print("gemma4: error: the line is not valid UTF-8", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _facts(folder: Path) -> dict[str, str]:
    """A checkpoint's sizes, from its config; the weights are not read."""
    config, preset = Gemma4TextConfig.from_pretrained(folder), Gemma4TextConfig.preset
    with torch.device("meta"):
        model = Gemma4ForCausalLM(config)
    kinds, full = config.layer_types, config.kv_heads(FULL)
    facts = {
        "model": str(folder),
        "released as": ", ".join(x for x in RELEASED if _sizes(preset(x)) == _sizes(config)) or "-",
        "parameters": _count(model.num_parameters()),
        "layers": f"{len(kinds)}, of which {kinds.count(FULL)} full attention and "
        f"{config.num_kv_shared_layers} on borrowed keys",
        "width": f"{config.hidden_size}, feed-forward {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} for queries; for keys "
        f"{config.num_key_value_heads} of {config.head_dim} (sliding, window "
        f"{config.sliding_window}), {full} of {config.global_head_dim} (full)",
        "vocabulary": str(config.vocab_size),
        "positions": str(config.max_position_embeddings),
        "dtype": config.dtype,
    }
    if (method := _quantised(folder)) is not None:
        facts["quantised"] = method
    if config.enable_moe_block:
        facts["experts"] = f"{config.num_experts}, {config.top_k_experts} per token"
    if config.hidden_size_per_layer_input:
        table = model.model.embed_tokens_per_layer.weight.numel()
        facts["per-layer embeddings"] = f"{_count(table)} of the parameters"
    inside = [folder] if folder.is_file() else sorted(folder.iterdir())
    files = [file for file in inside if file.suffix in SUFFIXES]
    facts["files"] = ", ".join(
        f"{file.name} ({file.stat().st_size / 1e6:.2f} MB)" for file in files
    )
    return facts


def _quantised(folder: Path) -> str | None:
    """In what way a checkpoint's files say that they are."""
    if folder.is_file():
        kinds = Counter(tensor.kind for tensor in read_shards(folder).tensors if tensor.kind)
        return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or None
    file = folder / "config.json"
    method = options_of(read_json(file), str(file)).method
    return None if method == "unknown" else method


def _sizes(config: Gemma4TextConfig) -> tuple[object, ...]:
    return config.hidden_size, config.intermediate_size, config.layer_types, config.num_experts


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
